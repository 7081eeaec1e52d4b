"""Boxes of the bottom-up-attention detector, from anchors to the regions it gives.

Boxes are x1, y1, x2, y2 and hold their last pixels: a box from 0 to 15 is 16 pixels wide. A: anchors of a
cell, P: boxes, K: classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms


def make_anchors(base_size: int, ratios: Sequence[float], scales: Sequence[int]) -> Tensor:
    """Anchors of the cell at the origin, all scales of the first ratio first: (A, 4).

    Their centre is that of the pixels 0 to `base_size` - 1, and sides are whole numbers at scale 1.
    """
    boxes = []
    for ratio in ratios:
        width = round(math.sqrt(base_size**2 / ratio))
        height = round(width * ratio)
        for scale in scales:
            boxes.append([-width * scale, -height * scale, width * scale, height * scale])
    half_sides = torch.tensor(boxes, dtype=torch.float) / 2
    return half_sides + (base_size - 1) / 2 + torch.tensor([0.5, 0.5, -0.5, -0.5])


def tile_anchors(anchors: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Anchors (A, 4) at every cell of a map, row by row: (height * width * A, 4)."""
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1).to(anchors)  # (height, width, 4)
    return (shifts[:, :, None] + anchors).flatten(0, 2)


def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Move boxes (P, 4) by deltas (P, 4): centres in units of the sides, sides by their logarithm."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    centres = boxes[:, :2] + sides / 2 + deltas[:, :2] * sides
    sides = sides * deltas[:, 2:].exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (P, 4) inside an image: 0 to its last pixel."""
    last = boxes.new_tensor([width - 1, height - 1] * 2)
    return torch.minimum(boxes, last).clamp(min=0)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: which of the boxes (P, 4) stay, best first; of equal ones the first."""
    return nms(_with_last_pixels(boxes), scores, threshold)


def best_surviving_scores(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The highest score of each box (P, 4) in those classes where it survives non-maximum suppression: (P,).

    Scores are (P, K). The classes are suppressed on their own, but all at once: at each rank, every class
    looks at its box of that rank. A box that survives cannot hurt one of a higher rank, which would have
    suppressed it.
    """
    boxes = _with_last_pixels(boxes)
    overlaps = box_iou(boxes, boxes).double() >= threshold  # (P, P)
    overlaps.fill_diagonal_(False)
    classes = torch.arange(scores.shape[1], device=scores.device)
    alive = torch.ones_like(scores.T, dtype=torch.bool)  # (K, P)
    for box in scores.argsort(dim=0, descending=True, stable=True):  # (K,), rank by rank
        alive &= ~(overlaps[box] & alive[classes, box, None])
    return (scores * alive.T).amax(dim=1)


def choose_regions(scores: Tensor, num_regions: int, threshold: float) -> Tensor:
    """The boxes of the highest of the scores (P,), best first and of equal ones the first; but where exactly
    `num_regions` reach the threshold, they stay in order. (R,), R = min(P, num_regions)."""
    confident = (scores >= threshold).nonzero().squeeze(1)
    if len(confident) == num_regions:
        return confident
    return scores.argsort(descending=True, stable=True)[:num_regions]


def _with_last_pixels(boxes: Tensor) -> Tensor:
    """The same boxes up to where their last pixels end, as torchvision measures them."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])
