"""What the examples of LXMERT share: a tiny new model that knows the words of drawn scenes, and an extractor
for these scenes, which stands for the detector that photographs need."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from hf_vlp import LXMERTConfig, LXMERTProcessor
from hf_vlp.data.scenes import COLOURS, LEVELS, SHAPES
from hf_vlp.data.shapes import vocabulary
from hf_vlp.models.crops import crop_features
from hf_vlp.models.regions import Regions, stack_regions
from hf_vlp.quickstart import word_tokenizer

LEVEL = LEVELS[0]
ANSWERS = ["no", "yes", "zero", "one", "two", "three", *LEVEL.colours, *LEVEL.shapes]
# Weights of 0.02, right for a width of 768, are too quiet for one of 64; scenes have two or three regions, of
# which a share of more than 15% is masked, so their losses need no factor
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
    "l_layers": 2,
    "r_layers": 1,
    "x_layers": 2,
    "visual_loss_normalizer": 1.0,
    "mask_region_labels": True,
}


class DrawnObjects:
    """Finds the objects of drawn scenes: in each cell of the grid what is bright."""

    feature_dim = 48  # colours of 4 x 4 parts
    fits_released_weights = False
    spec = None  # no name to load it by

    def extract(self, images: Sequence[Image.Image]) -> Regions:
        """Regions of square images of scenes of level 0."""
        rows = []
        for image in images:
            boxes = find_objects(np.array(image.convert("RGB")))
            x, y, w, h = np.array(boxes, dtype=float).T
            corners = np.stack([x, y, x + w, y + h], axis=1) / (image.size * 2)
            size = (image.height, image.width)
            rows.append({"features": crop_features(image, boxes), "boxes": corners, "image_size": size})
        return stack_regions(rows)


def find_objects(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes x, y, width, height in the pixels (H, W, 3) of a scene; the whole image if there is nothing."""
    bright = pixels.max(axis=2) > 100  # the background is dark
    side, boxes = len(pixels) // LEVEL.grid, []
    for cell in range(LEVEL.grid**2):
        top, left = (side * place for place in divmod(cell, LEVEL.grid))
        rows, columns = bright[top : top + side, left : left + side].nonzero()
        if len(rows):
            corner = (left + columns.min(), top + rows.min())
            boxes.append((*corner, np.ptp(columns) + 1, np.ptp(rows) + 1))
    return [tuple(map(int, box)) for box in boxes] or [(0, 0, *pixels.shape[1::-1])]


def tiny_lxmert(head: type[PreTrainedModel]) -> tuple[PreTrainedModel, LXMERTProcessor]:
    """A new head, and its processor."""
    tokenizer = word_tokenizer(vocabulary())
    config = LXMERTConfig(
        vocab_size=len(tokenizer),
        visual_feat_dim=DrawnObjects.feature_dim,
        num_object_labels=len(SHAPES),
        num_attr_labels=len(COLOURS),
        num_qa_labels=len(ANSWERS),
        answers=ANSWERS,
        **SIZES,
    )
    return head(config), LXMERTProcessor(tokenizer, extractor=DrawnObjects(), max_tokens=32)
