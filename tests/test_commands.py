"""`hf-vlp predict`, `train` and `evaluate`, run on tiny models and drawn scenes."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from heads import ALBEF, XVLM, make_head, save_heads
from PIL import Image
from safetensors.torch import load_file
from test_cli import run_main
from transformers import AutoProcessor
from typer.testing import CliRunner

from hf_vlp import (
    ALBEFForGrounding,
    ALBEFForPreTraining,
    ALBEFForRetrieval,
    XVLMForGrounding,
    XVLMForPreTraining,
    XVLMForWeakGrounding,
)
from hf_vlp.cli import app
from hf_vlp.commands.rows import read_rows
from hf_vlp.commands.train import _rows_and_collator, training_arguments
from hf_vlp.data.collators import GroundingCollator, RegionGroundingCollator
from hf_vlp.data.masking import TokenMasking, WholeWordMasking
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.evaluation import (
    evaluate_entailment,
    evaluate_grounding,
    evaluate_proposals,
    evaluate_retrieval,
    majority_label_accuracy,
    random_object_accuracy,
)
from hf_vlp.heads import load_head
from hf_vlp.images import load_image

TASKS = {
    "pretrain": "captions",
    "retrieval": "retrieval",
    "grounding": "grounding",
    "vqa": "questions",
    "reasoning": "pairs",
    "entailment": "entailment",
    "assignment": "captions",
    "foils": "foils",
    "regions": "regions",
}
ROWS = 8
ANSWERS = ["yes", "no", "red", "2"]


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output or result.exception
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models under the names of their classes, and for each task JSON lines with images beside them."""
    torch.manual_seed(0)  # so that no two protocols score alike by chance
    folder = save_heads(tmp_path_factory.mktemp("commands"), *ALBEF, *XVLM)
    for split in ("train", "test"):
        for task, name in TASKS.items():
            write_rows(folder / split, task, list(shapes_dataset(name, split, ROWS)))
    (folder / "answers.txt").write_text("\n".join(ANSWERS) + "\n")
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    return folder


def write_rows(folder: Path, task: str, rows: list[dict]) -> None:
    (folder / task).mkdir(parents=True)
    lines = []
    for i, row in enumerate(rows):
        images = row.pop("images", None) or [row.pop("image")]
        names = [f"{task}/{i}_{j}.png" for j in range(len(images))]
        for image, name in zip(images, names, strict=True):
            image.save(folder / name)
        row |= {"images": names} if len(names) == 2 else {"image": names[0]}
        if task == "grounding":
            row["image_id"] = names[0]
        lines.append(json.dumps(row))
    (folder / f"{task}.jsonl").write_text("\n".join(lines))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# predict


def photos(folder: Path, count: int) -> list[Path]:
    return [folder / "test" / "retrieval" / f"{i}_0.png" for i in range(count)]


@pytest.mark.parametrize(
    ("task", "model", "images", "keys"),
    [
        ("vqa", "ALBEFForQuestionAnswering", 2, {"image", "text", "answers"}),
        (
            "retrieval",
            "ALBEFForPreTraining",
            2,
            {"image", "text", "cosine", "probability", "text_rank", "image_rank"},
        ),
        ("retrieval", "XVLMForRetrieval", 1, None),
        ("grounding", "ALBEFForRetrieval", 2, {"image", "text", "box", "probability"}),
        ("grounding", "XVLMForGrounding", 1, {"image", "text", "box"}),
        ("grounding", "XVLMForRetrieval", 2, {"image", "text", "box", "probability"}),
        ("vqa", "XVLMForQuestionAnswering", 2, {"image", "text", "answers"}),
        ("entailment", "XVLMForVisualEntailment", 1, {"image", "text", "label", "probabilities"}),
        ("reasoning", "XVLMForVisualReasoning", 4, {"images", "text", "label", "probabilities"}),
        ("entailment", "ALBEFForVisualEntailment", 1, {"image", "text", "label", "probabilities"}),
        ("reasoning", "ALBEFForVisualReasoning", 4, {"images", "text", "label", "probabilities"}),
    ],
)
def test_predict_prints_json_and_draws(task, model, images, keys, folder, tmp_path):
    images, texts = photos(folder, images), ["is the circle red", "the blue square"]
    arguments = ["predict", "--task", task, folder / model, *images]
    arguments += [word for text in texts for word in ("--text", text)]
    rows = json.loads(run(*arguments, "--out", tmp_path / "out.png"))
    assert {row["text"] for row in rows} == set(texts)
    assert keys is None or all(set(row) == keys for row in rows)
    named = {name for row in rows for name in row.get("images", [row.get("image")])}
    assert named == set(map(str, images))
    with Image.open(tmp_path / "out.png") as drawn:
        assert min(drawn.size) > 200 and len(drawn.convert("RGB").getcolors(2**20)) > 10
    assert run(*arguments, "--out", tmp_path / "out.json") == ""
    assert json.loads((tmp_path / "out.json").read_text()) == rows


def test_pictures_show_each_text_once_and_the_heat(folder, tmp_path):
    images, sizes = photos(folder, 3), []
    for number in (1, 3):
        arguments = ["predict", "--task", "retrieval", folder / "ALBEFForRetrieval", *images[:number]]
        run(*arguments, "--text", "the square", "--out", tmp_path / "sheet.png")
        sizes.append(Image.open(tmp_path / "sheet.png").size)
    assert sizes[0] == sizes[1]
    colours = []
    for head in ("XVLMForGrounding", "ALBEFForGrounding"):
        arguments = ["predict", "--task", "grounding", folder / head, images[0]]
        run(*arguments, "--text", "the square", "--out", tmp_path / "box.png")
        colours.append(len(Image.open(tmp_path / "box.png").getcolors(2**20)))
    assert colours[1] > 2 * colours[0], "a heat map has many colours, a drawn scene has few"


@pytest.mark.parametrize("file", ["answers.txt", "answers.json"])
def test_predict_ranks_the_answers_of_a_file(file, folder):
    arguments = ["predict", "--task", "vqa", folder / "ALBEFForQuestionAnswering", *photos(folder, 1)]
    (row,) = json.loads(run(*arguments, "--text", "how many", "--answers", folder / file, "--top-k", 3))
    assert len(row["answers"]) == 3 and {one["answer"] for one in row["answers"]} < set(ANSWERS)


def test_predict_chooses_a_proposal(folder, tmp_path):
    (tmp_path / "proposals.json").write_text("[[[0, 0, 10, 12]]]")
    arguments = ["predict", "--task", "grounding", folder / "ALBEFForGrounding", *photos(folder, 1)]
    arguments += ["--text", "the square", "--proposals", tmp_path / "proposals.json"]
    assert json.loads(run(*arguments))[0]["box"] == [0, 0, 10, 12]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--task", "vqa", "ALBEFForPreTraining", "0.png", "--text", "a"], "trained first: hf-vlp train vqa"),
        (["--task", "vqa", "XVLMForGrounding", "0.png", "--text", "a"], "trained first: hf-vlp train vqa"),
        (["--task", "grounding", "XVLMForGrounding", "gone.png", "--text", "a"], "gone.png"),
        (["--task", "grounding", "XVLMForGrounding", "gone.png", "--text", "a", "--out", "a.gif"], ".png"),
        (["--task", "retrieval", "XVLMForRetrieval", "0.png", "--text", "?!"], "no word left"),
        (["--task", "retrieval", "XVLMForRetrieval", "0.png", "--text", "a", "--answers", "x"], "answers"),
        (["--task", "reasoning", "ALBEFForVisualReasoning", "0.png", "--text", "a"], "two images"),
    ],
)
def test_predict_refuses_in_one_line(arguments, word, folder, monkeypatch):
    monkeypatch.chdir(folder)
    Image.new("RGB", (40, 40)).save("0.png")
    message = run_main(monkeypatch, "predict", *arguments)
    assert isinstance(message, str) and message.startswith("error: ") and word in message
    assert "\n" not in message


# train


def train(task, model, data, out, *options) -> str:
    arguments = ["train", task, model, data, "--out", out, "--set", "use_cpu=true", "--batch-size", 4]
    return run(*arguments, "--learning-rate", 0.01, *options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path, step: int) -> list[dict]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    ("task", "model"),
    [(task, "ALBEFForPreTraining") for task in list(TASKS)[:7]]
    + [(task, "XVLMForPreTraining") for task in list(TASKS)[:7]],
)
def test_train_learns_and_saves(task, model, folder, tmp_path):
    data = folder / "train" / f"{task}.jsonl"
    options = ["--steps", 1, "--set", "save_steps=1", "--set", "logging_steps=1"]
    assert f"saved to {tmp_path}" in train(task, folder / model, data, tmp_path, *options)
    assert len(losses(tmp_path, 1)) == 1
    has_teacher = any(name.startswith("teacher.") for name in weights(tmp_path / "checkpoint-1"))
    assert has_teacher == (model.startswith("ALBEF") and task != "assignment")
    trained, before = weights(tmp_path), weights(folder / model)
    assert not any(name.startswith(("teacher.", "queue.")) for name in trained)
    name = "model.text_model.embeddings.word_embeddings.weight"
    assert not torch.equal(trained[name], before[name])
    if task != "pretrain":
        assert not load_head(task, str(tmp_path)).new_parameters
    assert AutoProcessor.from_pretrained(tmp_path).max_tokens == 20


@pytest.mark.parametrize("augment", [True, False])
def test_each_head_has_its_collator(augment, folder):
    def collator_of(task, head):
        model, processor = make_head(head)
        data = str(folder / "train" / f"{task}.jsonl")
        task = "grounding" if task == "regions" else task
        rows, collator = _rows_and_collator(task, model, processor, data, "train", augment)
        assert collator.augment == augment and collator([rows[0], rows[1]])
        return collator

    assert isinstance(collator_of("pretrain", ALBEFForPreTraining).masking, TokenMasking)
    assert isinstance(collator_of("pretrain", XVLMForPreTraining).masking, WholeWordMasking)
    assert collator_of("grounding", ALBEFForGrounding).crop_scale is None
    assert collator_of("retrieval", ALBEFForRetrieval).crop_scale == (0.5, 1.0)
    assert isinstance(collator_of("grounding", XVLMForGrounding), GroundingCollator)
    of_regions = collator_of("regions", XVLMForGrounding)
    assert isinstance(of_regions, RegionGroundingCollator) and of_regions.max_pairs == 24
    assert collator_of("grounding", XVLMForWeakGrounding).crop_scale is None


def test_train_without_a_teacher(folder, tmp_path):
    data = folder / "train" / "entailment.jsonl"
    options = ["--steps", 1, "--set", "save_steps=1", "--no-teacher", "--no-augment", "--image-size", 48]
    train("entailment", folder / "ALBEFForPreTraining", data, tmp_path, *options)
    assert not any(name.startswith("teacher.") for name in weights(tmp_path / "checkpoint-1"))
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size["height"] == 48


def test_train_mixes_regions(folder, tmp_path):
    data = folder / "train" / "pretrain.jsonl"
    options = ["--regions", folder / "train" / "regions.jsonl", "--set", "region_probability=1"]
    options += ["--steps", 2, "--set", "logging_steps=1", "--set", "save_steps=2"]
    train("pretrain", folder / "XVLMForPreTraining", data, tmp_path, *options)
    assert ["loss_bbox" in entry for entry in losses(tmp_path, 2)] == [True, False]


def test_boxes_are_learnt_from_regions_alone(folder, tmp_path):
    """The domain pretraining before RefCOCO+."""
    data, options = folder / "train" / "regions.jsonl", ["--recipe", "xvlm_grounding_pretrain", "--steps", 1]
    options += ["--set", "save_steps=1", "--set", "logging_steps=1"]
    train("grounding", folder / "XVLMForPreTraining", data, tmp_path, *options)
    assert "loss_giou" in losses(tmp_path, 1)[0]
    assert not load_head("grounding", str(tmp_path)).new_parameters


def test_a_resumed_run_ends_as_the_undisturbed_one(folder, tmp_path):
    data, model = folder / "train" / "vqa.jsonl", folder / "ALBEFForPreTraining"
    options = ["--steps", 4, "--set", "save_steps=2", "--seed", 3]
    train("vqa", model, data, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    train("vqa", model, data, tmp_path / "cut", *options, "--resume")
    resumed = weights(tmp_path / "cut")
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_fields_win_over_the_recipe_and_have_their_types():
    fields = {"max_steps": "7", "bf16": "false", "weight_decay": "0.5"}
    arguments = training_arguments(Path("out"), "xvlm_grounding_refcoco", fields)
    assert (arguments.max_steps, arguments.weight_decay, arguments.bf16) == (7, 0.5, False)
    assert arguments.official_adamw and arguments.adam_beta2 == 0.98


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["vqa", "ALBEFForPreTraining", "train/grounding.jsonl"], "with image, question, answers"),
        (["vqa", "ALBEFForPreTraining", "answers.txt"], "no known kind"),
        (["vqa", "ALBEFForPreTraining", "train/vqa.jsonl", "--recipe", "cake"], "the recipes are"),
        (["vqa", "ALBEFForPreTraining", "train/vqa.jsonl", "--set", "sugar=1"], "'sugar' is no field"),
        (["vqa", "ALBEFForPreTraining", "train/vqa.jsonl", "--set", "seed=one"], "invalid int"),
        (["vqa", "ALBEFForPreTraining", "train/vqa.jsonl", "--resume"], "no complete checkpoint"),
        (
            ["pretrain", "ALBEFForPreTraining", "train/pretrain.jsonl", "--regions", "train/regions.jsonl"],
            "regions",
        ),
    ],
)
def test_train_refuses_in_one_line(arguments, word, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    message = run_main(monkeypatch, "train", *arguments, "--out", str(tmp_path / "out"))
    assert isinstance(message, str) and message.startswith("error: ") and word in message
    assert "\n" not in message


# evaluate


@pytest.mark.parametrize(
    ("task", "model", "metrics"),
    [
        ("retrieval", "ALBEFForRetrieval", {"r_mean", "itc_r_mean", "text_recall_at_1"}),
        ("retrieval", "XVLMForPreTraining", {"r_mean", "itc_r_mean"}),
        ("grounding", "ALBEFForPreTraining", {"accuracy"}),
        ("grounding", "XVLMForGrounding", {"accuracy"}),
        ("grounding", "XVLMForRetrieval", {"accuracy"}),
        ("vqa", "XVLMForQuestionAnswering", {"accuracy", "accuracy of exists"}),
        ("reasoning", "XVLMForVisualReasoning", {"accuracy", "consistency"}),
        ("entailment", "XVLMForVisualEntailment", {"accuracy"}),
        ("vqa", "ALBEFForQuestionAnswering", {"accuracy", "accuracy of exists"}),
        ("reasoning", "ALBEFForVisualReasoning", {"accuracy", "consistency"}),
        ("entailment", "ALBEFForVisualEntailment", {"accuracy"}),
        ("foils", "XVLMForRetrieval", {"accuracy"}),
    ],
)
def test_evaluate_prints_metrics_beside_baselines(task, model, metrics, folder):
    options = ["--answers", folder / "answers.json"] if task == "vqa" else []
    data = folder / "test" / f"{task}.jsonl"
    scores = json.loads(run("evaluate", task, folder / model, data, "--batch-size", 3, *options))
    assert scores["rows"] == ROWS and metrics <= set(scores["metrics"]) and scores["baseline_name"]
    assert set(scores["baseline"]) <= set(scores["metrics"])
    values = [*scores["metrics"].values(), *scores["baseline"].values()]
    assert all(0 <= value <= 1 for value in values) and max(scores["baseline"].values()) > 0


def test_the_baseline_of_retrieval_is_chance(folder):
    scores = json.loads(
        run("evaluate", "retrieval", folder / "XVLMForRetrieval", folder / "test" / "retrieval.jsonl")
    )
    assert scores["baseline"]["image_recall_at_1"] == pytest.approx(1 / ROWS)


def test_evaluate_agrees_with_the_protocols(folder):
    def both(task, head):
        data = folder / "test" / f"{task}.jsonl"
        scores = json.loads(run("evaluate", task, folder / head, data))
        model = load_head(task, str(folder / head))
        processor = AutoProcessor.from_pretrained(folder / head)
        return scores, (model, processor, read_rows(str(data), "test", ("image",)))

    scores, inputs = both("entailment", "ALBEFForVisualEntailment")
    assert scores["metrics"]["accuracy"] == evaluate_entailment(*inputs).accuracy
    assert scores["baseline"]["accuracy"] == majority_label_accuracy(inputs[-1])
    scores, inputs = both("retrieval", "XVLMForRetrieval")
    result = evaluate_retrieval(*inputs)
    assert scores["metrics"]["r_mean"] == result.metrics["r_mean"]
    assert scores["metrics"]["itc_r_mean"] == result.itc_metrics["r_mean"]
    scores, inputs = both("grounding", "ALBEFForGrounding")
    assert scores["metrics"]["accuracy"] == evaluate_proposals(*inputs).accuracy
    assert scores["metrics"]["accuracy"] != evaluate_grounding(*inputs).accuracy
    assert scores["baseline"]["accuracy"] == random_object_accuracy(inputs[-1])


def test_evaluate_needs_answers_to_rank(folder, monkeypatch):
    arguments = ["vqa", folder / "ALBEFForQuestionAnswering", folder / "test" / "vqa.jsonl"]
    message = run_main(monkeypatch, "evaluate", *map(str, arguments))
    assert isinstance(message, str) and message.startswith("error: answers is None")


# Rows


@pytest.mark.parametrize("kind", ["json", "parquet", "folder", "splits"])
def test_rows_of_every_kind_are_the_same(kind, tmp_path):
    for i in range(2):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [{"images": [f"{i}.png", "0.png"], "sentence": f"s{i}", "label": i} for i in range(2)]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(lines))
    if kind != "json":
        images = datasets.List(datasets.Image(decode=False))
        whole = [line | {"images": [str(tmp_path / name) for name in line["images"]]} for line in lines]
        rows = datasets.Dataset.from_list(whole).cast_column("images", images)
        source = tmp_path / "rows"
        if kind == "parquet":
            source = tmp_path / "rows.parquet"
            rows.to_parquet(source)
        elif kind == "folder":
            rows.save_to_disk(source)
        else:
            datasets.DatasetDict({"val": rows}).save_to_disk(source)
    rows = read_rows(str(source), "val", ("images", "sentence", "label"))
    for i, row in enumerate(rows):
        assert (row["sentence"], row["label"]) == (f"s{i}", i)
        assert [load_image(image).getpixel((0, 0)) for image in row["images"]] == [(i, 0, 0), (0, 0, 0)]


def test_rows_that_are_not_there(tmp_path):
    datasets.DatasetDict({"val": datasets.Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="no split 'train'; it has val"):
        read_rows(str(tmp_path / "rows"), "train", ("a",))
    (tmp_path / "rows.json").write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match="at least one row with a, b"):
        read_rows(str(tmp_path / "rows.json"), "train", ("a", "b"))
