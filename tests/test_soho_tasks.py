"""SOHO in every protocol, prediction and command, however batched, and official files as folders."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from data_fixtures import picture
from heads import LXMERT_ANSWERS, SOHO, make_head, save_heads
from parity_cases import read_official
from task_rows import IMAGES, TEXTS, as_line, loud, rounded, rows_of, run
from tiny import tiny_soho_processor, tiny_tokenizer
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

import hf_vlp.conversion.soho
from hf_vlp import (
    SOHOForGrounding,
    SOHOForPreTraining,
    SOHOForQuestionAnswering,
    SOHOForRetrieval,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
    SOHOModel,
    predict,
)
from hf_vlp.cli import app
from hf_vlp.commands.train import _rows_and_collator
from hf_vlp.conversion.keys import KeyReport
from hf_vlp.conversion.soho import convert_checkpoint, convert_state_dict
from hf_vlp.evaluation import (
    evaluate_entailment,
    evaluate_foils,
    evaluate_grounding,
    evaluate_question_answering,
    evaluate_reasoning,
    evaluate_retrieval,
)
from hf_vlp.heads import load_head
from hf_vlp.models.processing_soho import SOHOProcessor

PROTOCOLS = {
    "vqa": (evaluate_question_answering, SOHOForQuestionAnswering, ("probabilities", "indices")),
    "reasoning": (evaluate_reasoning, SOHOForVisualReasoning, ("logits",)),
    "entailment": (evaluate_entailment, SOHOForVisualEntailment, ("logits",)),
    "grounding": (evaluate_grounding, SOHOForGrounding, ("boxes",)),
    "retrieval": (evaluate_retrieval, SOHOForRetrieval, ("image_to_text", "text_to_image")),
    "foils": (evaluate_foils, SOHOForRetrieval, ("caption_scores", "foil_scores")),
}
TASKS = [task for task in PROTOCOLS if task != "foils"]


@pytest.fixture
def processor() -> SOHOProcessor:
    return tiny_soho_processor()


# Protocols


@pytest.mark.parametrize("task", PROTOCOLS)
def test_batches_agree(task, processor):
    protocol, head, tensors = PROTOCOLS[task]
    model, rows = loud(head), rows_of(task)
    together = protocol(model, processor, rows, batch_size=5)
    alone = protocol(model, processor, iter(rows), batch_size=1)
    for name in tensors:
        expected = vars(together)[name]
        assert expected.dtype == torch.int64 or expected.std(dim=0).max() > 1e-3, "rows differ"
        assert not expected.is_inference() and expected.device.type == "cpu"
        torch.testing.assert_close(vars(alone)[name], expected, atol=1e-4, rtol=1e-4)
    assert not model.training


@pytest.mark.parametrize("task", ["vqa", "entailment", "grounding"])
def test_equal_images_are_encoded_once(task, processor, monkeypatch):
    protocol, head, _ = PROTOCOLS[task]
    seen, encode = [], SOHOModel.get_image_features
    monkeypatch.setattr(
        SOHOModel, "get_image_features", lambda self, x, *rest: seen.append(len(x)) or encode(self, x, *rest)
    )
    protocol(loud(head), processor, rows_of(task))
    assert seen == [4]


def test_retrieval_scores_every_pair_of_images_of_any_size(processor):
    """Blocks of images, each with a canvas of its own."""
    model = loud(SOHOForRetrieval)
    images = [picture(0, 60, 50), picture(1, 50, 60), picture(2, 90, 50)]
    rows = [{"image": image, "caption": TEXTS[i:]} for i, image in enumerate(images)]
    result = evaluate_retrieval(model, processor, rows, top_k=1, batch_size=1)
    assert result.itc_scores is None and result.itc_metrics is None
    texts = [text for row in rows for text in row["caption"]]
    assert result.image_to_text.shape == (3, len(texts))
    for i, image in enumerate(images):
        for t, text in enumerate(texts):
            with torch.no_grad():
                batch = processor(images=[image], text=[text])
                seen = model.get_image_features(batch["pixel_values"], batch["pixel_mask"])
                expected = model.match(batch["input_ids"], None, seen).softmax(1)[0, 1].item()
            assert result.image_to_text[i, t].sigmoid().item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(result.text_to_image, result.image_to_text.T)
    pairs = predict("retrieval", model, processor, images, texts, batch_size=1)
    probabilities = torch.tensor([pair["probability"] for pair in pairs]).view(3, -1)
    torch.testing.assert_close(probabilities, result.image_to_text.sigmoid(), atol=1e-5, rtol=0)


def test_questions_are_answered_from_the_config(processor):
    model, rows = loud(SOHOForQuestionAnswering), rows_of("vqa")
    result = evaluate_question_answering(model, processor, rows)
    assert result.answers == [LXMERT_ANSWERS[best] for best in result.indices[:, 0].tolist()]
    named = evaluate_question_answering(model, processor, rows, LXMERT_ANSWERS, top_k=2)
    assert named.answers == result.answers and named.indices.shape == (7, 2)
    with pytest.raises(ValueError, match="answer_list is a list of 5, .* 6 answers.* leave it at None"):
        evaluate_question_answering(model, processor, rows, LXMERT_ANSWERS[:5])
    model.config.answers = None
    assert evaluate_question_answering(model, processor, rows, LXMERT_ANSWERS).answers == result.answers
    with pytest.raises(ValueError, match="answer_list is None, .* give their strings"):
        evaluate_question_answering(model, processor, rows)


# Predictions


@pytest.mark.parametrize(
    ("task", "images", "keys"),
    [
        ("vqa", 2, {"image", "text", "answers"}),
        ("retrieval", 3, {"image", "text", "probability", "text_rank", "image_rank"}),
        ("grounding", 2, {"image", "text", "box"}),
        ("entailment", 2, {"image", "text", "label", "probabilities"}),
        ("reasoning", 4, {"images", "text", "label", "probabilities"}),
    ],
)
def test_predictions(task, images, keys, processor):
    model, pictures = loud(PROTOCOLS[task][1]), [*IMAGES[: images - 1], IMAGES[0]]
    rows = predict(task, model, processor, pictures, TEXTS[:2])
    assert len(rows) == (6 if task == "retrieval" else 2) and all(set(row) == keys for row in rows)
    alone = predict(task, model, processor, pictures, TEXTS[:2], batch_size=1)
    assert json.dumps(rounded(rows)) == json.dumps(rounded(alone))


def test_answers_are_each_likely_by_themselves(processor):
    model = loud(SOHOForQuestionAnswering)
    (row,) = predict("vqa", model, processor, IMAGES[:1], TEXTS[:1], top_k=6)
    with torch.no_grad():
        expected = model(**processor(images=IMAGES[:1], text=TEXTS[:1])).logits.sigmoid()[0]
    assert len(row["answers"]) == 6
    for answer in row["answers"]:
        place = LXMERT_ANSWERS.index(answer["answer"])
        assert answer["probability"] == pytest.approx(expected[place].item(), abs=1e-5)


# Commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Heads, images, and rows of each task."""
    folder = save_heads(tmp_path_factory.mktemp("soho"), *SOHO)
    for i, image in enumerate(IMAGES):
        image.save(folder / f"{i}.png")
    for task in (*PROTOCOLS, "pretrain"):
        rows = rows_of("retrieval" if task == "pretrain" else task)
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(as_line(row)) for row in rows))
    (folder / "answers.json").write_text(json.dumps(["red", "green", "two", "yes"]))
    nameless = SOHOForPreTraining.from_pretrained(folder / "SOHOForPreTraining")
    nameless.config.answers = None
    nameless.save_pretrained(folder / "nameless")
    tiny_soho_processor().save_pretrained(folder / "nameless")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


@pytest.mark.parametrize("task", TASKS)
def test_predict(task, folder, tmp_path):
    model = folder / PROTOCOLS[task][1].__name__
    images = [folder / "0.png", folder / "1.png"]
    arguments = ["predict", "--task", task, model, *images, "--text", "a red circle"]
    assert len(json.loads(run(*arguments))) == (1 if task == "reasoning" else 2)
    if task == "grounding":
        run(*arguments, "--out", tmp_path / "boxes.png")
        assert (tmp_path / "boxes.png").is_file()


@pytest.mark.parametrize("task", PROTOCOLS)
def test_evaluate(task, folder, processor):
    protocol, head, _ = PROTOCOLS[task]
    scores = json.loads(run("evaluate", task, folder / head.__name__, folder / f"{task}.jsonl"))
    assert scores["rows"] == 7 and set(scores["baseline"]) <= set(scores["metrics"])
    assert not any(name.startswith("itc_") for name in scores["metrics"])
    result = protocol(head.from_pretrained(folder / head.__name__), processor, rows_of(task))
    name = "r_mean" if task == "retrieval" else "accuracy"
    expected = result.metrics[name] if task == "retrieval" else result.accuracy
    assert scores["metrics"][name] == pytest.approx(expected)


def train(task, model, data, out, *options) -> str:
    arguments = ["train", task, model, data, "--out", out, "--set", "use_cpu=true", "--batch-size", 4]
    return run(*arguments, "--learning-rate", 0.01, "--steps", 1, *options)


@pytest.mark.parametrize("task", [*TASKS, "pretrain"])
def test_train(task, folder, tmp_path):
    model = folder / "SOHOForPreTraining"
    assert f"saved to {tmp_path / 'out'}" in train(task, model, folder / f"{task}.jsonl", tmp_path / "out")
    trained, before = load_head(task, str(tmp_path / "out")), SOHOForPreTraining.from_pretrained(model)
    word = "model.text_embeddings.word_embeddings.weight"
    assert not torch.equal(trained.state_dict()[word], before.state_dict()[word])
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "out"), SOHOProcessor)


@pytest.mark.parametrize("name", ["nameless", "SOHOForQuestionAnswering"])
def test_train_chooses_among_given_answers(name, folder, tmp_path):
    data, options = folder / "vqa.jsonl", ("--answers", folder / "answers.json")
    said = train("vqa", folder / name, data, tmp_path / "out", *options)
    assert f"the model knows {0 if name == 'nameless' else 3} of 4 answers" in said
    trained = load_head("vqa", str(tmp_path / "out"))
    assert trained.config.answers == ["red", "green", "two", "yes"]
    assert trained.answer_head.out_proj.out_features == 4
    (row,) = json.loads(run("predict", "--task", "vqa", tmp_path / "out", folder / "0.png", "--text", "a"))
    assert {answer["answer"] for answer in row["answers"]} == {"red", "green", "two", "yes"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "vqa", "nameless", "vqa.jsonl"], "answers is None"),
        (["train", "entailment", "nameless", "entailment.jsonl", "--answers", "x"], "answers is x"),
        (["train", "retrieval", "nameless", "retrieval.jsonl", "--image-size", "64"], "any size"),
        (["train", "retrieval", "nameless", "retrieval.jsonl", "--features", "x"], "reads images"),
        (["train", "assignment", "nameless", "retrieval.jsonl"], "no head for assignment"),
        (["evaluate", "entailment", "nameless", "entailment.jsonl"], "trained first"),
    ],
)
def test_refused(arguments, word, folder, monkeypatch):
    monkeypatch.chdir(folder)
    out = ["--out", "out"] if arguments[0] == "train" else []
    assert word in refused(*arguments, *out)


@pytest.mark.parametrize("task", ["reasoning", "entailment", "retrieval", "grounding"])
def test_images_stay_as_they_are(task, folder):
    """As the official code has it: no crop, no mirror, no colours."""
    model, processor = make_head(PROTOCOLS[task][1])
    data = str(folder / f"{task}.jsonl")
    rows, collator = _rows_and_collator(task, model, processor, data, "train", True)
    batch = collator([rows[0], rows[1]])
    images = [IMAGES[0], IMAGES[1], IMAGES[1], IMAGES[2]] if task == "reasoning" else IMAGES[:2]
    assert torch.equal(
        batch["pixel_values"].reshape(-1, 3, 128, 128), processor(images=images)["pixel_values"]
    )
    assert batch["pixel_mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("task", "ready"),
    [("retrieval", True), ("vqa", False), ("grounding", False), ("entailment", False), ("reasoning", False)],
)
def test_what_pretraining_prepares(task, ready, folder):
    saved = folder / "SOHOForPreTraining"
    if ready:
        stored = SOHOForPreTraining.from_pretrained(saved).state_dict()
        assert all(
            torch.equal(value, stored[name]) for name, value in load_head(task, saved).state_dict().items()
        )
    else:
        with pytest.raises(ValueError, match="trained first"):
            load_head(task, saved)


# Conversion


@pytest.fixture
def official(request, tmp_path):
    """An official file, its weights, and the number of attention heads that tensors do not tell."""

    def write(name: str) -> tuple[Path, dict[str, torch.Tensor], int]:
        state, heads = read_official(Path(request.config.getoption("--parity-dir")) / f"soho_{name}")
        file = tmp_path / "official.pth"
        prefixed = {f"module.{key}": value for key, value in state.items()}
        torch.save({"state_dict": prefixed, "meta": {"epoch": 40}}, file)
        return file, state, heads

    return write


@pytest.mark.parametrize("name", ["pretrain_gate", "pretrain_add", "vqa"])
def test_file_to_folder(official, name, tmp_path):
    file, state, heads = official(name)
    answers = None
    if name == "vqa":
        answers = [f"answer {i}" for i in range(len(state["head.vqa.3.bias"]))]
    report = convert_checkpoint(file, tmp_path / "out", tiny_tokenizer(), heads, answers)
    assert set(report.used) == set(state) and not report.dropped and not report.missing
    assert str(report) == f"{len(state)} keys used, 0 dropped, 0 missing"
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model) is (SOHOForQuestionAnswering if name == "vqa" else SOHOForPreTraining)
    assert model.config.answers == answers
    assert model.config.visual_fusion == {"pretrain_gate": "gate", "pretrain_add": "add", "vqa": "none"}[name]
    weights = model.state_dict()
    expected = convert_state_dict(state, heads).model.state_dict()
    assert weights.keys() == expected.keys() and all(map(torch.equal, weights.values(), expected.values()))
    for key, (target,) in report.used.items():  # nothing is lost or moved on the way
        assert torch.equal(weights[target], state[key].reshape(weights[target].shape)), key
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, SOHOProcessor)
    if name == "vqa":
        processor.image_processor.size = tiny_soho_processor().image_processor.size
        (row,) = predict("vqa", model, processor, IMAGES[:1], TEXTS[:1], top_k=1)
        assert row["answers"][0]["answer"] in answers


@pytest.mark.parametrize(
    ("name", "answers", "match"),
    [("pretrain_gate", ["yes"], "among no answers"), ("vqa", ["yes"], "answers holds 1 strings")],
)
def test_answers_that_do_not_fit(official, name, answers, match, tmp_path):
    file, _, heads = official(name)
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(file, tmp_path / "out", tiny_tokenizer(), heads, answers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("annotations", [["yes", "no"], {"data": [], "label2ans": ["yes", "no"]}])
def test_convert_hands_its_arguments_on(annotations, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        hf_vlp.conversion.soho,
        "convert_checkpoint",
        lambda *args, **kwargs: calls.append((args, kwargs)) or KeyReport(),
    )
    (tmp_path / "vqa.json").write_text(json.dumps(annotations))
    options = ["--answers", tmp_path / "vqa.json", "--num-attention-heads", 4, "--tokenizer", "some/folder"]
    run("convert", "soho", "in.pth", "out", *options)
    ((args, kwargs),) = calls
    assert [str(value) for value in args] == ["in.pth", "out"]
    assert kwargs == {"answers": ["yes", "no"], "num_attention_heads": 4, "tokenizer": "some/folder"}


def test_convert_prints_the_report(official, tmp_path):
    file, state, heads = official("pretrain_gate")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", tmp_path / "tokenizer", "--num-attention-heads", heads]
    said = run("convert", "soho", file, tmp_path / "out", *options)
    assert f"{len(state)} keys used, 0 dropped, 0 missing" in said and "written to" in said
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out"), SOHOForPreTraining)
