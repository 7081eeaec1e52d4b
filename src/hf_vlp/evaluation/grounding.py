"""Pointing at what a text refers to: predicted boxes, their accuracy, the honest baseline. X-VLM section 4.

Rows hold `image`, `text` and `box`; boxes of rows are x, y, width, height in pixels. R: rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .inference import batched, evaluating, images_of, number_of, to_model
from .metrics import grounding_accuracy, paired_box_iou


@dataclass
class GroundingResult:
    """Predicted `boxes` (R, 4) x1, y1, x2, y2 in pixels, `ious` (R,), and the share of IoUs from 0.5 on."""

    boxes: Tensor
    ious: Tensor
    accuracy: float


def evaluate_grounding(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    batch_size: int = 32,
    progress: bool = False,
) -> GroundingResult:
    """Predict one box per row and compare it with the row's `box`.

    Rows of a batch that show the same image share its pass.

    Raises:
        ValueError: no rows, a box with negative width or height, or `batch_size` below 1.
    """
    boxes, targets = [], []
    with evaluating(model), tqdm(total=number_of(rows), desc="boxes", disable=not progress) as bar:
        for batch in batched(rows, batch_size):
            boxes.append(_predict(model, processor, batch))
            targets += [row["box"] for row in batch]
            bar.update(len(batch))
    if not boxes:
        raise ValueError("rows is empty; give at least one row with `image`, `text` and `box`")
    predicted, target = torch.cat(boxes), _corners(targets)
    return GroundingResult(
        predicted, paired_box_iou(predicted, target), grounding_accuracy(predicted, target)
    )


def random_object_accuracy(rows: Iterable[dict]) -> float:
    """Accuracy to expect from the box of a random object: the share of `candidates` that would be right.

    Computed exactly, by all candidates of all rows; compare every grounding accuracy with it.

    Raises:
        ValueError: no rows, a row without candidates, a box with negative width or height.
    """
    shares = []
    for index, row in enumerate(rows):
        if not row.get("candidates"):
            raise ValueError(f"rows[{index}] has no `candidates`; give the boxes of all objects of its image")
        candidates = _corners(row["candidates"])
        target = _corners([row["box"]]).expand_as(candidates)
        shares.append(grounding_accuracy(candidates, target))
    if not shares:
        raise ValueError("rows is empty; give at least one row with `box` and `candidates`")
    return sum(shares) / len(shares)


def _predict(model, processor, batch: list[dict]) -> Tensor:
    """Boxes (R, 4) x1, y1, x2, y2 in pixels on the CPU."""
    images = images_of(batch)
    contents = [(image.size, image.tobytes()) for image in images]
    distinct = dict(zip(contents, images, strict=True))
    place = {content: i for i, content in enumerate(distinct)}
    pixels = processor(images=list(distinct.values()), return_tensors="pt")
    texts = processor(text=[row["text"] for row in batch], return_tensors="pt")
    region_image_index = torch.tensor([place[content] for content in contents], device=model.device)
    output = model(**to_model(pixels, model), **to_model(texts, model), region_image_index=region_image_index)
    sizes = [(image.height, image.width) for image in images]
    return processor.post_process_boxes(output.pred_boxes.float().cpu(), sizes)


def _corners(boxes: list) -> Tensor:
    return box_convert(torch.as_tensor(boxes, dtype=torch.float64).view(-1, 4), "xywh", "xyxy")
