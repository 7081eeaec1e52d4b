"""Pointing at what a text refers to: predicted or chosen boxes, their accuracy, the honest baseline.

X-VLM section 4 predicts a box, ALBEF section 6 chooses among proposals. Rows hold `image`, `text` and `box`,
proposals are their `candidates`; boxes of rows are x, y, width, height in pixels. R: rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from .inference import batched, evaluating, number_of, to_model, visual_inputs, visual_of
from .metrics import grounding_accuracy, paired_box_iou, require_no_nan


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
    with evaluating(model):
        for batch, output, sizes in _outputs(model, processor, rows, batch_size, progress):
            boxes.append(processor.post_process_boxes(output.pred_boxes.float().cpu(), sizes))
            targets += [row["box"] for row in batch]
    if not boxes:
        raise ValueError("rows is empty; give at least one row with `image`, `text` and `box`")
    predicted, target = torch.cat(boxes), _corners(targets)
    return GroundingResult(
        predicted, paired_box_iou(predicted, target), grounding_accuracy(predicted, target)
    )


def evaluate_proposals(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    batch_size: int = 32,
    progress: bool = False,
) -> GroundingResult:
    """Choose for each row the one of its `candidates` with the most heat, and compare it with its `box`.

    For heads that give a heat map. Candidates that tie for the most share the chance to be chosen, so that a
    flat map scores like a random one; `boxes` holds the first of them. Rows of a batch that show the same
    image share its pass.

    Raises:
        ValueError: no rows, a row without candidates, a box with negative width or height, a heat map with
        NaN, or `batch_size` below 1.
    """
    boxes, targets, shares = [], [], []
    with evaluating(model):
        for batch, output, sizes in _outputs(model, processor, rows, batch_size, progress):
            candidates = [_candidates(row, len(targets) + i) for i, row in enumerate(batch)]
            scores = processor.rank_proposals(output.heatmap.float().cpu(), candidates, sizes)
            for row, proposals, heat in zip(batch, candidates, scores, strict=True):
                require_no_nan("heatmap", heat)
                chosen = proposals[heat == heat.max()]
                boxes.append(chosen[0].tolist())
                targets.append(row["box"])
                shares.append(_share_right(chosen, row["box"]))
    if not boxes:
        raise ValueError("rows is empty; give at least one row with `image`, `text`, `box` and `candidates`")
    predicted = _corners(boxes)
    return GroundingResult(
        predicted.float(), paired_box_iou(predicted, _corners(targets)), sum(shares) / len(shares)
    )


def random_object_accuracy(rows: Iterable[dict]) -> float:
    """Accuracy to expect from the box of a random object: the share of `candidates` that would be right.

    Computed exactly, by all candidates of all rows; compare every grounding accuracy with it.

    Raises:
        ValueError: no rows, a row without candidates, a box with negative width or height.
    """
    shares = [_share_right(_candidates(row, index), row["box"]) for index, row in enumerate(rows)]
    if not shares:
        raise ValueError("rows is empty; give at least one row with `box` and `candidates`")
    return sum(shares) / len(shares)


def _outputs(
    model, processor, rows: Iterable[dict], batch_size: int, progress: bool
) -> Iterator[tuple[list[dict], ModelOutput, list[tuple[int, int]]]]:
    """Rows, what the model says of them, and (height, width) of each row's image, batch by batch."""
    with tqdm(total=number_of(rows), desc="boxes", disable=not progress) as bar:
        for batch in batched(rows, batch_size):
            visual = visual_inputs(model, processor, [visual_of(row, processor) for row in batch])
            texts = to_model(processor(text=[row["text"] for row in batch], return_tensors="pt"), model)
            yield batch, model(**visual.inputs, **texts, region_image_index=visual.index), visual.sizes
            bar.update(len(batch))


def _candidates(row: dict, index: int) -> Tensor:
    """Boxes (n, 4) x, y, width, height of the objects in the row's image."""
    if not row.get("candidates"):
        raise ValueError(f"rows[{index}] has no `candidates`; give the boxes of all objects of its image")
    return torch.as_tensor(row["candidates"], dtype=torch.float64).view(-1, 4)


def _share_right(boxes: Tensor, target: list) -> float:
    """Share of the boxes (n, 4) with an IoU of at least 0.5 with the target (4,), all x, y, width, height."""
    return grounding_accuracy(_corners(boxes), _corners([target]).expand(len(boxes), 4))


def _corners(boxes: Tensor | list) -> Tensor:
    return box_convert(torch.as_tensor(boxes, dtype=torch.float64).view(-1, 4), "xywh", "xyxy")
