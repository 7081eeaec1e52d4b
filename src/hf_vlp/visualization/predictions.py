"""What grounding found, drawn on its images."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from PIL import Image

from ..images import load_image
from .boxes import draw_boxes
from .gradcam import draw_heatmap


def draw_located(images: Sequence, predictions: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """The boxes of each image drawn on it, with their texts; one picture for each heat map, if there are any.

    `predictions` are those of `hf_vlp.predict("grounding", ...)` for `images`, whatever `load_image` takes.
    """
    pictures = []
    numbered = enumerate(predictions)
    for _, group in groupby(numbered, lambda one: (one[1]["image"], "heatmap" in one[1] and one[0])):
        group = [prediction for _, prediction in group]
        image = load_image(images[group[0]["image"]])
        if "heatmap" in group[0]:
            image = draw_heatmap(image, group[0]["heatmap"])
        boxes, labels = [one["box"] for one in group], [one["text"] for one in group]
        pictures.append(draw_boxes(image, boxes, labels))
    return pictures
