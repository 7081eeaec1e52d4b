"""Protocols: the fast way equals the plain one, bad rows are named."""

import io

import pytest
import torch
from data_fixtures import picture
from tiny import tiny_config, tiny_processor

from hf_vlp import XVLMForGrounding, XVLMForPreTraining, XVLMForRetrieval
from hf_vlp.evaluation import (
    evaluate_foils,
    evaluate_grounding,
    evaluate_retrieval,
    random_object_accuracy,
    retrieval_recall,
)
from hf_vlp.evaluation.retrieval import VALUES_PER_CALL, ReadTexts, shortlists

WORDS = ["red", "green", "blue", "yellow", "circle", "square", "left", "right"]


def texts(count: int, longest: int = 12, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [" ".join(WORDS[int(i)] for i in torch.randint(0, 8, (n,), generator=generator)) for n in lengths]


def retrieval_rows(images: int = 5) -> list[dict]:
    captions = texts(3 * images)
    counts = [1 + i % 3 for i in range(images)]  # 1, 2 or 3 captions
    return [
        {"image": picture(i), "caption": captions[3 * i : 3 * i + count]} for i, count in enumerate(counts)
    ]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module", params=[XVLMForRetrieval, XVLMForPreTraining])
def matcher(request):
    return loud(request.param(tiny_config()))


def loud(model):
    """Weights large enough that scores differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model


def plain_scores(model, processor, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and match logits (I, T) of all pairs, each pair by itself."""
    model.eval()
    captions = [text for row in rows for text in row["caption"]]
    with torch.no_grad():
        images = [
            model.get_image_features(processor(images=[row["image"]], return_tensors="pt").pixel_values)
            for row in rows
        ]
        tokens = [processor(text=[text], return_tensors="pt") for text in captions]
        encoded = [model.get_text_features(**text) for text in tokens]
        itc = torch.cat([i.pooler_output for i in images]) @ torch.cat([t.pooler_output for t in encoded]).T
        itm = [
            [
                model.match(
                    text.last_hidden_state,
                    token["attention_mask"],
                    model.project_image(image.last_hidden_state),
                )[0, 1]
                for text, token in zip(encoded, tokens, strict=True)
            ]
            for image in images
        ]
    return itc, torch.tensor(itm)


@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_retrieval_equals_pair_by_pair(matcher, processor, top_k):
    rows = retrieval_rows()
    itc, itm = plain_scores(matcher, processor, rows)
    result = evaluate_retrieval(matcher, processor, rows, top_k=top_k, batch_size=2)
    torch.testing.assert_close(result.itc_scores, itc, atol=1e-5, rtol=0)
    assert result.text_image.tolist() == [i for i, row in enumerate(rows) for _ in row["caption"]]
    for scores, cosines, logits in (
        (result.image_to_text, itc, itm),
        (result.text_to_image, itc.T, itm.T),
    ):
        k = min(top_k, cosines.shape[1])
        expected = torch.full_like(logits, -100).scatter(1, cosines.topk(k, dim=1).indices, 0)
        expected = torch.where(expected == 0, logits, expected)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert result.itc_metrics == retrieval_recall(itc, itc.T, result.text_image)
    assert result.metrics == retrieval_recall(result.image_to_text, result.text_to_image, result.text_image)


def test_retrieval_does_not_depend_on_batches(processor):
    model, rows = loud(XVLMForRetrieval(tiny_config())), retrieval_rows(7)
    one = evaluate_retrieval(model, processor, rows, top_k=4, batch_size=1)
    many = evaluate_retrieval(model, processor, iter(rows), top_k=4, batch_size=64)
    torch.testing.assert_close(one.image_to_text, many.image_to_text, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.text_to_image, many.text_to_image, atol=1e-5, rtol=0)


def test_each_image_is_projected_once(processor, monkeypatch):
    model, rows = XVLMForRetrieval(tiny_config()), retrieval_rows(7)
    projected, project = [], model.project_image
    monkeypatch.setattr(
        model, "project_image", lambda embeds: projected.append(len(embeds)) or project(embeds)
    )
    evaluate_retrieval(model, processor, rows, batch_size=3)
    assert projected == [3, 3, 1]


def test_shortlists():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 9, generator=generator)
    for_image, for_text = shortlists(scores, 3)
    assert (for_image.sum(dim=1) == 3).all() and (for_text.sum(dim=0) == 3).all()
    assert (
        scores[for_image].view(4, 3).min(dim=1).values.gt(scores.masked_fill(for_image, -9).amax(dim=1)).all()
    )


def test_calls_hold_every_text_and_are_bounded():
    """1,000 texts of about 12 pieces, 300 of them for one image."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(1000, generator=generator).mul(2.5).add(12).round().clamp(4, 30).long()
    texts = ReadTexts(torch.zeros(int(lengths.sum()), 2048), lengths.cumsum(0) - lengths, lengths)
    chosen = torch.randperm(1000, generator=generator)[:300]
    calls = texts.calls(chosen[lengths[chosen].argsort()])
    assert sorted(torch.cat(calls).tolist()) == sorted(chosen.tolist())
    assert max(int(lengths[call].sum()) for call in calls) * 2048 <= VALUES_PER_CALL["cpu"] + 30 * 2048
    assert len(calls) == -(-int(lengths[chosen].sum()) * 2048 // VALUES_PER_CALL["cpu"])


def test_modes_and_gradients_are_restored(processor):
    model = XVLMForRetrieval(tiny_config()).train()
    model.model.vision_model.eval()
    result = evaluate_retrieval(model, processor, retrieval_rows(2))
    assert model.training and model.itm_head.training and not model.model.vision_model.training
    for scores in (result.itc_scores, result.image_to_text, result.text_to_image, result.text_image):
        assert not scores.is_inference() and scores.device.type == "cpu"


def test_bf16_models(processor):
    model = loud(XVLMForRetrieval(tiny_config()))
    rows = retrieval_rows()
    exact = evaluate_retrieval(model, processor, rows)
    half = evaluate_retrieval(model.to(torch.bfloat16), processor, rows)
    assert half.image_to_text.dtype == torch.float32
    assert (half.image_to_text - exact.image_to_text).abs().mean() < 0.2 * exact.image_to_text.std()
    foils = [{"image": picture(0), "caption": "a red circle", "foil": "a blue circle"}]
    assert evaluate_foils(model, processor, foils).caption_scores.dtype == torch.float32
    pointer = XVLMForGrounding(tiny_config()).to(torch.bfloat16)
    assert evaluate_grounding(pointer, processor, grounding_rows()).boxes.dtype == torch.float32


def test_foils(matcher, processor):
    rows = [
        {"image": picture(i), "caption": caption, "foil": foil}
        for i, (caption, foil) in enumerate(zip(texts(5), texts(5, seed=1), strict=True))
    ]
    result = evaluate_foils(matcher, processor, rows, batch_size=2)
    as_retrieval = [{"image": row["image"], "caption": [row["caption"], row["foil"]]} for row in rows]
    _, itm = plain_scores(matcher, processor, as_retrieval)
    for i in range(5):
        assert result.caption_scores[i].item() == pytest.approx(itm[i, 2 * i].item(), abs=1e-5)
        assert result.foil_scores[i].item() == pytest.approx(itm[i, 2 * i + 1].item(), abs=1e-5)
    assert result.accuracy == (result.caption_scores > result.foil_scores).double().mean().item()


def test_equal_texts_tie(matcher, processor):
    rows = [{"image": picture(i), "caption": "a red circle", "foil": "a red circle"} for i in range(3)]
    assert evaluate_foils(matcher, processor, rows).accuracy == 0.5


def grounding_rows() -> list[dict]:
    return [
        {"image": picture(i // 2, width=80 + 20 * (i // 2)), "text": text, "box": [10.0, 5.0, 20.0 + i, 30.0]}
        for i, text in enumerate(texts(6))
    ]


def test_grounding(processor, monkeypatch):
    model, rows = loud(XVLMForGrounding(tiny_config())).eval(), grounding_rows()
    encoded, encode = [], model.model.vision_model.forward
    monkeypatch.setattr(model.model.vision_model, "forward", lambda x: encoded.append(len(x)) or encode(x))
    result = evaluate_grounding(model, processor, rows, batch_size=4)
    assert encoded == [2, 1]  # rows of one image share its pass
    assert result.boxes.shape == (6, 4) and result.ious.shape == (6,)
    for row, box in zip(rows, result.boxes, strict=True):
        inputs = processor(images=[row["image"]], text=[row["text"]], return_tensors="pt")
        with torch.no_grad():
            cx, cy, w, h = model(**inputs).pred_boxes[0].tolist()
        width, height = row["image"].size
        corners = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        expected = torch.tensor(corners).clamp(min=0).minimum(torch.tensor([width, height] * 2))
        torch.testing.assert_close(box, expected, atol=1e-3, rtol=0)
    assert result.accuracy == (result.ious >= 0.5).double().mean().item()


def test_rows_with_encoded_images(processor):
    """What readers return is decoded on the way, and a broken image named."""
    model, rows = loud(XVLMForGrounding(tiny_config())), grounding_rows()
    expected = evaluate_grounding(model, processor, rows)
    for row in rows:
        buffer = io.BytesIO()
        row["image"].save(buffer, "PNG")
        row["image"] = {"bytes": buffer.getvalue(), "path": "scene.png"}
    assert torch.equal(evaluate_grounding(model, processor, rows).boxes, expected.boxes)
    rows[0]["image"]["bytes"] = b"no image"
    with pytest.raises(ValueError, match="scene.png"):
        evaluate_grounding(model, processor, rows)


def test_a_perfect_pointer(processor):
    """Targets set to what the model says."""
    model, rows = XVLMForGrounding(tiny_config()), grounding_rows()
    boxes = evaluate_grounding(model, processor, rows).boxes
    for row, (x1, y1, x2, y2) in zip(rows, boxes.tolist(), strict=True):
        row["box"] = [x1, y1, x2 - x1, y2 - y1]
    assert evaluate_grounding(model, processor, rows).accuracy == 1


def test_random_object_accuracy():
    objects = [[0, 0, 10, 10], [1, 0, 10, 10], [50, 50, 10, 10], [80, 80, 5, 5]]
    rows = [{"box": objects[0], "candidates": objects}, {"box": objects[3], "candidates": objects[2:]}]
    assert random_object_accuracy(rows) == pytest.approx((2 / 4 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("evaluate", "match"),
    [
        (lambda m, p: evaluate_retrieval(m, p, []), "rows is empty"),
        (lambda m, p: evaluate_retrieval(m, p, retrieval_rows(2), top_k=0), "top_k is 0"),
        (lambda m, p: evaluate_retrieval(m, p, retrieval_rows(2), batch_size=0), "batch_size is 0"),
        (lambda m, p: evaluate_retrieval(m, p, [{"image": picture(), "caption": "a circle"}]), "rows\\[0\\]"),
        (
            lambda m, p: evaluate_retrieval(m, p, retrieval_rows(1) + [{"image": picture(), "caption": []}]),
            "rows\\[1\\]",
        ),
        (lambda m, p: evaluate_foils(m, p, []), "rows is empty"),
        (lambda m, p: evaluate_grounding(m, p, []), "rows is empty"),
        (lambda m, p: random_object_accuracy([]), "rows is empty"),
        (lambda m, p: random_object_accuracy([{"box": [0, 0, 1, 1]}]), "rows\\[0\\] has no `candidates`"),
        (
            lambda m, p: random_object_accuracy([{"box": [0, 0, -1, 1], "candidates": [[0, 0, 1, 1]]}]),
            "not x1 <= x2",
        ),
    ],
)
def test_errors(processor, evaluate, match):
    with pytest.raises(ValueError, match=match):
        evaluate(XVLMForRetrieval(tiny_config()), processor)
