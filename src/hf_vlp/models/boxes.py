"""Boxes and the image patches they touch.

R: regions, G: patches along one side, N = G * G patches. Boxes are `cxcywh` or `xyxy`, both relative to the
image (0..1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image, generalized_box_iou_loss


def patch_mask(boxes: Tensor, grid: int) -> Tensor:
    """Mark every patch that a box touches, at least one per box: (R, 4) `xyxy` -> (R, N) bool, row by row.

    X-VLM section 3; the rule of the official code, which rounds outwards.
    """
    boxes = (boxes * grid).double()
    # 1e-6 swallows the rounding of boxes that end on a patch's edge
    first = boxes[:, :2].add(1e-6).floor().clamp(0, grid - 1)  # (R, 2), x and y
    last = torch.maximum(boxes[:, 2:].sub(1e-6).ceil().clamp(max=grid), first + 1)  # (R, 2), one past the end
    cells = torch.arange(grid, device=boxes.device)
    inside = (cells >= first[..., None]) & (cells < last[..., None])  # (R, 2, G)
    return (inside[:, 1, :, None] & inside[:, 0, None, :]).flatten(1)  # (R, G, G) -> (R, N)


def box_losses(predicted: Tensor, target: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L1 and GIoU loss of `cxcywh` boxes (R, 4), each summed over boxes and divided by their number.

    Rows where `counted` (R,) is False are left out; without any row left, both are 0. X-VLM section 3.
    """
    counted = predicted.new_ones(len(predicted)) if counted is None else counted.to(predicted.dtype)
    total = counted.sum().clamp(min=1)
    l1 = (predicted - target).abs().sum(dim=-1)  # (R,)
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, target))
    giou = generalized_box_iou_loss(*corners)  # (R,)
    return (l1 * counted).sum() / total, (giou * counted).sum() / total


def heatmap_boxes(heatmap: Tensor, share: float = 0.5) -> Tensor:
    """The `cxcywh` box (R, 4) around the cells of each map (R, G, G) with at least `share` of its maximum."""
    grid = heatmap.shape[-1]
    hot = heatmap >= share * heatmap.amax(dim=(1, 2), keepdim=True)
    edges = []
    for axis in (1, 2):  # x: which columns are hot, y: which rows
        cells = hot.any(dim=axis).to(torch.uint8)  # (R, G)
        edges.append((cells.argmax(dim=1), grid - cells.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = edges
    corners = torch.stack([left, top, right, bottom], dim=1) / grid
    return box_convert(corners, "xyxy", "cxcywh")


def boxes_in_pixels(boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Relative `cxcywh` boxes (R, 4) to left, top, right, bottom in pixels, clipped to the image.

    `image_sizes` holds (height, width) of the image of each box.

    Raises:
        ValueError: not as many sizes as boxes.
    """
    if len(boxes) != len(image_sizes):
        raise ValueError(
            f"pred_boxes has {len(boxes)} boxes and image_sizes {len(image_sizes)}; give one each"
        )
    corners = box_convert(boxes.detach().float().cpu(), "cxcywh", "xyxy")
    return torch.stack(
        [
            clip_boxes_to_image(box * torch.tensor([width, height, width, height]), (height, width))
            for box, (height, width) in zip(corners, image_sizes, strict=True)
        ]
    )


def relative_corners(
    boxes: Sequence[Tensor | Sequence], image_sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Boxes of each image, (r, 4) x, y, w, h in pixels, to relative `xyxy` boxes (r, 4).

    `image_sizes` holds (height, width) of each image.

    Raises:
        ValueError: not as many sizes as images; a box that is empty, inverted, or reaches more than a pixel
            out of its image.
    """
    if len(boxes) != len(image_sizes):
        raise ValueError(
            f"boxes are given for {len(boxes)} images and image_sizes for {len(image_sizes)}; give both"
        )
    return [
        _relative_corners(some, size, i)
        for i, (some, size) in enumerate(zip(boxes, image_sizes, strict=True))
    ]


def _relative_corners(boxes: Tensor | Sequence, image_size: tuple[int, int], image: int) -> Tensor:
    height, width = image_size
    boxes = torch.as_tensor(boxes, dtype=torch.float).reshape(-1, 4)
    corners = box_convert(boxes, "xywh", "xyxy")
    size = torch.tensor([width, height, width, height], dtype=torch.float)
    bad = (boxes[:, 2:] <= 0).any(dim=1) | (corners < -1).any(dim=1) | (corners > size + 1).any(dim=1)
    if bad.any():
        raise ValueError(
            f"boxes of image {image} hold {boxes[bad][0].tolist()}, which does not lie in its {width} x "
            f"{height} pixels; give x, y, w, h in pixels with w, h > 0, clipped to the image"
        )
    return (corners / size).clamp(0, 1)
