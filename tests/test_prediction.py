"""Predictions of every task, which head does it, and which image goes with which text."""

import pytest
import torch
from data_fixtures import picture
from heads import make_head, save_heads
from hypothesis import given
from hypothesis import strategies as st

from hf_vlp import (
    ALBEFForGrounding,
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForRetrieval,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    XVLMForGrounding,
    XVLMForPreTraining,
    XVLMForQuestionAnswering,
    XVLMForRetrieval,
    XVLMForVisualEntailment,
    XVLMForVisualReasoning,
    XVLMForWeakGrounding,
)
from hf_vlp.heads import load_head
from hf_vlp.prediction import pair, predict

IMAGES = [picture(0), picture(1, 40, 90), picture(2), picture(3)]
TEXTS = ["a red circle", "is the blue square left of the green triangle?"]
ANSWERS = ["red", "blue circle", "the green cross", "left"]
CASES = [
    ("vqa", ALBEFForQuestionAnswering, 2, {"answers": ANSWERS}),
    ("vqa", ALBEFForQuestionAnswering, 2, {}),
    ("retrieval", ALBEFForRetrieval, 3, {}),
    ("retrieval", XVLMForPreTraining, 3, {}),
    ("grounding", ALBEFForGrounding, 2, {}),
    ("grounding", XVLMForGrounding, 2, {}),
    ("entailment", ALBEFForVisualEntailment, 2, {}),
    ("reasoning", ALBEFForVisualReasoning, 4, {}),
    ("vqa", XVLMForQuestionAnswering, 2, {"answers": ANSWERS}),
    ("grounding", XVLMForWeakGrounding, 2, {}),
    ("entailment", XVLMForVisualEntailment, 2, {}),
    ("reasoning", XVLMForVisualReasoning, 4, {}),
]


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, other, atol=1e-4)
    return one == pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(one, float) else one == other


@pytest.mark.parametrize(("task", "head", "images", "options"), CASES)
def test_batches_make_no_difference(task, head, images, options, tmp_path):
    model, processor = make_head(head)
    with torch.no_grad():  # or images would hardly change anything
        for name, weights in model.named_parameters():
            weights *= 8 if name.startswith("model.fusion_model") and weights.ndim == 2 else 1
    together = predict(task, model, processor, IMAGES[:images], TEXTS, **options)
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(images)]
    assert same(together, predict(task, model, processor, files, TEXTS, batch_size=1, **options))
    assert len(together) == (6 if task == "retrieval" else 2)


@pytest.mark.parametrize("head", [ALBEFForQuestionAnswering, XVLMForQuestionAnswering])
def test_answers_are_ranked_by_the_model(head):
    model, processor = make_head(head)
    (row, _) = predict("vqa", model, processor, IMAGES[:1], TEXTS, answers=ANSWERS, top_k=4)
    probabilities = [answer["probability"] for answer in row["answers"]]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)
    assert {answer["answer"] for answer in row["answers"]} == set(ANSWERS)
    (row, _) = predict("vqa", model, processor, IMAGES[:1], TEXTS, answers=ANSWERS, top_k=2)
    assert [answer["probability"] for answer in row["answers"]] == pytest.approx(probabilities[:2])


@pytest.mark.parametrize("head", [ALBEFForQuestionAnswering, XVLMForQuestionAnswering])
def test_without_a_list_the_answer_is_written(head):
    model, processor = make_head(head)
    rows = predict("vqa", model, processor, IMAGES[:1], TEXTS[1:])
    ids = model.generate(
        processor(images=IMAGES[:1])["pixel_values"], **processor.encode_questions(TEXTS[1:])
    )
    assert rows[0]["answers"] == [{"answer": processor.decode_answers(ids)[0]}]


@pytest.mark.parametrize("head", [ALBEFForRetrieval, XVLMForRetrieval])
def test_retrieval_compares_and_matches_every_pair(head):
    model, processor = make_head(head)
    rows = predict("retrieval", model, processor, IMAGES[:3], TEXTS)
    assert [(row["image"], row["text"]) for row in rows] == [(i, text) for i in range(3) for text in TEXTS]
    batch = processor(images=[IMAGES[2]], text=[TEXTS[1]])
    with torch.no_grad():
        output = model(**batch, return_loss=False)
        words = model.get_text_features(batch["input_ids"]).last_hidden_state
        key_values = model.project_image(model.get_image_features(batch["pixel_values"]).last_hidden_state)
        logits = model.match(words, batch["attention_mask"], key_values)
    cosine = (output.image_features * output.text_features).sum().item()
    assert rows[-1]["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert rows[-1]["probability"] == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)


def test_ranks_follow_the_probability():
    model, processor = make_head(XVLMForRetrieval)
    rows = predict("retrieval", model, processor, IMAGES, TEXTS)
    for key, rank, number in (("image", "text_rank", 2), ("text", "image_rank", 4)):
        for value in {row[key] for row in rows}:
            ranked = sorted((row for row in rows if row[key] == value), key=lambda row: row[rank])
            assert [row[rank] for row in ranked] == list(range(1, number + 1))
            probabilities = [row["probability"] for row in ranked]
            assert probabilities == sorted(probabilities, reverse=True)


def test_boxes_are_in_pixels_of_the_image():
    model, processor = make_head(XVLMForGrounding)
    (row,) = predict("grounding", model, processor, IMAGES[1:2], TEXTS[:1])
    with torch.no_grad():
        cx, cy, w, h = model(**processor(images=IMAGES[1:2], text=TEXTS[:1])).pred_boxes[0].tolist()
    expected = [40 * (cx - w / 2), 90 * (cy - h / 2), 40 * (cx + w / 2), min(90 * (cy + h / 2), 90)]
    assert row["box"] == pytest.approx(expected, abs=1e-3) and "heatmap" not in row


@pytest.mark.parametrize("head", [ALBEFForGrounding, XVLMForWeakGrounding])
def test_the_hottest_proposal_is_chosen(head):
    model, processor = make_head(head)
    proposals = [[[0, 0, 20, 20], [40, 0, 30, 30], [0, 30, 30, 30], [40, 30, 40, 30]]]
    (row,) = predict("grounding", model, processor, IMAGES[:1], TEXTS[:1], proposals=proposals)
    (heat,) = processor.rank_proposals(row["heatmap"][None], proposals, [(60, 80)])
    x, y, w, h = proposals[0][int(heat.argmax())]
    assert row["box"] == [x, y, x + w, y + h] and 0 < row["probability"] < 1
    others = [[[0, 0, 1, 1]], [[2, 3, 4, 5]]]
    rows = predict("grounding", model, processor, IMAGES[:2], TEXTS, proposals=others)
    assert [row["box"] for row in rows] == [[0, 0, 1, 1], [2, 3, 6, 8]]


@pytest.mark.parametrize(
    ("head", "proposals"), [(XVLMForGrounding, [[[0, 0, 9, 9]]]), (ALBEFForGrounding, [[]])]
)
def test_proposals_that_do_not_fit(head, proposals):
    with pytest.raises(ValueError, match="proposals"):
        predict("grounding", *make_head(head), IMAGES[:1], TEXTS[:1], proposals=proposals)


@pytest.mark.parametrize("head", [ALBEFForVisualEntailment, XVLMForVisualEntailment])
def test_entailment_names_its_classes(head):
    model, processor = make_head(head)
    (row, _) = predict("entailment", model, processor, IMAGES[:1], TEXTS)
    with torch.no_grad():
        expected = model(**processor(images=IMAGES[:1], text=TEXTS[:1])).logits.softmax(1)[0]
    assert list(row["probabilities"]) == ["contradiction", "neutral", "entailment"]
    assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert row["label"] == model.config.id2label[int(expected.argmax())]


@pytest.mark.parametrize("head", [ALBEFForVisualReasoning, XVLMForVisualReasoning])
def test_reasoning_reads_left_then_right(head):
    model, processor = make_head(head)
    rows = predict("reasoning", model, processor, [*IMAGES[:2], *IMAGES[1::-1]], TEXTS[:1])
    assert [row["images"] for row in rows] == [(0, 1), (2, 3)]
    batch = processor(images=IMAGES[:2], text=TEXTS[:1])
    with torch.no_grad():
        logits = model(**batch | {"pixel_values": batch["pixel_values"][None]}).logits
    assert rows[0]["probabilities"]["true"] == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)
    assert rows[0]["probabilities"]["true"] != rows[1]["probabilities"]["true"]


@given(images=st.integers(0, 6), texts=st.integers(0, 6), per_text=st.sampled_from([1, 2]))
def test_pairs_of_images_and_texts(images, texts, per_text):
    units = images // per_text
    fits = images % per_text == 0 and min(units, texts) > 0 and (1 in (units, texts) or units == texts)
    places, words = [f"image {i}" for i in range(images)], [f"text {i}" for i in range(texts)]
    if not fits:
        with pytest.raises(ValueError, match="images"):
            pair(places, words, per_text)
        return
    rows = pair(places, words, per_text)
    assert len(rows) == max(units, texts)
    for i, row in enumerate(rows):
        unit = i % units
        expected = unit if per_text == 1 else (2 * unit, 2 * unit + 1)
        named = f"image {unit}" if per_text == 1 else (f"image {2 * unit}", f"image {2 * unit + 1}")
        assert row == {"image": named, "place": expected, "text": f"text {i % texts}"}


def test_what_does_not_fit_is_named():
    model, processor = make_head(XVLMForGrounding)
    with pytest.raises(ValueError, match="XVLMForGrounding, which does not do vqa"):
        predict("vqa", model, processor, IMAGES, TEXTS)
    with pytest.raises(ValueError, match="task is 'poetry'"):
        predict("poetry", model, processor, IMAGES, TEXTS)
    with pytest.raises(ValueError, match="lists"):
        predict("grounding", model, processor, IMAGES, "a red circle")


# Loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    heads = ALBEFForPreTraining, ALBEFForVisualReasoning, ALBEFForGrounding
    heads += XVLMForPreTraining, XVLMForRetrieval, XVLMForWeakGrounding, XVLMForVisualReasoning
    return save_heads(tmp_path_factory.mktemp("heads"), *heads)


@pytest.mark.parametrize(
    ("task", "saved", "head"),
    [
        ("retrieval", ALBEFForPreTraining, ALBEFForRetrieval),
        ("retrieval", ALBEFForGrounding, ALBEFForRetrieval),
        ("grounding", ALBEFForPreTraining, ALBEFForGrounding),
        ("retrieval", XVLMForPreTraining, XVLMForRetrieval),
        ("grounding", XVLMForPreTraining, XVLMForGrounding),
        ("grounding", XVLMForRetrieval, XVLMForWeakGrounding),  # points as it is
        ("grounding", XVLMForWeakGrounding, XVLMForWeakGrounding),
        ("retrieval", XVLMForWeakGrounding, XVLMForRetrieval),
        ("reasoning", XVLMForVisualReasoning, XVLMForVisualReasoning),
        ("reasoning", ALBEFForVisualReasoning, ALBEFForVisualReasoning),
    ],
)
def test_a_head_with_all_its_weights_is_loaded(task, saved, head, folder):
    model = load_head(task, folder / saved.__name__)
    assert type(model) is head and not model.training
    stored = saved.from_pretrained(folder / saved.__name__).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("task", "saved", "word"),
    [
        ("vqa", ALBEFForPreTraining, "trained first"),  # its decoder would be a copy of other layers
        ("entailment", ALBEFForPreTraining, "trained first"),
        ("retrieval", ALBEFForVisualReasoning, "trained first"),
        ("entailment", ALBEFForVisualReasoning, "other sizes"),
        ("vqa", XVLMForPreTraining, "trained first"),
        ("reasoning", XVLMForPreTraining, "trained first"),
        ("entailment", XVLMForVisualReasoning, "other sizes"),
        ("poetry", XVLMForPreTraining, "task is 'poetry'"),
    ],
)
def test_a_head_that_would_be_new_is_refused(task, saved, word, folder):
    with pytest.raises(ValueError, match=word):
        load_head(task, folder / saved.__name__)


def test_a_new_head_can_be_loaded_to_train(folder):
    model = load_head("vqa", folder / "ALBEFForPreTraining", needs_weights=False, teacher=True)
    assert model.teacher is not None and model.config.momentum_teacher
    assert load_head("retrieval", folder / "ALBEFForPreTraining").teacher is None
    boxes = load_head("grounding", folder / "XVLMForRetrieval", needs_weights=False)
    assert type(boxes) is XVLMForGrounding and boxes.new_parameters
    larger = load_head("grounding", folder / "XVLMForPreTraining", image_size=64)
    assert larger.config.vision_config.image_size == 64


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="of type bert"):
        load_head("pretrain", tmp_path)
