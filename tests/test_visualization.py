"""Boxes on images, loss curves, the HTML report."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hf_vlp.visualization import Figure, Score, draw_boxes, draw_loss_curves, write_report
from hf_vlp.visualization.boxes import MIN_SIDE, PREDICTED, TRUE
from hf_vlp.visualization.curves import loss_points

HISTORY = [
    {"step": 10, "loss": 3.0, "loss_itc": 2.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 2.0, "loss_itc": 1.5, "loss_bbox": 0.5, "learning_rate": 1e-3},
    {"step": 20, "train_loss": 2.5, "train_runtime": 1.0},
]


@pytest.fixture
def image():
    return Image.new("RGB", (400, 320), "black")


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def test_box_is_drawn_where_it_is(image):
    pixels = np.asarray(draw_boxes(image, [[100, 50, 200, 150]], colors=[TRUE]))
    assert tuple(pixels[50, 150]) == tuple(pixels[150, 150]) == tuple(pixels[100, 100]) == rgb(TRUE)
    assert not pixels[60:140, 110:190].any(), "the inside of the box must stay as it was"
    assert not pixels[200:, 250:].any()
    assert not np.asarray(image).any(), "the given image must not change"


def test_small_images_are_enlarged_with_their_boxes():
    drawn = draw_boxes(Image.new("RGB", (48, 64)), [[12, 16, 24, 32]], colors=[TRUE])
    assert drawn.size == (48 * 7, 64 * 7) and min(drawn.size) >= MIN_SIDE
    assert drawn.getpixel((18 * 7, 16 * 7)) == rgb(TRUE)


@pytest.mark.parametrize("box", [[0, 0, 60, 40], [150, 120, 210, 200], [340, 280, 399, 319]])
def test_labels_of_equal_boxes_do_not_hide_each_other(image, box):
    def painted(labels):
        pixels = np.asarray(draw_boxes(image, [box, box], labels, [PREDICTED, TRUE]))
        return [(pixels == rgb(color)).all(-1).sum() for color in (PREDICTED, TRUE)]

    plain, labelled = painted(["", ""]), painted(["one", "two"])
    assert all(with_label - without > 200 for with_label, without in zip(labelled, plain, strict=True))


def test_no_box_gives_a_plain_copy(image):
    assert not np.asarray(draw_boxes(image, [])).any()


def test_bad_boxes_are_named(image):
    with pytest.raises(ValueError, match="inverted"):
        draw_boxes(image, [[50, 50, 40, 60]])
    with pytest.raises(ValueError, match="one of each per box"):
        draw_boxes(image, [[1, 1, 2, 2]], labels=[])


def test_loss_points_take_every_term_and_nothing_else():
    assert loss_points(HISTORY) == {
        "loss": [(10, 3.0), (20, 2.0)],
        "loss_itc": [(10, 2.0), (20, 1.5)],
        "loss_bbox": [(20, 0.5)],
    }


def test_curves_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    draw_loss_curves(HISTORY, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 0
    with pytest.raises(ValueError, match="no loss"):
        draw_loss_curves(HISTORY[-1:], tmp_path / "none.png")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf-vlp\[viz\]"):
        draw_loss_curves(HISTORY, tmp_path / "curves.png")


class WellFormed(HTMLParser):
    """Counts tags that were opened and not closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_holds_everything_and_needs_nothing(tmp_path, image):
    image.save(tmp_path / "scene.png")
    path = write_report(
        tmp_path,
        title="A & B",
        summary="1 < 2",
        scores=[Score("grounding", 0.812, 0.43, "box of a random object")],
        sections={"Boxes": [Figure("scene.png", 'the "red" circle')]},
        settings={"seed": 0},
    )
    page = path.read_text(encoding="utf-8")
    for text in [
        "A &amp; B",
        "1 &lt; 2",
        "0.812",
        "0.430",
        "box of a random object",
        'src="scene.png"',
        "seed",
    ]:
        assert text in page
    assert not re.search(r"https?:|<script|<link|@import", page)
    reader = WellFormed()
    reader.feed(page)
    assert reader.open == []


def test_report_without_its_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gone.png"):
        write_report(tmp_path, "t", "s", [], {"Boxes": [Figure("gone.png", "c")]}, {})
    assert not (tmp_path / "index.html").exists()
