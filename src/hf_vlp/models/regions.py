"""Regions of images as detectors give them, in batches and one image at a time.

B: images, R: regions of an image, F: width of a feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

TOLERANCE = 1e-5  # by which a box may leave the image, that of the official loader
_LABELS = {
    "object_ids": torch.long,
    "object_scores": torch.float,
    "attribute_ids": torch.long,
    "attribute_scores": torch.float,
}


@dataclass
class Regions(ModelOutput):
    """Regions of a batch of images, padded to the same number.

    - features (B, R, F)
    - boxes (B, R, 4): x1, y1, x2, y2 over the image's width and height, 0..1
    - mask (B, R) bool: True where there is a region
    - object_ids, object_scores, attribute_ids, attribute_scores (B, R): what the detector takes a region for,
      and how sure it is, 0..1; None from detectors that do not say
    - image_sizes (B, 2): height and width in pixels
    """

    features: Tensor | None = None
    boxes: Tensor | None = None
    mask: Tensor | None = None
    object_ids: Tensor | None = None
    object_scores: Tensor | None = None
    attribute_ids: Tensor | None = None
    attribute_scores: Tensor | None = None
    image_sizes: Tensor | None = None

    def row(self, index: int) -> dict[str, Tensor]:
        """The regions of one image without padding: what `stack_regions` takes."""
        mask = self.mask[index]
        row = {
            name: value[index][mask] for name, value in self.items() if name not in ("mask", "image_sizes")
        }
        return row | {"image_size": self.image_sizes[index]}


class RegionExtractor(Protocol):
    """What finds regions in images.

    `feature_dim` is F; `fits_released_weights` says whether the released LXMERT weights were trained on such
    features.
    """

    feature_dim: int
    fits_released_weights: bool

    def extract(self, images: Sequence[Image.Image]) -> Regions:
        """Regions of RGB images of any size."""
        ...


def stack_regions(rows: Sequence[Mapping[str, Any]]) -> Regions:
    """Regions of several images as one batch, in float32.

    A row holds `features` (R, F), `boxes` (R, 4) x1, y1, x2, y2 in 0..1, `image_size` (2,) and, in all rows
    or in none, `object_ids`, `object_scores`, `attribute_ids` and `attribute_scores` (R,); arrays, lists or
    tensors.

    Raises:
        ValueError: no rows, a row without regions, features of different widths, lengths that differ, or
            boxes outside 0..1 or with x2 < x1 or y2 < y1.
    """
    if not rows:
        raise ValueError("rows is empty; give the regions of at least one image")
    features = [_tensor(row["features"], torch.float) for row in rows]
    boxes = [_tensor(row["boxes"], torch.float) for row in rows]
    for index, (feature, box) in enumerate(zip(features, boxes, strict=True)):
        _check_row(index, feature, box, features[0].shape[-1])
    lengths = torch.tensor([len(feature) for feature in features])
    labels = {}
    for name, dtype in _LABELS.items():
        values = [row.get(name) for row in rows]
        if all(value is not None for value in values):
            values = [_tensor(value, dtype) for value in values]
            _check_lengths(name, values, lengths.tolist())
            labels[name] = pad_sequence(values, batch_first=True)
    return Regions(
        features=pad_sequence(features, batch_first=True),
        boxes=pad_sequence(boxes, batch_first=True),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        image_sizes=torch.stack([_tensor(row["image_size"], torch.long) for row in rows]),
        **labels,
    )


def _tensor(value: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.tensor(np.asarray(value), dtype=dtype)  # copies: memory-mapped arrays cannot be written


def _check_row(index: int, features: Tensor, boxes: Tensor, width: int):
    if features.ndim != 2 or not len(features) or features.shape[1] != width:
        raise ValueError(
            f"regions[{index}] has features of shape {tuple(features.shape)}; give (R, {width}) with R of at "
            "least 1"
        )
    if boxes.shape != (len(features), 4):
        raise ValueError(
            f"regions[{index}] has {len(features)} features and boxes of shape {tuple(boxes.shape)}; give "
            "one box x1, y1, x2, y2 for each"
        )
    outside = (boxes < -TOLERANCE) | (boxes > 1 + TOLERANCE) | ~boxes.isfinite()
    if outside.any() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(
            f"regions[{index}] has boxes outside 0..1 or with x2 < x1 or y2 < y1; give x1, y1, x2, y2 "
            "divided by the width and the height of the image"
        )


def _check_lengths(name: str, values: list[Tensor], lengths: list[int]):
    for index, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if value.shape != (length,):
            raise ValueError(
                f"regions[{index}] has {name} of shape {tuple(value.shape)} for {length} regions; give one "
                "each"
            )
