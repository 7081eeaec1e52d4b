"""`hf-vlp extract`: what is stored, going on after an interruption, and what is refused."""

import json
import logging
import sys

import pytest
import torch
from PIL import Image
from tiny_extractors import noise, save_detector, save_trunk

import hf_vlp.commands.extract
from hf_vlp.cli import main
from hf_vlp.commands.extract import NOTE, find_images, run
from hf_vlp.data.features import RegionStore
from hf_vlp.models.region_extractors import GridRegions, load_extractor


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return f"grid:{save_trunk('vit', tmp_path_factory.mktemp('models') / 'vit')}#2"


@pytest.fixture
def images(tmp_path):
    """Five images, two of them in a folder of their own, and a file of another kind."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i, place in enumerate(["a.png", "b.jpg", "c.PNG", "more/d.png", "more/e.jpeg"]):
        noise(20 + i, 16, seed=i).save(tmp_path / "images" / place)
    (tmp_path / "images" / "captions.txt").write_text("none")
    return tmp_path / "images"


@pytest.fixture
def extracted(monkeypatch):
    """Numbers of images that extractors are given at a time."""
    sizes = []
    extract = GridRegions.extract
    monkeypatch.setattr(
        GridRegions, "extract", lambda self, images: sizes.append(len(images)) or extract(self, images)
    )
    return sizes


def test_a_folder_becomes_a_store(images, spec, tmp_path, extracted):
    out = tmp_path / "regions"
    said = run([str(images)], spec, out, batch_size=2)
    assert said == (
        f"5 images in {out}, 5 of them new, 0 left out; features of width 16, not those of the released "
        "LXMERT weights"
    )
    assert extracted == [2, 2, 1]
    store = RegionStore(out)
    assert store.ids == ["a", "b", "c", "d", "e"]
    expected = load_extractor(spec).extract([Image.open(images / "more" / "d.png")]).row(0)
    row = store["d"]
    torch.testing.assert_close(
        torch.tensor(row["features"]).float(), expected["features"], atol=1e-2, rtol=1e-2
    )
    assert row["boxes"].tolist() == expected["boxes"].tolist()
    assert row["image_size"].tolist() == [16, 23]


def test_a_finished_run_does_nothing(images, spec, tmp_path, monkeypatch):
    out = tmp_path / "regions"
    run([str(images)], spec, out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    monkeypatch.setattr(hf_vlp.commands.extract, "load_extractor", None)
    assert "5 images" in run([str(images)], spec, out) and "0 of them new" in run([str(images)], spec, out)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on(interruption, images, spec, tmp_path, monkeypatch, extracted):
    out, extract = tmp_path / "regions", GridRegions.extract

    def break_down(self, images):
        if len(extracted) == 2:
            raise interruption
        return extract(self, images)

    with monkeypatch.context() as patch, pytest.raises(interruption):
        patch.setattr(GridRegions, "extract", break_down)
        run([str(images)], spec, out, batch_size=2)
    assert RegionStore(out).ids == ["a", "b", "c", "d"]
    assert "5 images" in (said := run([str(images)], spec, out, batch_size=2)) and "1 of them new" in said
    assert extracted == [2, 2, 1]
    assert RegionStore(out).ids == ["a", "b", "c", "d", "e"]
    noise(9, 9).save(images / "f.png")
    assert "6 images" in run([str(images)], spec, out)


def test_images_that_cannot_be_read_stop_or_are_left_out(images, spec, tmp_path, caplog):
    out = tmp_path / "regions"
    (images / "b.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="b.jpg gives no regions.*--on-bad-image skip"):
        run([str(images)], spec, out, batch_size=2)
    with caplog.at_level(logging.WARNING):
        said = run([str(images)], spec, out, batch_size=2, on_bad_image="skip")
    assert "4 images" in said and "1 left out" in said
    assert "b.jpg" in caplog.text and "a.png" not in caplog.text
    assert sorted(RegionStore(out).ids) == ["a", "c", "d", "e"]
    noise(12, 12).save(images / "b.jpg")  # repaired
    assert "5 images" in (said := run([str(images)], spec, out)) and "1 of them new" in said


def test_images_that_the_extractor_refuses_are_named(images, spec, tmp_path, monkeypatch):
    extract = GridRegions.extract

    def picky(self, images):
        if any(image.width == 21 for image in images):
            raise ValueError("an image is too narrow")
        return extract(self, images)

    monkeypatch.setattr(GridRegions, "extract", picky)
    with pytest.raises(ValueError, match=r"b.jpg gives no regions \(an image is too narrow\)"):
        run([str(images)], spec, tmp_path / "stops")
    assert "1 left out" in run([str(images)], spec, tmp_path / "regions", on_bad_image="skip")
    assert RegionStore(tmp_path / "regions").ids == ["a", "c", "d", "e"]


def test_images_of_one_name_are_refused(images):
    noise(8, 8).save(images / "more" / "a.bmp")
    with pytest.raises(ValueError, match=r"a\.png and .*more.a\.bmp would both have the id a"):
        find_images([str(images)])
    with pytest.raises(ValueError, match="would both have the id d"):
        find_images([str(images / "more" / "d.png"), str(images / "more")])


def test_files_may_have_any_ending(images):
    (images / "a.png").rename(images / "a.picture")
    assert list(find_images([str(images / "a.picture")])) == ["a"]
    with pytest.raises(ValueError, match="no images in"):
        (images / "empty").mkdir()
        find_images([str(images / "empty")])
    with pytest.raises(ValueError, match="none.png is not there"):
        find_images([str(images / "none.png")])


def test_stores_hold_regions_of_one_extractor(images, spec, tmp_path, folder_of_detr):
    out = tmp_path / "regions"
    run([str(images)], spec, out)
    with pytest.raises(ValueError, match=f"was written by {spec}, not by {folder_of_detr}"):
        run([str(images)], folder_of_detr, out)
    assert json.loads((out / NOTE).read_text())["fits_released_weights"] is False
    with pytest.raises(ValueError, match="was written by something else"):
        run([str(images)], spec, images)


@pytest.fixture(scope="module")
def folder_of_detr(tmp_path_factory):
    return save_detector("detr", tmp_path_factory.mktemp("detectors") / "detr")


def test_detectors_store_what_they_take_regions_for(images, tmp_path, folder_of_detr):
    run([str(images)], f"{folder_of_detr}#3", tmp_path / "regions")
    row = RegionStore(tmp_path / "regions")["a"]
    assert row["features"].shape == (3, 24) and row["object_ids"].shape == (3,)
    assert "attribute_ids" not in row


# The command


def run_main(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["hf-vlp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_the_command_says_what_it_stored(images, spec, tmp_path, monkeypatch, capsys):
    arguments = ["extract", str(images), "--extractor", spec, "--out", str(tmp_path / "regions")]
    assert run_main(monkeypatch, *arguments, "--batch-size", "3") == 0
    assert "5 images in" in capsys.readouterr().out
    assert len(RegionStore(tmp_path / "regions")) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": "nowhere"}, "nowhere is not there"),
        ({"--extractor": "grid:nowhere/at/all"}, "nowhere/at/all"),
        ({"--extractor": "torchvision:nonsense"}, "nonsense"),
        ({"--batch-size": "0"}, "batch_size is 0"),
    ],
)
def test_what_the_command_refuses_is_one_line(change, words, images, spec, tmp_path, monkeypatch):
    out = tmp_path / "regions"
    options = {"images": str(images), "--extractor": spec, "--out": str(out), "--batch-size": "2"} | change
    place = options.pop("images")
    code = run_main(monkeypatch, "extract", place, *(word for pair in options.items() for word in pair))
    assert isinstance(code, str) and code.startswith("error: ") and words in code and "\n" not in code
    assert not out.exists()


def test_other_ways_with_bad_images_are_refused(images, spec, tmp_path, monkeypatch):
    out = tmp_path / "regions"
    arguments = ["extract", str(images), "--extractor", spec, "--out", str(out), "--on-bad-image", "guess"]
    assert run_main(monkeypatch, *arguments) == 2
    with pytest.raises(ValueError, match="on_bad_image is 'guess'"):
        run([str(images)], spec, out, on_bad_image="guess")
