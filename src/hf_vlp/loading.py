"""A head and its processor, on the device where there is one."""

from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from .heads import load_head
from .models.processing_lxmert import LXMERTProcessor


def load_trained(
    task: str, name: str, extractor: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The trained head for `task` in `name`, on the GPU if there is one, and its processor.

    Raises:
        ValueError: as `load_head` and `load_processor`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_head(task, name).to(device), load_processor(name, extractor)


def load_processor(name: str, extractor: str | None = None, **hub: Any) -> ProcessorMixin:
    """The processor in `name`; LXMERT's with what finds regions in images, as `load_extractor` takes it, in
    place of its own. `hub` are options of `from_pretrained` such as `revision` and `token`.

    Raises:
        ValueError: an extractor for a model that reads images.
    """
    processor = AutoProcessor.from_pretrained(name, **hub)
    if extractor is None:
        return processor
    if not isinstance(processor, LXMERTProcessor):
        raise ValueError(f"extractor is {extractor}, but the model in {name} reads images; leave it out")
    processor.extractor = extractor
    return processor


def place_extractor(processor: ProcessorMixin, device: torch.device | str) -> None:
    """Load what finds regions in images, and move it to `device`; for other processors than LXMERT's nothing.

    Raises:
        ValueError: there is none.
    """
    if isinstance(processor, LXMERTProcessor):
        processor.region_extractor.to(device)
