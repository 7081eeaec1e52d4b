"""Readers of ALBEF's JSON lists: rows of each task, both ways of reading, errors that name file and entry."""

import json

import datasets
import pytest
from data_fixtures import picture, tiny_processor

from hf_vlp.data.collators import ImageTextCollator, RetrievalCollator
from hf_vlp.data.task_collators import EntailmentCollator, PairCollator, QuestionAnsweringCollator
from hf_vlp.data.task_readers import (
    read_answer_list,
    read_captions,
    read_grounding_texts,
    read_nlvr2,
    read_snli_ve,
    read_vqa,
)

QUESTION = {"image": "0.jpg", "question": "What is red?", "question_id": 262148000, "dataset": "vqa"}
GENOME = {"image": "1.jpg", "question": "Where?", "question_id": 986769, "dataset": "vg", "answer": "on mat"}
CAPTION = {"image": "0.jpg", "caption": "a cat"}
ENTAILMENT = {"image": "0", "sentence": "A cat sits.", "label": "neutral"}
PAIR = {"images": ["0.jpg", "1.jpg"], "sentence": "Two cats.", "label": "True"}
TEXT = {"image": "train2014/0.jpg", "text": "left cat"}

both_ways = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.jpg")
    return tmp_path


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


@both_ways
def test_captions(folder, streaming):
    files = [
        write(folder / "coco.json", [CAPTION]),
        write(folder / "vg.json", [{"image": str(folder / "1.jpg"), "caption": ["the dog", "a dog"]}]),
    ]
    rows = list(read_captions(files, folder, streaming))
    assert [row["caption"] for row in rows] == [["a cat"], ["the dog", "a dog"]]
    assert [row["image"]["path"] for row in rows] == [str(folder / "0.jpg"), str(folder / "1.jpg")]
    assert ImageTextCollator(processor=tiny_processor())(rows)["input_ids"].shape[0] == 2


def test_types_shards_and_changed_files(folder):
    files = [write(folder / "a.json", [CAPTION]), write(folder / "b.json", [CAPTION])]
    assert read_captions(files, streaming=True).num_shards == 2
    assert isinstance(read_captions(files), datasets.Dataset)
    write(files[0], [CAPTION | {"caption": "another"}])
    assert [row["caption"] for row in read_captions(files)] == [["another"], ["a cat"]]


def test_vqa_of_xvlm(folder):
    """Rows without a data set are VQA's, those of GQA name whole paths."""
    plain = {key: value for key, value in QUESTION.items() if key != "dataset"}
    whole = QUESTION | {"dataset": "gqa", "image": str(folder / "1.jpg"), "answer": "mat"}
    rows = list(read_vqa(write(folder / "train.json", [plain, whole]), folder))
    assert [row["image"]["path"] for row in rows] == [str(folder / "0.jpg"), str(folder / "1.jpg")]
    assert [row["answers"] for row in rows] == [[], ["mat"]]
    assert [row["answer_weight"] for row in rows] == [1.0, 1.0]


@both_ways
def test_vqa(folder, streaming):
    (folder / "genome").mkdir()
    picture(3).save(folder / "genome" / "1.jpg")
    votes = ["cat"] * 7 + ["dog"] * 3
    train = write(folder / "train.json", [QUESTION | {"answer": votes}, GENOME])
    rows = list(read_vqa(train, folder, folder / "genome", streaming))
    assert [row["answers"] for row in rows] == [votes, ["on mat"]]
    assert [row["answer_weight"] for row in rows] == [1.0, 0.5]
    assert [row["question_id"] for row in rows] == [262148000, 986769]
    assert [row["image"]["path"] for row in rows] == [str(folder / "0.jpg"), str(folder / "genome" / "1.jpg")]
    batch = QuestionAnsweringCollator(processor=tiny_processor())(rows)
    assert batch["answer_weights"].tolist() == pytest.approx([0.7, 0.3, 0.5])

    test = list(read_vqa(write(folder / "test.json", [QUESTION]), folder, streaming=streaming))
    assert test[0]["answers"] == [] and test[0]["question"] == "What is red?"
    assert "answer_weights" not in QuestionAnsweringCollator(processor=tiny_processor(), train=False)(test)


@both_ways
def test_snli_ve(folder, streaming):
    entries = [ENTAILMENT | {"label": name} for name in ("contradiction", "neutral", "entailment")]
    rows = read_snli_ve(write(folder / "ve.json", entries), folder, streaming)
    assert rows.features["label"].names == ["contradiction", "neutral", "entailment"]
    batch = EntailmentCollator(processor=tiny_processor())(list(rows))
    assert batch["labels"].tolist() == [0, 1, 2]


@both_ways
def test_nlvr2(folder, streaming):
    entries = [PAIR, PAIR | {"label": "False", "identifier": "dev-850-0-1"}]
    rows = list(read_nlvr2(write(folder / "nlvr.json", entries), folder, streaming))
    assert [(row["label"], row["identifier"]) for row in rows] == [(True, None), (False, "dev-850-0-1")]
    assert [image["path"] for image in rows[0]["images"]] == [str(folder / "0.jpg"), str(folder / "1.jpg")]
    assert PairCollator(processor=tiny_processor())(rows)["labels"].tolist() == [1, 0]


@both_ways
def test_grounding_texts(folder, streaming):
    (folder / "train2014").mkdir()
    picture().save(folder / "train2014" / "0.jpg")
    rows = list(read_grounding_texts(write(folder / "refs.json", [TEXT, TEXT]), folder, streaming=streaming))
    assert rows[0]["caption"] == "left cat" and rows[0]["image_id"] == "0.jpg"
    ids = RetrievalCollator(processor=tiny_processor(), crop_scale=None)(rows)["image_ids"]
    assert ids[0] == ids[1]


def test_answer_list(tmp_path):
    assert read_answer_list(write(tmp_path / "answers.json", ["yes", "no"])) == ["yes", "no"]
    for wrong in ([], {"yes": 1}, ["yes", 2]):
        with pytest.raises(ValueError, match="answers.json is not a list of answers"):
            read_answer_list(write(tmp_path / "answers.json", wrong))


CASES = [
    (read_captions, CAPTION, {"caption": 3}, "caption is 3"),
    (read_captions, CAPTION, {"caption": []}, "caption is"),
    (read_captions, CAPTION, {"image": 3}, "an image is (3|None); it must be a string"),
    (read_captions, CAPTION, {"image": ...}, "lacks image"),
    (read_vqa, QUESTION, {"dataset": "clevr"}, "dataset is 'clevr'; it must be vqa, vg or gqa"),
    (read_vqa, QUESTION, {"dataset": "vg"}, "vg_root is None; give the folder"),
    (read_vqa, QUESTION, {"question_id": ...}, "lacks question_id"),
    (read_vqa, QUESTION, {"question_id": "x"}, "question_id is 'x'; it must be an integer"),
    (read_vqa, QUESTION, {"question": None}, "question is None"),
    (read_vqa, QUESTION, {"answer": [1]}, r"answer is \[1\]"),
    (read_snli_ve, ENTAILMENT, {"label": "maybe"}, "label is 'maybe'; it must be one of contradiction"),
    (read_snli_ve, ENTAILMENT, {"sentence": ...}, "lacks sentence"),
    (read_nlvr2, PAIR, {"label": "true"}, 'label is \'true\'; it must be "True" or "False"'),
    (read_nlvr2, PAIR, {"images": ["0.jpg"]}, "it must be a list of two paths"),
    (read_nlvr2, PAIR, {"images": [None, "0.jpg"]}, "an image is (3|None); it must be a string"),
    (read_grounding_texts, TEXT, {"text": ["a"]}, r"text is \['a'\]; it must be a string"),
]


@pytest.mark.parametrize(("reader", "entry", "change", "message"), CASES)
def test_wrong_entries_are_named(tmp_path, reader, entry, change, message):
    wrong = {key: value for key, value in (entry | change).items() if value is not ...}
    path = write(tmp_path / "list.json", [entry, wrong])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"list.json, entry 1: .*{message}"):
            list(reader(path, tmp_path, streaming=streaming))


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json does not exist"):
        read_vqa(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(ValueError, match="list.json holds a dict; give a JSON list of"):
        read_nlvr2(write(tmp_path / "list.json", {}), tmp_path)
    (tmp_path / "list.json").write_text("[{")
    with pytest.raises(ValueError, match="list.json is not valid JSON"):
        read_captions(tmp_path / "list.json")
