"""Readers of LXMERT's JSON lists: rows of each task, both ways of reading, errors that name the entry."""

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vlp.data import lxmert_readers
from hf_vlp.data.lxmert_readers import (
    read_answer_table,
    read_lxmert_gqa,
    read_lxmert_nlvr2,
    read_lxmert_pretraining,
    read_lxmert_vqa,
)
from hf_vlp.models.answers import simplify_answer

IMAGE = {
    "img_id": "COCO_train2014_000000318556",
    "sentf": {
        "mscoco": ["A very clean bathroom.", "A blue and white bathroom"],
        "vqa": ["What color is the tub?", "Is it dirty?"],
    },
    "labelf": {"vqa": [{"White": 1.0, "the cream": 0.3}, {}]},
}
VQA = {
    "img_id": "COCO_val2014_000000262148",
    "question_id": 262148000,
    "sent": "Where is he looking?",
    "label": {"down": 1, "at table": 0.3},
    "answer_type": "other",
    "question_type": "none of the above",
}
GQA = {"img_id": 2405722, "question_id": "07333408", "sent": "What is on the wall?", "label": {"pipe": 1.0}}
NLVR2 = {
    "identifier": "train-10171-0-0",
    "img0": "train-10171-0-img0",
    "img1": "train-10171-0-img1",
    "label": 0,
    "sent": "An image shows one pot.",
    "uid": "nlvr2_train_0",
}
TABLE = [
    {"ans": "2", "dsets": ["vqa", "visual7w"]},
    {"ans": "pipe", "dsets": ["gqa"]},
    {"ans": "white", "dsets": ["vqa", "gqa", "visual7w"]},
]

both_ways = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


# Answer tables


def test_answer_table(tmp_path):
    file = write(tmp_path / "all_ans.json", TABLE)
    assert read_answer_table(file) == ["2", "pipe", "white"]
    assert read_answer_table(file, sources=["vqa"]) == ["2", "white"]
    assert read_answer_table(file, sources={"gqa"}) == ["pipe", "white"]
    assert read_answer_table(file, sources=["gqa", "visual7w"]) == ["2", "pipe", "white"]
    with pytest.raises(ValueError, match=r"sources is \['coco'\]; .*all_ans.json has answers of gqa, vis"):
        read_answer_table(file, sources=["coco"])


def test_plain_answer_list(tmp_path):
    file = write(tmp_path / "label2ans.json", ["", "net", "pitcher"])
    assert read_answer_table(file) == ["", "net", "pitcher"]
    with pytest.raises(ValueError, match="label2ans.json does not say where answers come from"):
        read_answer_table(file, sources=["vqa"])


@pytest.mark.parametrize("wrong", [[], {"0": "net"}, [{"ans": "net"}], [*TABLE, "net"]])
def test_wrong_answer_tables_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match="table.json"):
        read_answer_table(write(tmp_path / "table.json", wrong))


# Pre-training


@both_ways
def test_pretraining(tmp_path, streaming):
    other = {"img_id": 7, "sentf": {"vg": ["blue paint"]}, "labelf": {}}
    files = [write(tmp_path / "train.json", [IMAGE]), write(tmp_path / "vgnococo.json", [other])]
    rows = list(read_lxmert_pretraining(files, streaming=streaming))
    assert [row["caption"] for row in rows] == [
        *IMAGE["sentf"]["mscoco"],
        *IMAGE["sentf"]["vqa"],
        "blue paint",
    ]
    assert [row["image_id"] for row in rows] == [IMAGE["img_id"]] * 4 + ["7"]
    assert [row["source"] for row in rows] == ["mscoco", "mscoco", "vqa", "vqa", "vg"]
    assert [row["answers"] for row in rows] == [[], [], ["white", "cream"], [], []]
    assert rows[2]["answer_scores"] == [1.0, 0.3]


@both_ways
def test_answers_outside_the_table_are_dropped(tmp_path, streaming):
    file = write(tmp_path / "train.json", [IMAGE])
    row = list(read_lxmert_pretraining(file, ["white", "yes"], streaming))[2]
    assert row["answers"] == ["white"] and row["answer_scores"] == [1.0]
    assert list(read_lxmert_pretraining(file, ["yes"], streaming))[2]["answers"] == []


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"2": 0.9, "two": 0.3}, {"2": 0.3}),
        ({"two": 0.3, "2": 0.9}, {"2": 0.3}),  # the one that is rewritten stays
        ({"two": 0.3, "Two.": 0.6}, {"2": 0.6}),
        ({"the cat": 1.0, "A dog.": 0.3, "dog": 0.6}, {"cat": 1.0, "dog": 0.3}),
    ],
)
def test_equal_answers_keep_one_score(tmp_path, label, expected):
    entry = {"img_id": 1, "sentf": {"vqa": ["how many?"]}, "labelf": {"vqa": [label]}}
    (row,) = read_lxmert_pretraining(write(tmp_path / "train.json", [entry]))
    assert dict(zip(row["answers"], row["answer_scores"], strict=True)) == expected


ANSWER_TEXTS = st.sampled_from(
    ["2", "two", "Two.", "the two", "cat", "a cat", "the a cat", "", "grey", "gray"]
)


@given(st.dictionaries(ANSWER_TEXTS, st.sampled_from([0.3, 0.6, 0.9, 1.0])))
def test_simplified_answers_are_those_of_the_table(label):
    table = frozenset(["2", "cat", "gray"])
    simple = lxmert_readers._simplify(label, table)
    assert set(simple) == {simplify_answer(answer) for answer in label} & table
    assert set(simple.values()) <= set(label.values())
    assert set(lxmert_readers._simplify(label, None)) >= set(simple)


# Tasks


@both_ways
def test_vqa(tmp_path, streaming):
    test = {key: VQA[key] for key in ("img_id", "question_id", "sent")}
    rows = list(read_lxmert_vqa(write(tmp_path / "train.json", [VQA, test]), streaming))
    assert rows[0] == {
        "image_id": "COCO_val2014_000000262148",
        "question": "Where is he looking?",
        "answers": ["down", "at table"],
        "answer_scores": [1.0, 0.3],
        "question_id": 262148000,
        "question_type": "other",
    }
    assert rows[1]["answers"] == rows[1]["answer_scores"] == [] and rows[1]["question_type"] is None


@both_ways
def test_gqa(tmp_path, streaming):
    (row,) = read_lxmert_gqa(write(tmp_path / "train.json", [GQA]), streaming)
    assert row == {
        "image_id": "2405722",
        "question": "What is on the wall?",
        "answers": ["pipe"],
        "answer_scores": [1.0],
        "question_id": "07333408",
    }


@both_ways
def test_nlvr2(tmp_path, streaming):
    rows = list(read_lxmert_nlvr2(write(tmp_path / "dev.json", [NLVR2, NLVR2 | {"label": 1}]), streaming))
    assert rows[0] == {
        "image_ids": ["train-10171-0-img0", "train-10171-0-img1"],
        "sentence": "An image shows one pot.",
        "label": False,
        "identifier": "train-10171-0-0",
    }
    assert rows[1]["label"] is True


def test_types_shards_and_changed_files(tmp_path):
    files = [write(tmp_path / "a.json", [GQA]), write(tmp_path / "b.json", [GQA])]
    assert read_lxmert_gqa(files, streaming=True).num_shards == 2
    assert isinstance(read_lxmert_gqa(files), datasets.Dataset)
    write(files[0], [GQA | {"sent": "Who is it?"}])
    assert read_lxmert_gqa(files)["question"][:] == ["Who is it?", "What is on the wall?"]
    sentences = [write(tmp_path / "c.json", [IMAGE]), write(tmp_path / "d.json", [IMAGE])]
    assert read_lxmert_pretraining(sentences, ["white"] * 5, streaming=True).num_shards == 2
    assert read_lxmert_pretraining(sentences, ["cream"])["answers"][2] == ["cream"]
    assert read_lxmert_pretraining(sentences, ["white"])["answers"][2] == ["white"]


CASES = [
    (read_lxmert_pretraining, IMAGE, {"sentf": ...}, "lacks sentf"),
    (read_lxmert_pretraining, IMAGE, {"sentf": ["a cat"]}, "sentf or labelf is no dict"),
    (
        read_lxmert_pretraining,
        IMAGE,
        {"sentf": {"vg": "a cat"}},
        "sentf has 'a cat' of vg; it must be a list",
    ),
    (read_lxmert_pretraining, IMAGE, {"labelf": {"vqa": [{}]}}, "vqa has 2 sentences and 1 labels"),
    (read_lxmert_pretraining, IMAGE, {"sentf": {"vg": [3]}}, r"sentf has \[3\] of vg; it must be a list"),
    (
        read_lxmert_pretraining,
        IMAGE,
        {"labelf": {"vqa": ["white", {}]}},
        "label is 'white'; it must be a dict",
    ),
    (read_lxmert_vqa, VQA, {"label": {"down": "1"}}, "it must be a dict of answers and their scores"),
    (read_lxmert_vqa, VQA, {"question_id": "1"}, "question_id is '1'; it must be an integer"),
    (read_lxmert_vqa, VQA, {"sent": None}, "sent is None; it must be a string"),
    (read_lxmert_gqa, GQA, {"img_id": ...}, "lacks img_id"),
    (read_lxmert_gqa, GQA, {"label": ["pipe"]}, r"label is \['pipe'\]; it must be a dict"),
    (read_lxmert_nlvr2, NLVR2, {"label": "True"}, "label is 'True'; it must be 0 or 1"),
    (read_lxmert_nlvr2, NLVR2, {"img1": ...}, "lacks img1"),
]


@both_ways
@pytest.mark.parametrize(("reader", "entry", "change", "message"), CASES)
def test_wrong_entries_are_named(tmp_path, reader, entry, change, message, streaming):
    wrong = {key: value for key, value in (entry | change).items() if value is not ...}
    path = write(tmp_path / "list.json", [entry, wrong])
    with pytest.raises(ValueError, match=rf"list.json, entry 1: .*{message}"):
        list(reader(path, streaming=streaming))
