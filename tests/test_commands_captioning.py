"""`hf-vlp train`, `evaluate` and `predict` of captions, from a pretrained X-VLM to words about an image."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from data_fixtures import picture
from heads import make_head, save_heads
from safetensors.torch import load_file
from task_rows import run
from test_cli import run_main
from transformers import AutoProcessor

from hf_vlp import XVLMForCaptioning, XVLMForPreTraining, XVLMForRetrieval, predict
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.evaluation import caption_metrics, evaluate_captioning, majority_caption_metrics
from hf_vlp.heads import load_head

ROWS = 8
SETTINGS = ["--set", "use_cpu=true", "--batch-size", 4, "--steps", 1, "--learning-rate", 0.01]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models under the names of their classes, and rows.jsonl with two captions of each image."""
    folder = save_heads(
        tmp_path_factory.mktemp("captioning"), XVLMForPreTraining, XVLMForCaptioning, XVLMForRetrieval
    )
    lines = []
    for i, row in enumerate(shapes_dataset("captions", "train", ROWS)):
        row["image"].save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "caption": [row["caption"], "A red circle."]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("critical", [False, True])
def test_train_evaluate_and_predict(critical, folder, tmp_path):
    options = ["--prompt", "A the.", "--label-smoothing", 0.2, *["--self-critical"] * critical]
    out = tmp_path / "out"
    arguments = ["train", "captioning", folder / "XVLMForPreTraining", folder / "rows.jsonl", "--out", out]
    assert f"saved to {out}" in run(*arguments, *SETTINGS, *options)
    model, processor = load_head("captioning", str(out)), AutoProcessor.from_pretrained(out)
    assert processor.prompt == "a the" and model.config.label_smoothing == 0.2
    before = load_file(folder / "XVLMForPreTraining" / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    changed = not torch.equal(model.state_dict()[f"decoder.{name}"], before[f"model.text_model.{name}"])
    assert changed or critical  # advantages may be 0

    scores = json.loads(run("evaluate", "captioning", out, folder / "rows.jsonl", "--batch-size", 3))
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [{"image": str(folder / line["image"]), "caption": line["caption"]} for line in lines]
    result = evaluate_captioning(model, processor, rows)
    assert scores["metrics"] == pytest.approx(result.metrics)
    assert scores["baseline"] == pytest.approx(majority_caption_metrics(rows))
    assert scores["baseline"] == pytest.approx(
        caption_metrics(["A red circle."] * ROWS, [row["caption"] for row in rows])
    )

    images = [folder / "0.png", folder / "1.png"]
    printed = json.loads(run("predict", "--task", "captioning", out, *images))
    captions = result.captions[:2]
    named = zip(images, captions, strict=True)
    assert printed == [{"image": str(image), "caption": text} for image, text in named]
    other = json.loads(run("predict", "--task", "captioning", out, *images, "--text", "red"))
    assert [row["image"] for row in other] == list(map(str, images))


def test_predictions_are_those_of_the_model():
    model, processor = make_head(XVLMForCaptioning)
    images = [picture(0), picture(1, 40, 90), picture(0)]
    ours = predict("captioning", model, processor, images)
    assert ours == predict("captioning", model, processor, images, batch_size=1)
    assert [row["image"] for row in ours] == [0, 1, 2] and ours[0]["caption"] == ours[2]["caption"]
    pixels = processor(images=images)["pixel_values"]
    prompt = processor.encode_prompt("red")["input_ids"]
    ids = model.generate(pixels, prompt, num_beams=2, official_length=True, max_length=9)
    expected = processor.decode_captions(ids, "red")
    ours = predict("captioning", model, processor, images, ["red"], num_beams=2, max_length=9, min_length=0)
    assert [row["caption"] for row in ours] == expected
    for wrong in (([], []), (images, ["a", "b"]), (images, "a")):
        with pytest.raises(ValueError, match="one prompt"):
            predict("captioning", model, processor, *wrong)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["predict", "--task", "captioning", "XVLMForPreTraining", "0.png"], "trained first: hf-vlp train"),
        (["predict", "--task", "captioning", "XVLMForCaptioning", "0.png", "--out", "a.png"], "heat maps"),
        (["predict", "--task", "retrieval", "XVLMForRetrieval", "0.png"], "one text"),
        (
            ["train", "captioning", "XVLMForPreTraining", "rows.jsonl", "--label-smoothing", "1"],
            "less than 1",
        ),
        (["train", "pretrain", "XVLMForPreTraining", "rows.jsonl", "--prompt", "a"], "no use for"),
        (["train", "captioning", "XVLMForPreTraining", "rows.jsonl", "--regions", "rows.jsonl"], "regions"),
        (["evaluate", "captioning", "XVLMForRetrieval", "rows.jsonl"], "trained first: hf-vlp train"),
    ],
)
def test_refusals_in_one_line(arguments, word, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "train" else []
    message = run_main(monkeypatch, *arguments, *out)
    assert isinstance(message, str) and message.startswith("error: ") and word in message
    assert "\n" not in message
