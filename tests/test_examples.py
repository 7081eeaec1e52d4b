"""The scripts in `examples/`: on shapes as a user runs them, on a user's own rows, up to the Hub's door."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from own_data import write_albef, write_karpathy, write_lines, write_photos, write_refer
from transformers import AutoModel, AutoProcessor, BertConfig, BertForMaskedLM, SwinModel

from hf_vlp import ALBEFForPreTraining, LXMERTForPreTraining, SOHOForPreTraining
from hf_vlp.data.features import RegionWriter
from hf_vlp.data.shapes import shapes_dataset, vocabulary
from hf_vlp.models.hub import SharedOnHub
from hf_vlp.quickstart import tiny_config, tiny_processor

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW_STEPS = ["--max_steps", "2", "--warmup_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu"]
FEW_STEPS += ["--disable_tqdm", "true"]
ALBEF_SCRIPTS = {  # head, its rows of shapes and of ALBEF's lists, and the printed baseline
    "finetune_question_answering": ("ALBEFForQuestionAnswering", "questions", "vqa_train", "the same type"),
    "finetune_reasoning": ("ALBEFForVisualReasoning", "pairs", "nlvr_train", "always the same label"),
    "finetune_entailment": ("ALBEFForVisualEntailment", "entailment", "ve_train", "always the same label"),
}
SCRIPTS = {"pretrain": "XVLMForPreTraining", "finetune_retrieval": "XVLMForRetrieval"}
SCRIPTS |= {"pretrain_albef": "ALBEFForPreTraining", "finetune_weak_grounding": "ALBEFForGrounding"}
SCRIPTS |= {"pretrain_lxmert": "LXMERTForPreTraining", "finetune_lxmert": "LXMERTForQuestionAnswering"}
SCRIPTS |= {"pretrain_soho": "SOHOForPreTraining", "finetune_soho": "SOHOForQuestionAnswering"}
SCRIPTS |= {"caption_xvlm": "XVLMForCaptioning"}
SCRIPTS |= {"finetune_grounding": "XVLMForGrounding"} | {name: row[0] for name, row in ALBEF_SCRIPTS.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run(script: str, *arguments) -> str:
    """What the script prints, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same without a process, in less time."""

    def run(script: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    assert "R@10 by similarity" in run("pretrain", *FEW_STEPS, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def pretrained_albef(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("albef")
    model, processor = runpy.run_path(str(EXAMPLES / "small_albef.py"))["tiny_albef"](ALBEFForPreTraining)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained_lxmert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lxmert")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        model, processor = runpy.run_path(str(EXAMPLES / "small_lxmert.py"))["tiny_lxmert"](
            LXMERTForPreTraining
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained_soho(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("soho")
    for part in runpy.run_path(str(EXAMPLES / "small_soho.py"))["tiny_soho"](SOHOForPreTraining):
        part.save_pretrained(folder)
    return folder


def is_saved(folder: Path, class_name: str) -> bool:
    processor = AutoProcessor.from_pretrained(folder)
    processor(text="the red circle")
    return type(AutoModel.from_pretrained(folder)).__name__ == class_name


def test_pretrain_saves_what_auto_classes_read(pretrained):
    assert is_saved(pretrained, "XVLMForPreTraining")


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("finetune_retrieval", "R@10 re-ranked"),
        ("finetune_grounding", "random object"),
        ("caption_xvlm", "all objects right"),
    ],
)
def test_fine_tuning_on_shapes(script, printed, pretrained, tmp_path):
    output = run(script, *FEW_STEPS, "--output_dir", tmp_path, "--model", pretrained)
    assert printed in output
    assert is_saved(tmp_path, SCRIPTS[script])


@pytest.mark.parametrize(
    "script",
    ["finetune_retrieval", "finetune_grounding", "finetune_weak_grounding", "caption_xvlm", *ALBEF_SCRIPTS],
)
def test_fine_tuning_from_nothing(script, run_here, tmp_path):
    output = run_here(script, *FEW_STEPS, "--output_dir", tmp_path)
    assert is_saved(tmp_path, SCRIPTS[script])
    if script in ALBEF_SCRIPTS:
        assert ALBEF_SCRIPTS[script][3] in output


@pytest.mark.parametrize("script", ALBEF_SCRIPTS)
def test_xvlm_by_the_examples_of_albef(script, run_here, pretrained, tmp_path):
    output = run_here(script, *FEW_STEPS, "--output_dir", tmp_path, "--model", pretrained)
    assert ALBEF_SCRIPTS[script][3] in output
    assert is_saved(tmp_path, ALBEF_SCRIPTS[script][0].replace("ALBEF", "XVLM"))


def test_albef_from_its_pretraining_to_pointing(run_here, tmp_path):
    output = run_here("pretrain_albef", *FEW_STEPS, "--output_dir", tmp_path / "pretrained")
    assert "R@10 re-ranked" in output and "foils that differ in one word" in output
    assert is_saved(tmp_path / "pretrained", "ALBEFForPreTraining")
    options = ["--model", tmp_path / "pretrained", "--output_dir", tmp_path / "grounding"]
    assert "hottest of the boxes" in run_here("finetune_weak_grounding", *FEW_STEPS, *options)
    assert is_saved(tmp_path / "grounding", "ALBEFForGrounding")


def test_albef_as_a_user_runs_it(pretrained_albef, tmp_path):
    """In a process of its own, which finds what the examples share."""
    options = ["--output_dir", tmp_path, "--model", pretrained_albef]
    run("finetune_entailment", *FEW_STEPS, *options)
    assert is_saved(tmp_path, "ALBEFForVisualEntailment")


def test_lxmert_from_its_pretraining_to_a_photograph(run_here, tmp_path):
    output = run_here("pretrain_lxmert", *FEW_STEPS, "--output_dir", tmp_path / "pretrained")
    assert "R@10 in a random order" in output and "foils that differ in one word" in output
    assert is_saved(tmp_path / "pretrained", "LXMERTForPreTraining")
    options = ["--model", tmp_path / "pretrained", "--output_dir", tmp_path / "answers", "--scenes", "20"]
    output = run_here("finetune_lxmert", *FEW_STEPS, *options)
    assert "of 256 questions" in output and "is there a red circle?" in output
    assert len(re.findall(r"^  0\.\d\d \w+$", output, flags=re.M)) == 3
    assert is_saved(tmp_path / "answers", "LXMERTForQuestionAnswering")


def test_lxmert_from_nothing_as_a_user_runs_it(tmp_path):
    run("finetune_lxmert", *FEW_STEPS, "--output_dir", tmp_path, "--scenes", "20")
    assert is_saved(tmp_path, "LXMERTForQuestionAnswering")


def test_xvlm_in_another_language(run_here, tmp_path):
    output = run_here("other_language_xvlm", *FEW_STEPS, "--output_dir", tmp_path)
    assert "▁grün es ▁Dreieck" in output and "R@1 in a random order: 0.004" in output
    assert is_saved(tmp_path, "XVLMForPreTraining")


def test_soho_from_its_pretraining_to_answers(run_here, tmp_path):
    output = run_here("pretrain_soho", *FEW_STEPS, "--output_dir", tmp_path / "pretrained")
    used = float(re.search(r"entries in use, in 256 images: ([01]\.\d{3})", output)[1])
    assert 0 < used <= 1 and "foils that differ in one word" in output
    assert len(list((tmp_path / "pretrained").glob("dictionary_*.png"))) == 3
    assert is_saved(tmp_path / "pretrained", "SOHOForPreTraining")
    options = ["--model", tmp_path / "pretrained", "--output_dir", tmp_path / "answers"]
    assert "of 256 questions" in run_here("finetune_soho", *FEW_STEPS, *options)
    assert is_saved(tmp_path / "answers", "SOHOForQuestionAnswering")


def test_soho_from_nothing_as_a_user_runs_it(tmp_path):
    run("finetune_soho", *FEW_STEPS, "--output_dir", tmp_path)
    assert is_saved(tmp_path, "SOHOForQuestionAnswering")


@pytest.mark.parametrize("script", ["pretrain_soho", "finetune_soho"])
def test_soho_on_official_files(script, pretrained_soho, run_here, tmp_path):
    images = [
        {"file_name": f"{number}.png", "image_id": number, "width": 64, "height": 64} for number in range(8)
    ]
    for image, row in zip(images, shapes_dataset("captions", "train", 8, image_size=64), strict=True):
        row["image"].save(tmp_path / image["file_name"])
        image["captions"] = [row["caption"]] * 4
        asked = {"question": "is there a circle", "labels": [0], "scores": [1.0]}
        image["vqa"] = [asked | {"question_id": image["image_id"]}]
    content = images if script == "pretrain_soho" else {"data": images, "label2ans": ["yes", "no"]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    options = [*own_options(tmp_path, pretrained_soho), "--train", tmp_path / "list.json"]
    options += ["--group_by_orientation", "False"]
    run_here(script, *options)
    assert is_saved(tmp_path / "out", SCRIPTS[script])


def test_predict(pretrained, tmp_path):
    output = run("predict", "--model", pretrained, "--out", tmp_path / "boxes.png")
    assert output.count(" matches: ") == 2 and "left, top, right, bottom: a " in output
    assert (tmp_path / "boxes.png").is_file()


def test_predict_on_an_image_of_mine(pretrained, run_here, tmp_path):
    shapes_dataset("captions", "test", 1)[0]["image"].save(tmp_path / "scene.png")
    options = [
        "--image",
        tmp_path / "scene.png",
        "--text",
        "a red circle top left",
        "--out",
        tmp_path / "b.png",
    ]
    output = run_here("predict", "--model", pretrained, *options)
    assert "matches: a red circle top left" in output and "left, top" not in output


def test_predict_without_a_model_says_how_to_get_one(run_here, capsys):
    with pytest.raises(SystemExit):
        run_here("predict")
    assert "hf-vlp quickstart" in capsys.readouterr().err


# A user's own data


@pytest.fixture
def official_files(tmp_path) -> Path:
    write_photos(tmp_path)
    write_lines(tmp_path / "images.json", tmp_path / "regions.json")
    write_karpathy(tmp_path / "train.json", tmp_path / "test.json")
    write_refer(tmp_path / "refs(unc).p", tmp_path / "instances.json")
    return tmp_path


def own_options(folder: Path, pretrained: Path) -> list:
    return [*FEW_STEPS, "--model", pretrained, "--image-root", folder, "--output_dir", folder / "out"]


def test_pretrain_on_official_files(official_files, pretrained, run_here):
    files = ["--images", official_files / "images.json", "--regions", official_files / "regions.json"]
    run_here("pretrain", *files, *own_options(official_files, pretrained))
    assert is_saved(official_files / "out", "XVLMForPreTraining")


def test_retrieval_on_official_files(official_files, pretrained, run_here):
    files = ["--train", official_files / "train.json", "--test", official_files / "test.json"]
    output = run_here("finetune_retrieval", *files, *own_options(official_files, pretrained))
    assert "R@10 of images in a random order: 0.833" in output


def test_grounding_on_official_files(official_files, pretrained, run_here):
    files = ["--refs", official_files / "refs(unc).p", "--instances", official_files / "instances.json"]
    options = [*own_options(official_files, pretrained), "--image-size", "96"]
    assert " of 4 texts" in run_here("finetune_grounding", *files, *options)
    processor = AutoProcessor.from_pretrained(official_files / "out")
    assert processor.image_processor.size["height"] == 96


@pytest.mark.parametrize("critical", [[], ["--self-critical"]])
def test_captions_on_official_files(critical, official_files, pretrained, run_here):
    captions = shapes_dataset("captions", "train", 8)["caption"]
    images = [
        {
            "filename": f"{i}.png",
            "imgid": i,
            "split": ["train", "test"][i % 2],
            "sentences": [{"raw": text}] * 2,
        }
        for i, text in enumerate(captions)
    ]
    file = official_files / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    options = [*own_options(official_files, pretrained), "--train", file, "--test", file, *critical]
    output = run_here("caption_xvlm", *options)
    assert "of 4 images" in output and "most frequent caption" in output
    assert is_saved(official_files / "out", "XVLMForCaptioning")


def test_albef_pretraining_on_official_files(pretrained_albef, run_here, tmp_path):
    write_photos(tmp_path)
    write_albef(tmp_path / "albef", tmp_path)
    options = own_options(tmp_path, pretrained_albef)
    run_here("pretrain_albef", *options, "--train", tmp_path / "albef" / "coco.json")
    assert is_saved(tmp_path / "out", "ALBEFForPreTraining")


def test_weak_grounding_on_official_files(official_files, pretrained_albef, run_here):
    files = ["--refs", official_files / "refs(unc).p", "--instances", official_files / "instances.json"]
    output = run_here("finetune_weak_grounding", *files, *own_options(official_files, pretrained_albef))
    assert "of 4 texts" in output and is_saved(official_files / "out", "ALBEFForGrounding")


@pytest.fixture
def coco_regions(tmp_path) -> Path:
    with RegionWriter(tmp_path / "regions") as writer:
        for number, row in enumerate(shapes_dataset("captions", "train", 4, regions=True)):
            writer.write(f"COCO_{number}", row["regions"])
    return tmp_path / "regions"


def test_lxmert_pretraining_on_official_files(coco_regions, pretrained_lxmert, run_here, tmp_path):
    entries = [
        {"img_id": f"COCO_{number}", "sentf": {"mscoco": ["a red circle"], "vqa": ["how many shapes"]},
         "labelf": {"vqa": [{"Two": 1.0}]}}
        for number in range(4)
    ]  # fmt: skip
    (tmp_path / "sentences.json").write_text(json.dumps(entries))
    options = ["--train", tmp_path / "sentences.json", "--features", coco_regions]
    options += [*FEW_STEPS, "--output_dir", tmp_path / "out"]
    run_here("pretrain_lxmert", "--model", pretrained_lxmert, *options)
    assert is_saved(tmp_path / "out", "LXMERTForPreTraining")


def test_lxmert_answers_on_official_files(coco_regions, pretrained_lxmert, run_here, tmp_path):
    entries = [
        {"img_id": f"COCO_{number}", "question_id": number, "sent": "how many circles are there?",
         "label": {"two": 1.0, "three": 0.3}, "answer_type": "number", "question_type": "how many"}
        for number in range(4)
    ]  # fmt: skip
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    (tmp_path / "answers.json").write_text(json.dumps(["two", "three", "four"]))
    rows = ["--train", tmp_path / "questions.json", "--test", tmp_path / "questions.json"]
    options = [*rows, "--features", coco_regions, "--answers", tmp_path / "answers.json"]
    options += [*FEW_STEPS, "--model", pretrained_lxmert, "--output_dir", tmp_path / "out"]
    output = run_here("finetune_lxmert", *options)
    assert "known from pre-training: 2 of 3 answers, without 'four'" in output and "of 4 questions" in output
    assert AutoModel.from_pretrained(tmp_path / "out").config.answers == ["two", "three", "four"]


@pytest.mark.parametrize("script", ["pretrain_lxmert", "finetune_lxmert"])
def test_lxmert_rows_need_regions(script, run_here, capsys, pretrained_lxmert):
    with pytest.raises(SystemExit):
        run_here(script, "--train", "x", "--model", pretrained_lxmert)
    assert "--features" in capsys.readouterr().err


@pytest.mark.parametrize("script", ALBEF_SCRIPTS)
def test_albef_on_official_files(script, pretrained_albef, run_here, tmp_path):
    head, _, name, baseline = ALBEF_SCRIPTS[script]
    write_albef(tmp_path / "albef", tmp_path)
    rows = tmp_path / "albef" / f"{name}.json"
    options = [
        *own_options(tmp_path, pretrained_albef),
        "--train",
        rows,
        "--test",
        rows,
        "--image-size",
        "32",
    ]
    output = run_here(script, *options)
    assert " of 12 " in output and baseline in output
    assert is_saved(tmp_path / "out", head)
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size["height"] == 32
    assert not AutoModel.from_pretrained(tmp_path / "out").config.momentum_teacher


@pytest.mark.parametrize("script", ALBEF_SCRIPTS)
def test_albef_on_rows_of_a_user(script, pretrained_albef, run_here, tmp_path):
    task = ALBEF_SCRIPTS[script][1]
    rows = datasets.Dataset.from_list(list(shapes_dataset(task, "train", 8)))
    rows.save_to_disk(tmp_path / "rows")
    rows.to_parquet(tmp_path / "rows.parquet")
    options = [*own_options(tmp_path, pretrained_albef), "--train", tmp_path / "rows", tmp_path / "rows"]
    assert " of 8 " in run_here(script, *options, "--test", tmp_path / "rows.parquet")


def test_answers_for_the_server(pretrained_albef, run_here, tmp_path):
    """Rows of a test set have no answers; those to choose from are given, and saved with the model."""
    write_albef(tmp_path / "albef", tmp_path)
    lists, options = tmp_path / "albef", own_options(tmp_path, pretrained_albef)
    entries = json.loads((lists / "vqa_train.json").read_text())
    for entry in entries:
        del entry["answer"]
    (lists / "vqa_test.json").write_text(json.dumps(entries))
    options += ["--train", lists / "vqa_train.json", "--test", lists / "vqa_test.json"]
    options += ["--answers", lists / "answer_list.json"]
    run_here("finetune_question_answering", *options)
    answered = json.loads((tmp_path / "out" / "evalai.json").read_text())
    assert [row["question_id"] for row in answered] == [entry["question_id"] for entry in entries]
    answer_list = json.loads((tmp_path / "out" / "answer_list.json").read_text())
    assert answer_list == json.loads((lists / "answer_list.json").read_text())
    assert {row["answer"] for row in answered} <= set(answer_list)


def rows_of_files(task: str, columns: list[str]) -> datasets.Dataset:
    """Rows of a task as a user has them: plain columns, images as files."""
    rows = [{name: row[name] for name in columns} for row in shapes_dataset(task, "train", 8)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_rows_of_a_saved_dataset(pretrained, run_here, tmp_path):
    rows = rows_of_files("grounding", ["image", "text", "box"])
    rows.save_to_disk(tmp_path / "rows")
    options = [*FEW_STEPS, "--model", pretrained, "--output_dir", tmp_path / "out"]
    options += ["--train", tmp_path / "rows", "--test", tmp_path / "rows"]
    assert " of 8 texts" in run_here("finetune_grounding", *options)


def test_rows_of_parquet_files(pretrained, run_here, tmp_path):
    rows_of_files("captions", ["image", "caption"]).to_parquet(tmp_path / "images.parquet")
    rows_of_files("regions", ["image", "phrases", "boxes"]).to_parquet(tmp_path / "regions.parquet")
    options = [*FEW_STEPS, "--model", pretrained, "--output_dir", tmp_path / "out"]
    options += ["--images", tmp_path / "images.parquet", "--regions", tmp_path / "regions.parquet"]
    run_here("pretrain", *options)
    assert is_saved(tmp_path / "out", "XVLMForPreTraining")


def test_pretrain_starts_from_public_backbones(official_files, run_here):
    processor = tiny_processor(vocabulary(), image_size=48)
    SwinModel(tiny_config(processor).vision_config).save_pretrained(official_files / "swin")
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 12}
    bert = BertConfig(vocab_size=len(processor.tokenizer), **size)
    BertForMaskedLM(bert).save_pretrained(official_files / "bert")
    processor.tokenizer.save_pretrained(official_files / "bert")
    options = [*FEW_STEPS, "--image-root", official_files, "--output_dir", official_files / "out"]
    options += ["--vision", official_files / "swin", "--text", official_files / "bert"]
    options += ["--images", official_files / "images.json", "--regions", official_files / "regions.json"]
    run_here("pretrain", *options)
    assert is_saved(official_files / "out", "XVLMForPreTraining")


@pytest.mark.parametrize("script", SCRIPTS)
def test_own_rows_need_a_model(script, run_here, capsys):
    rows = ["--images", "x", "--regions", "x"] if script == "pretrain" else ["--train", "x"]
    with pytest.raises(SystemExit):
        run_here(script, *rows)
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_push_to_hub(
    script, run_here, monkeypatch, pretrained, pretrained_albef, pretrained_lxmert, pretrained_soho, tmp_path
):
    paper, pushed = SCRIPTS[script].split("For")[0], []
    start = {"XVLM": pretrained, "ALBEF": pretrained_albef, "LXMERT": pretrained_lxmert}
    start = (start | {"SOHO": pretrained_soho})[paper]
    monkeypatch.setattr(
        SharedOnHub, "push_to_hub", lambda self, name: pushed.append((type(self).__name__, name))
    )
    options = [*FEW_STEPS, "--model", start, "--output_dir", tmp_path, "--push-to-hub", "me/model"]
    run_here(script, *options, *(["--scenes", "20"] if script == "finetune_lxmert" else []))
    assert pushed == [(SCRIPTS[script], "me/model"), (f"{paper}Processor", "me/model")]
