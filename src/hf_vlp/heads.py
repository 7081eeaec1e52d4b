"""Which head does which task, and loading it from a folder or from the Hub."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    PreTrainedModel,
)
from transformers.utils import logging

from .models.auto import (
    MODELS,
    AutoModelForCaptioning,
    AutoModelForGrounding,
    AutoModelForRetrieval,
    AutoModelForTextAssignment,
    AutoModelForVisualEntailment,
    AutoModelForVisualReasoning,
)
from .models.momentum import LearnsFromTeacher

AUTO_CLASSES = {
    "pretrain": AutoModelForPreTraining,
    "retrieval": AutoModelForRetrieval,
    "grounding": AutoModelForGrounding,
    "vqa": AutoModelForVisualQuestionAnswering,
    "reasoning": AutoModelForVisualReasoning,
    "entailment": AutoModelForVisualEntailment,
    "assignment": AutoModelForTextAssignment,
    "captioning": AutoModelForCaptioning,
    "features": AutoModel,
}


def load_head(
    task: str,
    name: str,
    needs_weights: bool = True,
    teacher: bool = False,
    image_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """The head for `task` of the model in the folder or Hub repository `name`, which may hold another head
    with the weights.

    Args:
        task: one of `AUTO_CLASSES`, such as "vqa".
        needs_weights: refuse a head that would start new; without it such a head may be trained.
        teacher: hold the momentum teacher, where the model learns from one.
        image_size: pixels a side, if others than the model's.
        dtype: of the weights, if another than the one they were saved in.
        hub: where `name` is on the Hub, what `from_pretrained` takes: `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: no such task, no model of this package, no head for the task, or weights that the folder
            lacks.
    """
    if task not in AUTO_CLASSES:
        raise ValueError(f"task is {task!r}; the tasks are {', '.join(AUTO_CLASSES)}")
    config = AutoConfig.from_pretrained(name, **hub)
    if type(config) not in MODELS:
        raise ValueError(f"{name} is a model of type {config.model_type}; give one of hf_vlp")
    tasks = [one for one, auto_class in AUTO_CLASSES.items() if type(config) in auto_class._model_mapping]
    if task not in tasks:
        raise ValueError(
            f"{name} is of type {config.model_type}, which has no head for {task}; it has {', '.join(tasks)}"
        )
    saved_as = (config.architectures or ["a model without a head"])[0]
    head = _head_of(AUTO_CLASSES[task]._model_mapping[type(config)], saved_as, needs_weights)
    if issubclass(head, LearnsFromTeacher):
        config.momentum_teacher = teacher
    try:
        with _without_report() if needs_weights else contextlib.nullcontext():
            model, info = head.from_pretrained(
                name,
                config=config,
                image_size=image_size,
                output_loading_info=True,
                **hub,
                **({} if dtype is None else {"dtype": dtype}),
            )
    except RuntimeError as error:
        raise ValueError(
            f"{name} holds {saved_as}, some of whose weights have other sizes in {head.__name__}; train it "
            "from a folder without them, such as the pre-trained model"
        ) from error
    # weights of a twin, or of pretraining under other names, are a place to start from, no trained part
    starts_from_others = head._twins or getattr(head, "_pretrained_keys", None)
    is_new = info["unexpected_keys"] or (starts_from_others and saved_as != head.__name__)
    is_new = model.new_parameters or is_new
    if needs_weights and is_new:
        raise ValueError(
            f"{name} holds {saved_as}; as {head.__name__} it would be new in part and has to be trained "
            f"first: hf-vlp train {task} {name} DATA --out DIR"
        )
    return model.eval()


def _head_of(
    heads: type[PreTrainedModel] | tuple[type[PreTrainedModel], ...], saved_as: str, needs_weights: bool
) -> type[PreTrainedModel]:
    """Of several heads for a task the one that was saved, or needs nothing more; otherwise the first.

    X-VLM's weak grounding is its retrieval: such a folder points with heat maps, but may learn boxes.
    """
    if not isinstance(heads, tuple):
        return heads
    parents = {head: head.__mro__ if needs_weights else [head] for head in heads}
    fitting = [head for head in heads if saved_as in {one.__name__ for one in parents[head]}]
    return (fitting or heads)[0]


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' list of the weights that are not there, where these are an error anyway."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
