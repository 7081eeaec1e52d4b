"""Answers as they are compared, and heads that choose among other answers from now on."""

import pytest
import torch
from tiny import canvas_text_batch, tiny_lxmert_config, tiny_soho_config, visual_text_batch

import hf_vlp
from hf_vlp.models.answers import match_answers, simplify_answer

HEADS = {
    hf_vlp.LXMERTForQuestionAnswering: (tiny_lxmert_config, visual_text_batch),
    hf_vlp.SOHOForQuestionAnswering: (tiny_soho_config, canvas_text_batch),
}


@pytest.fixture(params=HEADS, ids=lambda head: head.__name__)
def head(request):
    return request.param


def make_head(head, answers: list[str] | None) -> hf_vlp.models.base.VLPPreTrainedModel:
    model = head(HEADS[head][0](answers=answers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("answer", "simple"),
    [("Two.", "2"), ("The woman", "woman"), ("A.", "a"), ("", ""), ("Grey", "gray"), ("a the cat", "cat")],
)
def test_simplify_answer(answer, simple):
    assert simplify_answer(answer) == simple


def test_match_answers_takes_the_first_of_equal_entries():
    places, _ = match_answers(["cat"], ["dog", "the cat", "cat"])
    assert places == [1]


def test_load_answers(head):
    model, batch = make_head(head, ["yes", "no", "2", "woman", "gray", "b"]), HEADS[head][1]()
    before = model(**batch).logits
    coverage = model.load_answers(["the woman", "maybe", "Two.", "no"])
    assert coverage == (["the woman", "Two.", "no"], ["maybe"])
    assert str(coverage) == "3 of 4 answers, without 'maybe'"
    after = model(**batch).logits
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [3, 2, 1]])
    assert not after[:, 1].any()
    assert getattr(model.config, model.num_answers_field) == 4 and model.config.answers[1] == "maybe"
    model.load_answers(["no", "yes"], table=["x", "y", "yes", "no"])
    torch.testing.assert_close(model(**batch).logits, after[:, [3, 2]])


def test_loaded_answers_are_kept_and_learnt(head, tmp_path):
    model = make_head(head, list("abcdef"))
    model.load_answers(["f", "g"])
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    assert loaded.config.answers == ["f", "g"]
    batch = HEADS[head][1]()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    loaded(**batch, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert loaded.answer_classes.weight.grad.abs().sum(dim=1).all()


def test_load_answers_refuses(head):
    model = make_head(head, None)
    with pytest.raises(ValueError, match="not known"):
        model.load_answers(["a"])
    with pytest.raises(ValueError, match="give them as table"):
        model.load_answers(["a"], table=["a"])
    for answers in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="each answer once"):
            model.load_answers(answers, table=list("abcdef"))
    with pytest.raises(ValueError, match="one string for each class"):
        HEADS[head][0](answers=["a"])
