"""`hf-vlp index build` and `search`, on tiny models and small pictures."""

import json
import shutil

import pytest
from data_fixtures import picture
from heads import save_heads
from test_cli import run_main
from test_commands import run

import hf_vlp
from hf_vlp import RetrievalIndex, XVLMForPreTraining
from hf_vlp.heads import load_head

TEXTS = ["a red circle", "the blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_heads(tmp_path_factory.mktemp("index"), XVLMForPreTraining, hf_vlp.SOHOForRetrieval)
    (folder / "photos").mkdir()
    for i in range(4):
        picture(i).save(folder / "photos" / f"{i}.png")
    return folder


def test_build_and_search(folder, tmp_path):
    model, out = folder / "XVLMForPreTraining", tmp_path / "gallery"
    said = run("index", "build", model, folder / "photos", "--out", out, "--dtype", "float16")
    assert said.strip().endswith(f"4 images in {out}, 4 of them new")
    index = RetrievalIndex.load(out)
    assert index.ids == [str(folder / "photos" / f"{i}.png") for i in range(4)]
    found = json.loads(run("index", "search", out, "--text", TEXTS[0], "--text", TEXTS[1], "-k", 2))
    assert [row["text"] for row in found] == TEXTS
    for row, expected in zip(found, index.search(text=TEXTS, k=2), strict=True):
        assert [one["id"] for one in row["results"]] == [one["id"] for one in expected]
    photo = index.ids[2]
    (row,) = json.loads(run("index", "search", out, "--image", photo, "--faiss", "Flat"))
    assert row["image"] == photo and row["results"][0]["id"] == photo and len(row["results"]) == 4
    (row,) = json.loads(run("index", "search", out, "--text", TEXTS[0], "--rerank", 0, "--model", model))
    assert all(one.keys() == {"id", "cosine"} for one in row["results"])


def test_build_goes_on(folder, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "gallery"
    shutil.copytree(folder / "photos", photos)
    arguments = ["index", "build", folder / "XVLMForPreTraining", photos, "--out", out, "--states", "none"]
    run(*arguments)
    picture(7).save(photos / "7.png")
    assert "5 images" in run(*arguments) and "0 of them new" in run(*arguments)
    assert len(RetrievalIndex.load(out)) == 5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (
            ["build", "{folder}/SOHOForRetrieval", "{folder}/photos", "--out", "{out}"],
            "no features to compare",
        ),
        (["build", "{folder}/XVLMForPreTraining", "{folder}/none", "--out", "{out}"], "is not there"),
        (["search", "{folder}", "--text", "a dog"], "holds no index"),
        (["search", "{folder}"], "give --text or --image"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, word, folder, tmp_path, monkeypatch):
    arguments = [one.format(folder=folder, out=tmp_path / "out") for one in arguments]
    code = run_main(monkeypatch, "index", *arguments)
    assert isinstance(code, str) and code.startswith("error: ") and word in code
    assert not (tmp_path / "out").exists()


def test_the_head_is_that_of_retrieval(folder, tmp_path):
    run("index", "build", folder / "XVLMForPreTraining", folder / "photos", "--out", tmp_path / "gallery")
    model = load_head("retrieval", folder / "XVLMForPreTraining")
    processor = hf_vlp.XVLMProcessor.from_pretrained(folder / "XVLMForPreTraining")
    assert len(RetrievalIndex.load(tmp_path / "gallery", model, processor)) == 4
