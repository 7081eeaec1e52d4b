"""Means of images and maps over the cells of boxes.

R: boxes, C: channels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image


def crop_features(image: Image.Image, boxes: Sequence[Sequence[float]] | np.ndarray, grid: int = 4) -> Tensor:
    """Mean colours of `grid` x `grid` cells of each box, exact also where cells cut pixels: (R, 3 * grid^2).

    `boxes` (R, 4) are x, y, width, height in pixels, and are clipped to the image; the values are red, green
    and blue in 0..1, cell by cell in reading order.

    Raises:
        ValueError: a box that holds nothing of the image.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))) / 255  # (H, W, 3)
    return cell_means(pixels, clip_to_image(boxes, image), grid).flatten(1)


def clip_to_image(boxes: Sequence[Sequence[float]] | np.ndarray, image: Image.Image) -> Tensor:
    """Boxes x, y, width, height in pixels as x1, y1, x2, y2 inside the image: (R, 4).

    Raises:
        ValueError: a box that holds nothing of the image.
    """
    given = torch.as_tensor(np.asarray(boxes), dtype=torch.float).reshape(len(boxes), 4)
    clipped = clip_boxes_to_image(box_convert(given, "xywh", "xyxy"), (image.height, image.width))
    empty = ~(clipped[:, 2:] > clipped[:, :2]).all(dim=1)
    if empty.any():
        raise ValueError(
            f"boxes has {given[empty][0].tolist()}, which holds nothing of an image of {image.width} x "
            f"{image.height} pixels; give x, y, width, height in pixels"
        )
    return clipped


def cell_means(feature_map: Tensor, boxes: Tensor, grid: int) -> Tensor:
    """Means of a map (H, W, C) inside `grid` x `grid` parts of boxes (R, 4): (R, grid, grid, C).

    Boxes are x1, y1, x2, y2 on the map, whose cells have side 1.
    """
    height, width = feature_map.shape[:2]
    columns = _cell_weights(boxes[:, 0], boxes[:, 2], grid, width).to(feature_map)
    rows = _cell_weights(boxes[:, 1], boxes[:, 3], grid, height).to(feature_map)
    return torch.einsum("rih,hwc,rjw->rijc", rows, feature_map, columns)


def _cell_weights(start: Tensor, end: Tensor, grid: int, length: int) -> Tensor:
    """The shares of a part that lie in each of the `length` cells of a line: (R, grid, length)."""
    start, end = start.double()[:, None], end.double()[:, None]
    edges = start + (end - start) * torch.linspace(0, 1, grid + 1, dtype=torch.double)
    before = (edges[:, :, None] - torch.arange(length)).clamp(0, 1)  # of each cell, before each edge
    weights = before.diff(dim=1)
    return weights / weights.sum(dim=2, keepdim=True)
