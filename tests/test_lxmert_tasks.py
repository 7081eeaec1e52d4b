"""LXMERT in every protocol, prediction and command: images and their regions agree, however batched."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from heads import LXMERT, LXMERT_ANSWERS, LXMERT_FEATURES, make_head, save_heads
from hypothesis import given, settings
from hypothesis import strategies as st
from task_rows import IMAGES, TEXTS, as_line, loud, rounded, rows_of, run
from tiny import region_rows, tiny_lxmert_processor
from tiny_extractors import save_trunk

import hf_vlp.conversion.butd
import hf_vlp.conversion.lxmert
from hf_vlp import (
    LXMERTForGrounding,
    LXMERTForPreTraining,
    LXMERTForQuestionAnswering,
    LXMERTForRetrieval,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
    LXMERTModel,
    XVLMForGrounding,
    predict,
)
from hf_vlp.cli import main
from hf_vlp.commands.rows import read_model_rows
from hf_vlp.commands.train import _rows_and_collator
from hf_vlp.conversion.keys import KeyReport
from hf_vlp.evaluation import (
    evaluate_entailment,
    evaluate_foils,
    evaluate_grounding,
    evaluate_question_answering,
    evaluate_reasoning,
    evaluate_retrieval,
    majority_answer_accuracy,
)
from hf_vlp.evaluation.inference import visual_inputs
from hf_vlp.heads import load_head
from hf_vlp.models.regions import stack_regions


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return f"grid:{save_trunk('vit', tmp_path_factory.mktemp('trunk') / 'vit')}#2"


@pytest.fixture(scope="module")
def processor(spec):
    return tiny_lxmert_processor(spec)


def with_regions(rows: list[dict], processor) -> list[dict]:
    """What an extractor finds, in place of the images."""

    def found(image) -> dict:
        return processor.extract([image]).row(0)

    return [
        {name: value for name, value in row.items() if name not in ("image", "images")}
        | {"regions": found(row["image"]) if "image" in row else [found(image) for image in row["images"]]}
        for row in rows
    ]


PROTOCOLS: dict[str, tuple[Callable, type, tuple[str, ...]]] = {
    "vqa": (evaluate_question_answering, LXMERTForQuestionAnswering, ("probabilities", "indices")),
    "reasoning": (evaluate_reasoning, LXMERTForVisualReasoning, ("logits",)),
    "entailment": (evaluate_entailment, LXMERTForVisualEntailment, ("logits",)),
    "grounding": (evaluate_grounding, LXMERTForGrounding, ("boxes",)),
    "retrieval": (evaluate_retrieval, LXMERTForRetrieval, ("image_to_text", "text_to_image")),
    "foils": (evaluate_foils, LXMERTForRetrieval, ("caption_scores", "foil_scores")),
}

# Protocols


@pytest.mark.parametrize("task", PROTOCOLS)
def test_images_regions_and_batches_agree(task, processor):
    protocol, head, tensors = PROTOCOLS[task]
    model, rows = loud(head), rows_of(task)
    of_images = protocol(model, processor, rows, batch_size=5)
    of_regions = protocol(model, tiny_lxmert_processor(), with_regions(rows, processor), batch_size=5)
    alone = protocol(model, processor, iter(rows), batch_size=1)
    for name in tensors:
        expected = vars(of_images)[name]
        assert expected.dtype == torch.int64 or expected.std(dim=0).max() > 1e-3, "rows differ"
        assert not expected.is_inference() and expected.device.type == "cpu"
        for other in (of_regions, alone):
            torch.testing.assert_close(vars(other)[name], expected, atol=1e-4, rtol=1e-4)
    assert not model.training


@pytest.mark.parametrize("task", ["vqa", "entailment", "grounding"])
def test_equal_images_are_encoded_once(task, processor, monkeypatch):
    protocol, head, _ = PROTOCOLS[task]
    seen, encode = [], LXMERTModel.get_image_features
    monkeypatch.setattr(
        LXMERTModel,
        "get_image_features",
        lambda self, x, *rest: seen.append(len(x)) or encode(self, x, *rest),
    )
    model, rows = loud(head), rows_of(task)
    protocol(model, processor, rows)
    protocol(model, processor, with_regions(rows, processor))
    assert seen == [4, 4]


def test_pairs_are_found_once(processor, monkeypatch):
    found, extract = [], type(processor).extract
    monkeypatch.setattr(
        type(processor), "extract", lambda self, images: found.append(len(images)) or extract(self, images)
    )
    evaluate_reasoning(loud(LXMERTForVisualReasoning), processor, rows_of("reasoning"))
    assert found == [4]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_every_row_gets_its_own_image(places):
    different = region_rows(4)
    visuals = [{name: value.clone() for name, value in different[place].items()} for place in places]
    model, _ = make_head(LXMERTForRetrieval)
    inputs = visual_inputs(model, tiny_lxmert_processor(), visuals)
    assert len(inputs.inputs["visual_feats"]) == len(set(places))
    expected = stack_regions(visuals)
    assert torch.equal(inputs.repeated()["visual_feats"], expected.features)
    assert torch.equal(inputs.repeated()["visual_attention_mask"].bool(), expected.mask)
    assert inputs.sizes == [(30, 40)] * len(places)


def test_retrieval_scores_every_pair(processor):
    model, rows = loud(LXMERTForRetrieval), rows_of("retrieval")[:3]
    result = evaluate_retrieval(model, processor, rows, top_k=1, batch_size=2)
    assert result.itc_scores is None and result.itc_metrics is None
    texts = [text for row in rows for text in row["caption"]]
    for i, row in enumerate(rows):
        for t, text in enumerate(texts):
            batch = processor(images=[row["image"]], text=[text])
            with torch.no_grad():
                words = model.get_text_features(batch["input_ids"]).last_hidden_state
                regions = model.get_image_features(
                    batch["visual_feats"], batch["visual_pos"]
                ).last_hidden_state
                expected = model.match(words, None, regions, None).softmax(1)[0, 1].item()
            assert result.image_to_text[i, t].sigmoid().item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(result.text_to_image, result.image_to_text.T)
    assert result.text_image.tolist() == [i for i, row in enumerate(rows) for _ in row["caption"]]
    assert 0 <= result.metrics["r_mean"] <= 1


def test_questions_are_answered_from_the_config(processor):
    model, rows = loud(LXMERTForQuestionAnswering), rows_of("vqa")
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


def test_answers_with_scores_are_scored_by_them(processor):
    model, rows = loud(LXMERTForQuestionAnswering), rows_of("vqa")
    answers = evaluate_question_answering(model, processor, rows).answers
    scores = [0.3, 0.9, 0.0, 1.0, 0.6, None, 0.0]
    for row, answer, score in zip(rows, answers, scores, strict=True):
        row |= {"answers": [answer, "maybe"], "answer_scores": [score, 1.0]}
    rows[5] |= {"answers": ["other"], "answer_scores": [1.0]}
    rows[6] |= {"answers": [], "answer_scores": []}  # none of its answers is frequent
    result = evaluate_question_answering(model, processor, rows)
    assert result.accuracy == pytest.approx((0.3 + 0.9 + 1.0 + 0.6) / 7)
    assert majority_answer_accuracy(rows, rows) == pytest.approx(5 / 7)  # "maybe"
    empty = [row | {"answers": [], "answer_scores": []} for row in rows]
    assert evaluate_question_answering(model, processor, empty).accuracy is None
    del rows[3]["answer_scores"]
    with pytest.raises(ValueError, match=r"rows\[3\] has no `answer_scores`"):
        evaluate_question_answering(model, processor, rows)


@pytest.mark.parametrize(
    ("task", "change", "match"),
    [
        ("entailment", lambda row: row.pop("image"), "`regions` or `image`"),
        ("reasoning", lambda row: row.pop("images"), "`regions` or `images`"),
        ("reasoning", lambda row: row.update(regions=[{}]), r"rows\[0\] has 1 `regions`"),
        ("entailment", lambda row: row.update(regions=region_rows(1)[0]), "to all or to none"),
    ],
)
def test_rows_that_do_not_fit(task, change, match, processor):
    protocol, head, _ = PROTOCOLS[task]
    rows = rows_of(task)
    change(rows[0])
    with pytest.raises(ValueError, match=match):
        protocol(loud(head), processor, rows)


def test_models_of_images_do_not_mind_regions():
    model, processor = make_head(XVLMForGrounding)
    rows = rows_of("grounding")
    expected = evaluate_grounding(model, processor, rows).boxes
    beside = [row | {"regions": region_rows(1)[0]} for row in rows]
    assert torch.equal(evaluate_grounding(model, processor, beside).boxes, expected)
    with pytest.raises(ValueError, match="regions are given, but XVLMProcessor reads images"):
        predict("grounding", model, processor, region_rows(1), TEXTS[:1])


# Predictions


@pytest.mark.parametrize(
    ("task", "head", "images", "keys"),
    [
        ("vqa", LXMERTForQuestionAnswering, 2, {"image", "text", "answers"}),
        ("retrieval", LXMERTForRetrieval, 3, {"image", "text", "probability", "text_rank", "image_rank"}),
        ("grounding", LXMERTForGrounding, 2, {"image", "text", "box", "region", "score"}),
        ("entailment", LXMERTForVisualEntailment, 2, {"image", "text", "label", "probabilities"}),
        ("reasoning", LXMERTForVisualReasoning, 4, {"images", "text", "label", "probabilities"}),
    ],
)
def test_predictions_of_images_and_of_their_regions(task, head, images, keys, processor):
    model, pictures = loud(head), [*IMAGES[: images - 1], IMAGES[0]]
    rows = predict(task, model, processor, pictures, TEXTS[:2])
    assert len(rows) == (6 if task == "retrieval" else 2) and all(set(row) == keys for row in rows)
    regions = processor.extract(pictures)
    visuals = [regions.row(i) for i in range(images)]
    of_regions = predict(task, model, tiny_lxmert_processor(), visuals, TEXTS[:2], batch_size=1)
    for row, other in zip(rows, of_regions, strict=True):
        flat, others = json.dumps(rounded(row)), json.dumps(rounded(other))
        assert flat == others


def test_answers_are_each_likely_by_themselves(processor):
    model = loud(LXMERTForQuestionAnswering)
    (row,) = predict("vqa", model, processor, IMAGES[:1], TEXTS[:1], top_k=6)
    with torch.no_grad():
        expected = model(**processor(images=IMAGES[:1], text=TEXTS[:1])).logits.sigmoid()[0]
    for answer in row["answers"]:
        place = LXMERT_ANSWERS.index(answer["answer"])
        assert answer["probability"] == pytest.approx(expected[place].item(), abs=1e-5)
    assert len(row["answers"]) == 6


def test_the_chosen_region_is_named(processor):
    model = loud(LXMERTForGrounding)
    with torch.no_grad():  # boxes are not moved
        model.region_head.shift.weight.zero_()
        model.region_head.shift.bias.zero_()
    rows = predict("grounding", model, processor, IMAGES[:1], TEXTS)
    boxes = processor.extract(IMAGES[:1]).boxes[0] * torch.tensor([60, 50, 60, 50])
    for row in rows:
        assert row["box"] == pytest.approx(boxes[row["region"]].tolist(), abs=1e-3)
        assert 1 / 4 <= row["score"] <= 1
    assert len({row["region"] for row in rows}) > 1
    with pytest.raises(ValueError, match="proposals"):
        predict("grounding", model, processor, IMAGES[:1], TEXTS[:1], proposals=[[[0, 0, 1, 1]]])


# Commands


@pytest.fixture
def refused(monkeypatch):
    def message(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["hf-vlp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
        return stop.value.code

    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spec) -> Path:
    """Heads, images, rows of each task, and the regions of the images as `hf-vlp extract` stores them."""
    folder = save_heads(tmp_path_factory.mktemp("lxmert"), *LXMERT)
    for i, image in enumerate(IMAGES):
        image.save(folder / f"{i}.png")
    for task in (*PROTOCOLS, "pretrain"):
        rows = rows_of("retrieval" if task == "pretrain" else task)
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(as_line(row)) for row in rows))
    (folder / "answers.json").write_text(json.dumps(["red", "green", "two", "yes"]))
    run("extract", *[folder / f"{i}.png" for i in range(4)], "--extractor", spec, "--out", folder / "regions")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("task", [task for task in PROTOCOLS if task != "foils"])
def test_predict_finds_regions(task, folder, spec, tmp_path, refused):
    model = folder / PROTOCOLS[task][1].__name__
    images = [folder / "0.png", folder / "1.png"]
    arguments = ["predict", "--task", task, model, *images, "--text", "a red circle"]
    rows = json.loads(run(*arguments, "--extractor", spec))
    assert len(rows) == (1 if task == "reasoning" else 2)
    assert "extractor is None" in refused(*arguments)
    if task == "grounding":
        run(*arguments, "--extractor", spec, "--out", tmp_path / "boxes.png")
        assert (tmp_path / "boxes.png").is_file()
    elif task == "vqa":
        assert "no heat maps to draw" in refused(*arguments, "--extractor", spec, "--out", "a.png")


@pytest.mark.parametrize("task", PROTOCOLS)
def test_evaluate_with_images_and_with_a_folder_of_regions(task, folder, spec):
    protocol, head, _ = PROTOCOLS[task]
    arguments = ["evaluate", task, folder / head.__name__, folder / f"{task}.jsonl", "--batch-size", 4]
    of_images = json.loads(run(*arguments, "--extractor", spec))
    of_regions = json.loads(run(*arguments, "--features", folder / "regions"))
    assert of_images["rows"] == 7 and set(of_images["baseline"]) <= set(of_images["metrics"])
    assert of_images["metrics"].keys() == of_regions["metrics"].keys()
    assert of_images["baseline"] == of_regions["baseline"]
    assert not any(name.startswith("itc_") for name in of_images["metrics"])
    model = load_head("retrieval" if task == "foils" else task, str(folder / head.__name__))
    columns = ("images" if task == "reasoning" else "image",)
    rows = read_model_rows(model, str(folder / f"{task}.jsonl"), "test", columns, folder / "regions")
    result = protocol(model, tiny_lxmert_processor(), rows)
    name = "r_mean" if task == "retrieval" else "accuracy"
    expected = result.metrics[name] if task == "retrieval" else result.accuracy
    assert of_regions["metrics"][name] == pytest.approx(expected)


def test_rows_that_carry_their_regions(folder, processor, tmp_path):
    rows = with_regions(rows_of("entailment"), processor)
    for row in rows:
        row["regions"] = {name: value.tolist() for name, value in row["regions"].items()}
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = folder / "LXMERTForVisualEntailment"
    expected = evaluate_entailment(LXMERTForVisualEntailment.from_pretrained(model), processor, rows).accuracy
    for source in ("rows", "rows.jsonl"):
        scores = json.loads(run("evaluate", "entailment", model, tmp_path / source))
        assert scores["metrics"]["accuracy"] == expected


def train(task, model, data, out, *options) -> str:
    arguments = ["train", task, model, data, "--out", out, "--set", "use_cpu=true", "--batch-size", 4]
    return run(*arguments, "--learning-rate", 0.01, "--steps", 1, *options)


@pytest.mark.parametrize("task", [*(task for task in PROTOCOLS if task != "foils"), "pretrain"])
def test_train_from_a_folder_of_regions(task, folder, tmp_path, spec):
    options = ["--features", folder / "regions", "--extractor", spec]
    model = folder / "LXMERTForPreTraining"
    said = train(task, model, folder / f"{task}.jsonl", tmp_path / "out", *options)
    assert f"saved to {tmp_path / 'out'}" in said
    trained = load_head(task, str(tmp_path / "out"))
    word = "lxmert.embeddings.word_embeddings.weight"
    assert not torch.equal(
        trained.state_dict()[word], LXMERTForPreTraining.from_pretrained(model).state_dict()[word]
    )
    saved = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert saved["extractor"] == spec


def test_train_finds_regions(folder, tmp_path, spec):
    data = folder / "entailment.jsonl"
    train("entailment", folder / "LXMERTForPreTraining", data, tmp_path / "out", "--extractor", spec)
    rows = json.loads(
        run(
            *("predict", "--task", "entailment", tmp_path / "out", folder / "0.png", "--text", "a circle"),
        )
    )
    assert set(rows[0]["probabilities"]) == {"contradiction", "neutral", "entailment"}


def test_train_moves_to_other_answers(folder, tmp_path):
    data, options = folder / "vqa.jsonl", ["--features", folder / "regions"]
    answers = ["--answers", folder / "answers.json"]
    model = folder / "LXMERTForPreTraining"
    assert "knows 3 of 4 answers, without 'green'" in train(
        "vqa", model, data, tmp_path / "out", *options, *answers
    )
    assert load_head("vqa", str(tmp_path / "out")).config.answers == ["red", "green", "two", "yes"]
    config = json.loads((model / "config.json").read_text())
    nameless = tmp_path / "nameless"
    LXMERTForPreTraining.from_pretrained(model, answers=None).save_pretrained(nameless)
    tiny_lxmert_processor().save_pretrained(nameless)
    assert config["answers"] and "knows 0 of 4" in train(
        "vqa", nameless, data, tmp_path / "new", *options, *answers
    )


def test_each_task_has_its_collator(folder):
    model, processor = make_head(LXMERTForQuestionAnswering)
    data = str(folder / "vqa.jsonl")
    rows, collator = _rows_and_collator("vqa", model, processor, data, "train", True, folder / "regions")
    batch = collator([rows[0], rows[1]])
    assert batch["visual_feats"].shape == (2, 4, LXMERT_FEATURES) and batch["labels"].shape == (2, 6)
    model, processor = make_head(LXMERTForPreTraining)
    data = str(folder / "pretrain.jsonl")
    _, collator = _rows_and_collator("pretrain", model, processor, data, "train", True, folder / "regions")
    assert list(collator.answer_ids) == LXMERT_ANSWERS


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "assignment", "LXMERTForPreTraining", "retrieval.jsonl"], "no head for assignment"),
        (["train", "vqa", "LXMERTForPreTraining", "vqa.jsonl"], "extractor is None"),
        (["train", "vqa", "LXMERTForPreTraining", "vqa.jsonl", "--image-size", "64"], "reads regions"),
        (["train", "retrieval", "LXMERTForRetrieval", "vqa.jsonl", "--features", "regions"], "with caption"),
        (["train", "entailment", "LXMERTForRetrieval", "entailment.jsonl", "--answers", "x"], "answers is x"),
        (["evaluate", "vqa", "LXMERTForRetrieval", "vqa.jsonl"], "trained first"),
        (["evaluate", "grounding", "LXMERTForPreTraining", "grounding.jsonl"], "trained first"),
        (
            ["evaluate", "vqa", "LXMERTForPreTraining", "vqa.jsonl", "--features", "gone"],
            "no region features",
        ),
        (["evaluate", "vqa", "LXMERTForPreTraining", "bare.jsonl"], "or the folder of their regions"),
        (["evaluate", "vqa", "LXMERTForPreTraining", "bare.jsonl", "--features", "regions"], "image_id"),
    ],
)
def test_refused_in_one_line(arguments, word, folder, monkeypatch, refused):
    monkeypatch.chdir(folder)
    Path("bare.jsonl").write_text('{"question": "how many", "answers": ["1"]}')
    if arguments[0] == "train":
        arguments = [*arguments, "--out", "out"]
    assert word in refused(*arguments)


def test_options_of_regions_are_refused_for_models_of_images(folder, tmp_path, refused):
    save_heads(tmp_path, XVLMForGrounding)
    arguments = ["evaluate", "grounding", tmp_path / "XVLMForGrounding", folder / "grounding.jsonl"]
    assert "reads images" in refused(*arguments, "--features", folder / "regions")
    assert "reads images" in refused(*arguments, "--extractor", "grid:some/model")


@pytest.mark.parametrize(
    ("task", "saved", "ready"),
    [
        ("vqa", LXMERTForPreTraining, True),
        ("retrieval", LXMERTForPreTraining, True),
        ("grounding", LXMERTForPreTraining, False),
        ("entailment", LXMERTForPreTraining, False),
        ("reasoning", LXMERTForPreTraining, False),
        ("vqa", LXMERTForVisualReasoning, False),
        ("pretrain", LXMERTForRetrieval, False),
        ("grounding", LXMERTForGrounding, True),
    ],
)
def test_which_heads_a_folder_holds(task, saved, ready, folder):
    if ready:
        stored = saved.from_pretrained(folder / saved.__name__).state_dict()
        model = load_head(task, folder / saved.__name__)
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    else:
        with pytest.raises(ValueError, match="trained first"):
            load_head(task, folder / saved.__name__)


def test_convert_hands_its_arguments_on(monkeypatch, folder):
    calls = []
    for module in (hf_vlp.conversion.lxmert, hf_vlp.conversion.butd):
        monkeypatch.setattr(
            module, "convert_checkpoint", lambda *args, **kwargs: calls.append((args, kwargs)) or KeyReport()
        )
    table = [{"ans": answer, "dsets": ["vqa"]} for answer in ("yes", "no")]
    (folder / "all_ans.json").write_text(json.dumps(table))
    options = ["--answers", folder / "all_ans.json", "--num-attention-heads", 4, "--tokenizer", "some/folder"]
    run("convert", "lxmert", "in.pth", "out", *options)
    run("convert", "butd", "in.caffemodel", "out")
    (args, kwargs), (other, _) = calls
    assert [str(value) for value in args] == ["in.pth", "out"]
    assert kwargs == {"answers": ["yes", "no"], "num_attention_heads": 4, "tokenizer": "some/folder"}
    assert [str(value) for value in other] == ["in.caffemodel", "out"]
