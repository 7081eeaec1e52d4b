"""LXMERT against reference values of the official code, through the shipped converter, and against
transformers."""

from pathlib import Path

import pytest
import torch
from parity_cases import HIDDEN, LOGITS, check_gradients, load_case, read
from tiny import tiny_lxmert_config, visual_text_batch
from torch.nn import functional as F
from transformers import LxmertConfig
from transformers import LxmertForPreTraining as NativeForPreTraining
from transformers import LxmertForQuestionAnswering as NativeForQuestionAnswering

from hf_vlp import LXMERTForPreTraining, LXMERTForQuestionAnswering
from hf_vlp.conversion.lxmert import convert_state_dict, official_state_dict

REGIONS = ("visual_feats", "visual_pos")
TEXTS = ("input_ids", "attention_mask")


@pytest.fixture
def case(request):
    folder = Path(request.config.getoption("--parity-dir"))

    def load(name: str):
        loaded = load_case(folder / name, convert_state_dict)
        config = loaded.model.config
        config.official_padding_idx = True  # as the references were made
        model = type(loaded.model)(config)
        model.load_state_dict(loaded.model.state_dict())
        loaded.model = model.eval()  # the references are without dropout
        return loaded

    return load


def _inputs(case, *names) -> dict[str, torch.Tensor]:
    return {name: case.inputs[name] for name in names}


def _pretraining(inputs) -> dict[str, torch.Tensor]:
    return {
        "visual_feats": inputs["masked_visual_feats"],
        "visual_pos": inputs["visual_pos"],
        "mlm_input_ids": inputs["masked_input_ids"],
        "attention_mask": inputs["attention_mask"],
        "mlm_labels": inputs["mlm_labels"].masked_fill(inputs["mlm_labels"] == -1, -100),
        "itm_labels": inputs["matched_label"],
        "region_mask": inputs["feat_mask"].bool(),
        "target_feats": inputs["visual_feats"],
        "object_ids": inputs["obj_labels"],
        "object_scores": inputs["obj_conf"],
        "attribute_ids": inputs["attr_labels"],
        "attribute_scores": inputs["attr_conf"],
        "answer_labels": inputs["ans"].masked_fill(inputs["ans"] == -1, -100),
    }


def test_hidden_states_and_predictions(case):
    case = case("lxmert_pretrain")
    batch, expected = _inputs(case, *REGIONS, *TEXTS), case.outputs
    with torch.no_grad():
        states, output = case.model.lxmert(**batch), case.model(**batch)
    torch.testing.assert_close(states.last_hidden_state, expected["language_output"], **HIDDEN)
    torch.testing.assert_close(states.region_hidden_state, expected["vision_output"], **HIDDEN)
    torch.testing.assert_close(states.pooler_output, expected["pooled_output"], **LOGITS)
    names = {
        "mlm_logits": "prediction_logits",
        "itm_logits": "cross_relationship_score",
        "object_logits": "obj_scores",
        "attribute_logits": "attr_scores",
        "pred_feats": "feat_scores",
    }
    for ours, official in names.items():
        torch.testing.assert_close(output[ours], expected[official], **LOGITS)
    assert output.loss is None


def test_losses_and_gradients(case):
    case = case("lxmert_pretrain")
    output = case.model(**_pretraining(case.inputs))
    terms = {"masked_lm": "mlm", "matched": "itm", "obj": "object", "attr": "attribute", "feat": "feature"}
    for official, expected in zip(case.meta["loss_order"], case.outputs["losses"], strict=True):
        ours = output[f"loss_{terms.get(official, 'answer')}"]
        torch.testing.assert_close(ours, expected, **LOGITS)
    torch.testing.assert_close(output.answer_logits, case.outputs["answer_score"], **LOGITS)
    torch.testing.assert_close(output.loss, case.outputs["loss"], atol=2e-5, rtol=0)  # a sum of six
    check_gradients(case, output.loss)


def test_training_trajectory(case):
    case = case("lxmert_pretrain")
    batch = _pretraining(case.inputs)
    for expected in case.outputs["sgd_losses"]:
        output = case.model(**batch)
        torch.testing.assert_close(output.loss[None], expected, atol=5e-4, rtol=0)
        case.model.zero_grad()
        output.loss.backward()
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter -= case.meta["sgd_lr"] * parameter.grad


@pytest.mark.parametrize("name", ["lxmert_vqa", "lxmert_nlvr"])
def test_tasks(name, case):
    case = case(name)
    output = case.model(**_inputs(case, *REGIONS, *TEXTS, "labels"))
    torch.testing.assert_close(output.logits, case.outputs["logits"], **LOGITS)
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)


@pytest.mark.parametrize("name", ["lxmert_pretrain", "lxmert_vqa", "lxmert_nlvr"])
def test_back_to_the_official_layout(name, case, request):
    """Every tensor comes back equal, but for those that the head does not read."""
    folder = Path(request.config.getoption("--parity-dir"))
    official = read(folder / name / "official_state_dict.safetensors")
    case = case(name)
    back = official_state_dict(case.model)
    assert set(official) == set(back) | set(case.report.dropped)
    assert all(torch.equal(back[key], official[key]) for key in back)


@pytest.fixture(scope="module")
def native():
    """transformers' own model at base size, with loud weights."""
    torch.manual_seed(0)
    model = NativeForPreTraining(LxmertConfig(num_qa_labels=50)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.04)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def _base_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    attention_mask = torch.ones(2, 12, dtype=torch.long)
    attention_mask[1, 8:] = 0
    return {
        "input_ids": torch.randint(1000, 30000, (2, 12), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "visual_feats": torch.randn(2, 36, 2048, generator=generator).relu(),
        "visual_pos": torch.rand(2, 36, 2, generator=generator).repeat(1, 1, 2).sort(dim=-1).values,
    }


def test_base_size_against_transformers(native, tmp_path):
    """A folder that transformers wrote loads as it is, and gives the same states, predictions and losses."""
    native.save_pretrained(tmp_path)
    model, info = LXMERTForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.num_parameters() == native.num_parameters()
    batch = _base_batch()
    with torch.no_grad():
        expected, ours = native.lxmert(**batch), model.lxmert(**batch)
        words = batch["attention_mask"].bool()  # padding sees something else
        torch.testing.assert_close(
            ours.last_hidden_state[words], expected.language_output[words], atol=2e-5, rtol=0
        )
        torch.testing.assert_close(ours.region_hidden_state, expected.vision_output, atol=2e-5, rtol=0)
        torch.testing.assert_close(ours.pooler_output, expected.pooled_output, **LOGITS)
        expected, ours = native(**batch), model(**batch)
    torch.testing.assert_close(ours.mlm_logits[words], expected.prediction_logits[words], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.itm_logits, expected.cross_relationship_score, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.answer_logits, expected.question_answering_score, atol=5e-5, rtol=0)
    _compare_losses(native, model, batch)


def test_transformers_reads_our_folders(tmp_path):
    model = LXMERTForPreTraining(tiny_lxmert_config(x_layers=3)).eval()
    model.save_pretrained(tmp_path)
    native, info = NativeForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = visual_text_batch()
    with torch.no_grad():
        torch.testing.assert_close(
            native(**batch).question_answering_score, model(**batch).answer_logits, **LOGITS
        )


def _compare_losses(native, model, batch):
    """transformers weighs every region loss by where its mask is not 0, and by 6.67."""
    native.visual_loss_normalizer = model.config.visual_loss_normalizer = 1 / 0.15
    generator = torch.Generator().manual_seed(1)
    objects, attributes = (torch.randint(n, (2, 36), generator=generator) for n in (1600, 400))
    scores, masked = torch.rand(2, 36, generator=generator), torch.rand(2, 36, generator=generator) < 0.5
    labels = batch["input_ids"].masked_fill(torch.arange(12) % 3 != 1, -100)
    target, answers, matched = torch.randn(2, 36, 2048), torch.tensor([3, 49]), torch.tensor([1, 0])
    with torch.no_grad():
        expected = native(
            **batch,
            labels=labels,
            matched_label=matched,
            ans=answers,
            obj_labels={
                "obj": (objects, scores),
                "attr": (attributes, scores),
                "feat": (target, masked.float()),
            },
        ).loss
        output = model(
            **batch,
            mlm_labels=labels,
            itm_labels=matched,
            answer_labels=answers,
            region_mask=masked,
            target_feats=target,
            object_ids=objects,
            object_scores=scores,
            attribute_ids=attributes,
            attribute_scores=scores,
        )
    torch.testing.assert_close(output.loss, expected.squeeze(), atol=1e-3, rtol=1e-5)


def test_answers_against_transformers(tmp_path):
    config = LxmertConfig(
        vocab_size=60,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        l_layers=2,
        r_layers=2,
        x_layers=3,
        visual_feat_dim=20,
        num_qa_labels=11,
    )
    native = NativeForQuestionAnswering(config).eval()
    native.save_pretrained(tmp_path)
    model, info = LXMERTForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = _base_batch()
    batch["input_ids"], batch["visual_feats"] = batch["input_ids"] % 60, batch["visual_feats"][..., :20]
    labels = torch.tensor([4, 7])
    expected, ours = native(**batch, labels=labels), model(**batch, labels=labels)
    torch.testing.assert_close(ours.logits, expected.question_answering_score, **LOGITS)
    torch.testing.assert_close(ours.loss, F.cross_entropy(expected.question_answering_score, labels))
