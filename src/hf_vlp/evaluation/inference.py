"""What every evaluation does around a model: no gradients, evaluation mode, batches of rows, and images, or
the regions that LXMERT reads in their place, as the model takes them.
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ..images import load_image
from ..models.processing_lxmert import LXMERTProcessor


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inference mode and `model.eval()`; afterwards every module is in the mode it was in before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def batched(rows: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of `size` rows, the last one shorter.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; use a number of rows of at least 1")
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


class VisualInputs(NamedTuple):
    """Images as a model takes them, equal ones once.

    `inputs` are tensors (I, ...) on the model's device, `index` (R,) tells which of the I images each of R
    given ones is, `sizes` hold (height, width) in pixels of the R.
    """

    inputs: dict[str, Tensor]
    index: Tensor
    sizes: list[tuple[int, int]]

    def repeated(self) -> dict[str, Tensor]:
        """The tensors with a row for each of the given images: (R, ...)."""
        return {name: value[self.index] for name, value in self.inputs.items()}


def visual_of(row: Mapping[str, Any], processor: ProcessorMixin, column: str = "image") -> Any:
    """What the processor reads of a row: its `regions` where it is LXMERT's and they are there, or `column`.

    Raises:
        ValueError: there is neither.
    """
    reads_regions = isinstance(processor, LXMERTProcessor)
    if reads_regions and row.get("regions") is not None:
        return row["regions"]
    if row.get(column) is None:
        columns = f"`regions` or `{column}`" if reads_regions else f"`{column}`"
        raise ValueError(f"a row has the columns {', '.join(row)}; give it {columns}")
    return row[column]


def is_region_row(visual: Any) -> bool:
    """Whether these are the regions of an image as `stack_regions` takes them, and no image."""
    return isinstance(visual, Mapping) and "features" in visual


def visual_inputs(model: PreTrainedModel, processor: ProcessorMixin, visuals: Sequence) -> VisualInputs:
    """Images, whatever `load_image` takes, or region rows, as inputs of `model`.

    Raises:
        BadImageError: an image that cannot be read, named.
        ValueError: region rows for a processor of images, or beside images.
    """
    visuals = [visual if is_region_row(visual) else load_image(visual) for visual in visuals]
    kinds = {is_region_row(visual) for visual in visuals}
    if kinds == {True, False}:
        raise ValueError("some rows have regions and others images only; give regions to all or to none")
    if True in kinds and not isinstance(processor, LXMERTProcessor):
        raise ValueError(f"regions are given, but {type(processor).__name__} reads images; give images")
    places, distinct, index = {}, [], []
    for visual in visuals:
        place = places.setdefault(_content(visual), len(distinct))
        if place == len(distinct):
            distinct.append(visual)
        index.append(place)
    inputs = processor(**{"regions" if True in kinds else "images": distinct}, return_tensors="pt")
    return VisualInputs(
        to_model(inputs, model), torch.tensor(index, device=model.device), [_size(one) for one in visuals]
    )


def _content(visual: Image.Image | Mapping[str, Any]) -> Hashable:
    """What equal images, or equal regions, have in common."""
    if isinstance(visual, Image.Image):
        return visual.size, visual.tobytes()
    return tuple(np.asarray(visual[name]).tobytes() for name in ("features", "boxes"))


def _size(visual: Image.Image | Mapping[str, Any]) -> tuple[int, int]:
    if isinstance(visual, Image.Image):
        return visual.height, visual.width
    height, width = visual["image_size"]
    return int(height), int(width)


def number_of(rows: Iterable) -> int | None:
    """Number of rows where it is known, for a progress bar; None for a stream."""
    return len(rows) if hasattr(rows, "__len__") else None


def to_model(batch: BatchFeature, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a processor's batch on the model's device, pictures in the model's dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }
