"""`hf-vlp train`: a head on rows, with the Trainer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from transformers import HfArgumentParser, PreTrainedModel, ProcessorMixin, set_seed

from ..data.caption_collators import CaptioningCollator, SelfCriticalCollator
from ..data.collators import (
    CaptionCollator,
    Collator,
    GroundingCollator,
    ImageTextCollator,
    RegionCollator,
    RegionGroundingCollator,
    RetrievalCollator,
)
from ..data.lxmert_collators import (
    LXMERTEntailmentCollator,
    LXMERTGroundingCollator,
    LXMERTPairCollator,
    LXMERTPretrainingCollator,
    LXMERTQuestionCollator,
    LXMERTRetrievalCollator,
)
from ..data.masking import TokenMasking
from ..data.mixing import MixedCollator, MixedDataset
from ..data.soho_collators import SOHOPretrainingCollator, SOHOQuestionCollator
from ..data.task_collators import EntailmentCollator, PairCollator, QuestionAnsweringCollator
from ..data.transforms import as_texts
from ..evaluation.caption_metrics import cider_d_reward
from ..evaluation.question_answering import answer_classes
from ..heads import load_head
from ..loading import load_processor, place_extractor
from ..models.image_text_heatmaps import HeatmapHead
from ..models.modeling_albef import ALBEFForPreTraining
from ..models.modeling_lxmert import LXMERTPreTrainedModel
from ..models.modeling_soho import SOHOPreTrainedModel
from ..models.modeling_xvlm import XVLMForGrounding, XVLMForPreTraining
from ..training import RECIPES, SelfCriticalTrainer, VLPTrainer, VLPTrainingArguments
from .predict import read_answers
from .rows import read_model_rows, read_rows, without_images

REGION_COLUMNS = ("image", "phrases", "boxes")
TEXTS_PER_IMAGE = 24 / 9  # of X-VLM's domain pretraining for grounding
# task: collator, and the columns that it reads, images first
TASKS: dict[str, tuple[Callable[..., Collator], tuple[str, ...]]] = {
    "pretrain": (ImageTextCollator, ("image", "caption")),
    "retrieval": (RetrievalCollator, ("image", "caption", "image_id")),
    "grounding": (GroundingCollator, ("image", "text", "box")),
    "vqa": (QuestionAnsweringCollator, ("image", "question", "answers")),
    "reasoning": (PairCollator, ("images", "sentence", "label")),
    "entailment": (EntailmentCollator, ("image", "sentence", "label")),
    "assignment": (CaptionCollator, ("image", "caption")),
    "captioning": (CaptioningCollator, ("image", "caption")),
}
LXMERT_TASKS: dict[str, tuple[Callable[..., Collator], tuple[str, ...]]] = {
    "pretrain": (LXMERTPretrainingCollator, ("image", "caption", "image_id")),
    "retrieval": (LXMERTRetrievalCollator, ("image", "caption", "image_id")),
    "grounding": (LXMERTGroundingCollator, ("image", "text", "box")),
    "vqa": (LXMERTQuestionCollator, ("image", "question", "answers")),
    "reasoning": (LXMERTPairCollator, ("images", "sentence", "label")),
    "entailment": (LXMERTEntailmentCollator, ("image", "sentence", "label")),
}
SOHO_TASKS: dict[str, tuple[Callable[..., Collator], tuple[str, ...]]] = {
    **{task: (partial(make, augment=False), columns) for task, (make, columns) in TASKS.items()},
    "pretrain": (SOHOPretrainingCollator, ("image", "caption", "image_id")),
    "vqa": (SOHOQuestionCollator, ("image", "question", "answers")),
}


class CaptionOptions(NamedTuple):
    """How captions are learnt: what they begin with and how much they are smoothed, None for the model's own,
    and whether by self-critical training."""

    prompt: str | None = None
    label_smoothing: float | None = None
    self_critical: bool = False


def run(
    task: str,
    name: str,
    data: str,
    out: Path,
    regions: str | None = None,
    features: Path | None = None,
    extractor: str | None = None,
    answers: Path | None = None,
    split: str = "train",
    recipe: str | None = None,
    image_size: int | None = None,
    augment: bool = True,
    teacher: bool = True,
    resume: bool = False,
    fields: Mapping[str, str] | None = None,
    captions: CaptionOptions = CaptionOptions(),  # noqa: B008
) -> None:
    """Train the head for `task` on the rows `data`, from the weights in `name`, and save it with its
    processor to `out`. X-VLM learns grounding from rows of texts, or of regions.

    Args:
        regions: rows of regions, mixed into X-VLM's pre-training.
        features: folder of LXMERT's regions, for rows that have none.
        extractor: what finds LXMERT's regions in images, in place of the model's own.
        answers: file of the answers that LXMERT or SOHO is to choose from in question answering; what the
            head knows of them is kept.
        split: which of several.
        recipe: a paper's schedule, one of `training.RECIPES`.
        image_size: pixels a side, if others than the model's.
        augment: crop, mirror and recolour images; SOHO's stay as they are.
        teacher: learn from the momentum teacher, where the paper does.
        resume: go on from the last complete checkpoint in `out`.
        fields: of `VLPTrainingArguments`, values as text; they win over the recipe's.
        captions: of captioning.

    Raises:
        ValueError: as `load_head`, `load_processor` and `read_model_rows`, an unknown recipe or field,
            regions, answers or options of captions for another head, LXMERT or SOHO without answers, or
            nothing to resume from.
    """
    arguments = training_arguments(out, recipe, fields or {})
    set_seed(arguments.seed)
    model = load_head(task, name, needs_weights=False, teacher=teacher, image_size=image_size)
    processor = load_processor(name, extractor)
    if image_size is not None:
        processor.image_processor.size = {"height": image_size, "width": image_size}
    if task == "vqa" and answer_classes(model) is not None:
        _choose_among(model, answers and read_answers(answers))
    elif answers is not None:
        raise ValueError(
            f"answers is {answers}, but {type(model).__name__} has no use for them; leave it out"
        )
    if task == "captioning":
        _set_captions(model, processor, captions)
    elif captions != CaptionOptions():
        raise ValueError(f"captions is {captions}, which {task} has no use for; leave its options out")
    batch_size = arguments.per_device_train_batch_size
    rows, collator = _rows_and_collator(
        task, model, processor, data, split, augment, features, batch_size=batch_size
    )
    if "regions" not in rows.column_names:
        # processes beside this one, which read rows then, have no access to its GPU
        place_extractor(processor, "cpu" if arguments.dataloader_num_workers else arguments.device)
    if regions is not None:
        if not isinstance(model, XVLMForPreTraining):
            raise ValueError(f"regions is {regions}, but {type(model).__name__} has no use for them")
        rows = MixedDataset(rows, read_rows(regions, split, REGION_COLUMNS))
        of_regions = RegionCollator(processor=processor, augment=augment, group_equal_texts=True)
        collator = MixedCollator(collator, of_regions)
    make_trainer = VLPTrainer
    if captions.self_critical:
        collator = SelfCriticalCollator(processor=processor, augment=augment)
        make_trainer = partial(SelfCriticalTrainer, reward=_reward(rows, processor))
    trainer = make_trainer(
        model, arguments, train_dataset=rows, data_collator=collator, processing_class=processor
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def training_arguments(out: Path, recipe: str | None, fields: Mapping[str, str]) -> VLPTrainingArguments:
    """Those of the recipe, then `fields`, parsed as their types ask.

    Raises:
        ValueError: an unknown recipe or field, or a value that is not of its type.
    """
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; the recipes are {', '.join(RECIPES)}")
    known = {field.name for field in dataclasses.fields(VLPTrainingArguments) if field.init}
    for field in fields:
        if field not in known:
            raise ValueError(f"{field!r} is no field of VLPTrainingArguments; see docs/training.md")
    parser = HfArgumentParser(VLPTrainingArguments)
    parser.set_defaults(**RECIPES.get(recipe, {}))
    parser.error = _refuse
    words = [word for name, value in fields.items() for word in (f"--{name}", value)]
    return parser.parse_args_into_dataclasses(["--output_dir", str(out), *words])[0]


def _refuse(message: str):
    raise ValueError(message)


def _choose_among(model: PreTrainedModel, answers: Sequence[str] | None):
    """Give a head that chooses among answers those, and say how many of them it knows."""
    known, classes = model.config.answers, answer_classes(model)
    if answers is not None:
        coverage = model.load_answers(answers, known or [f"<{i}>" for i in range(classes)])
        print(f"the model knows {coverage}")
    elif known is None:
        raise ValueError(
            f"answers is None, and the model does not say what its {classes} answers are; give the file of "
            "the answers to choose from"
        )


def _set_captions(model: PreTrainedModel, processor: ProcessorMixin, captions: CaptionOptions):
    """Prompt, smoothing, and what captions begin and end with, which are saved with the model."""
    text_config, tokenizer = model.config.text_config, processor.tokenizer
    text_config.bos_token_id, text_config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    if captions.prompt is not None:
        processor.prompt = processor.clean_text(captions.prompt) if captions.prompt else ""
    if captions.label_smoothing is not None:
        if not 0 <= captions.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {captions.label_smoothing}; use 0 to 1, less than 1")
        model.config.label_smoothing = captions.label_smoothing


def _reward(rows: datasets.Dataset, processor: ProcessorMixin) -> Callable[..., Any]:
    """CIDEr-D by what words are frequent in the captions of the rows."""
    texts = (as_texts(row["caption"]) for row in without_images(rows))
    return cider_d_reward([[processor.clean_text(text) for text in of_image] for of_image in texts])


def _rows_and_collator(
    task: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data: str,
    split: str,
    augment: bool,
    features: Path | None = None,
    batch_size: int = 9,
) -> tuple[datasets.Dataset, Collator]:
    """The rows of a task as the model learns from them, and the collator for them; of regions it keeps as
    many as X-VLM's domain pretraining does of `batch_size` images."""
    make, columns = _collator(task, model, processor, augment)
    if isinstance(model, XVLMForGrounding) and _are_regions(data, split):  # its domain pretraining
        max_pairs = round(TEXTS_PER_IMAGE * batch_size)
        make = partial(RegionGroundingCollator, augment=augment, max_pairs=max_pairs)
        columns = REGION_COLUMNS
    rows = read_model_rows(model, data, split, columns, features)
    if isinstance(model, HeatmapHead) and "caption" not in rows.column_names:
        rows = rows.rename_column("text", "caption")
    return rows, make(processor=processor)


def _are_regions(data: str, split: str) -> bool:
    """Whether rows have phrases and boxes, several for each image."""
    return set(REGION_COLUMNS) <= set(read_rows(data, split, ("image",)).column_names)


def _collator(
    task: str, model: PreTrainedModel, processor: ProcessorMixin, augment: bool
) -> tuple[Callable[..., Collator], Sequence[str]]:
    """The collator of a task for the model, and the columns that it reads."""
    if isinstance(model, LXMERTPreTrainedModel):  # regions stay as they are
        make, columns = LXMERT_TASKS[task]
        has_answers = task in ("pretrain", "vqa")
        return partial(make, answers=model.config.answers or ()) if has_answers else make, columns
    if isinstance(model, SOHOPreTrainedModel):
        make, columns = SOHO_TASKS[task]
        return partial(make, answers=model.config.answers) if task == "vqa" else make, columns
    make, columns = TASKS[task]
    if isinstance(model, ALBEFForPreTraining):
        make = partial(make, masking=TokenMasking(processor.tokenizer))
    if isinstance(model, HeatmapHead):  # from texts alone, on images that keep all objects
        make, columns = partial(RetrievalCollator, crop_scale=None), ("image", "image_id")
    return partial(make, augment=augment), columns
