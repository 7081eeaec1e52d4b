"""Official ALBEF checkpoints: files of pretraining, of NLVR2's text assignment, and of every task."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.base import VLPPreTrainedModel
from ..models.configuration_albef import ALBEFConfig
from ..models.modeling_albef import ALBEFForGrounding, ALBEFForPreTraining, ALBEFForRetrieval
from ..models.modeling_albef_tasks import (
    ALBEFForQuestionAnswering,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
)
from ..models.processing_albef import ALBEFProcessor
from .bert import (
    DECODER_KEYS,
    PAIR_KEYS,
    TEXT_KEYS,
    official_name,
    read_text_config,
    strip_bert,
)
from .checkpoints import Conversion, OfficialWeights, write_folder
from .detect import refuse_other_papers
from .keys import KeyReport, load_into, rename_keys
from .vision import read_vit, vit_keys

_KEYS: dict[str, str | list[str]] = {
    **vit_keys("visual_encoder"),
    **TEXT_KEYS,
    **PAIR_KEYS,
    **DECODER_KEYS,
    r"(itm|ta)_head\.(weight|bias)": r"\1_head.\2",
    r"cls_head\.0\.(weight|bias)": r"cls_head.fc1.\1",
    r"cls_head\.2\.(weight|bias)": r"cls_head.fc2.\1",
}
_TEACHER_KEYS: dict[str, str | list[str]] = {
    r"teacher\." + official: [f"teacher.{name}" for name in ours]
    if isinstance(ours, list)
    else f"teacher.{ours}"
    for official, ours in _KEYS.items()
}
_QUEUE_KEYS = {
    r"(image|text)_queue": r"queue.\1_features",
    "idx_queue": "queue.image_ids",
    "queue_ptr": "queue.pointer",
}
_BUFFERS = {r".*\.position_ids": "buffer, made anew"}
_MOMENTUM = {
    r"teacher\..*": "momentum teacher, for training only",
    r".*_queue|queue_ptr": "queue of the momentum teacher",
}


def convert_state_dict(
    official: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    momentum: bool = False,
    grounding: bool = False,
    num_vision_heads: int | None = None,
) -> Conversion:
    """Official weights to our model; task, depths, widths and image size are read from the tensors.

    Args:
        official: the weights, with or without those of the momentum teacher.
        num_attention_heads: of trunk and text layers, which tensors do not tell; without it they are 64 wide,
            as in ViT-B and BERT.
        momentum: keep the momentum teacher and its queues, to go on with training.
        grounding: make an `ALBEFForGrounding` of a retrieval file, of which `refcoco.pth` is one.
        num_vision_heads: of the trunk, where it has others than the text layers.

    Raises:
        ValueError: the weights belong to another model, are incomplete, or do not fit; there is no momentum
            teacher to keep; `grounding` with a file of another kind.
    """
    model_class = _head_class(official, grounding)
    if momentum and not any(key.split(".")[0].endswith("_m") for key in official):
        raise ValueError(
            "momentum=True, but the checkpoint holds no momentum teacher, as the released files of tasks do; "
            "convert it without"
        )
    num_images = 2 if model_class in (ALBEFForTextAssignment, ALBEFForVisualReasoning) else 1
    weights = OfficialWeights({strip_bert(key): value for key, value in official.items()})
    config = _read_config(weights, num_attention_heads, num_vision_heads or num_attention_heads, num_images)
    config.momentum_teacher = momentum
    alias = partial(_name, num_text_layers=config.text_config.num_text_layers, num_images=num_images)
    table, dropped = _KEYS | _TEACHER_KEYS | _QUEUE_KEYS, _BUFFERS if momentum else _BUFFERS | _MOMENTUM
    renamed, report = rename_keys(official, table, dropped, alias)
    model = model_class(config)
    load_into(model, _reshape(renamed), report)
    return Conversion(model.eval(), report)


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase = "bert-base-uncased",
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    momentum: bool = False,
    grounding: bool = False,
) -> KeyReport:
    """Convert an official file into a folder with model, processor and code, or write nothing.

    Args:
        checkpoint: the official file.
        output_dir: a folder that does not exist yet, or is empty.
        tokenizer: the tokenizer the text encoder was trained with; a name, a folder, or the tokenizer itself.
        image_size: resample the trunk's position table to this size in pixels.
        num_attention_heads: of trunk and text layers, where they are not 64 wide.
        momentum: keep the momentum teacher and its queues, to go on with training.
        grounding: make an `ALBEFForGrounding` of a retrieval file, of which `refcoco.pth` is one.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: as `convert_state_dict`; a file that cannot be read; a folder that is not empty; a
            tokenizer that does not fit the word embeddings.
    """
    convert = partial(
        convert_state_dict, num_attention_heads=num_attention_heads, momentum=momentum, grounding=grounding
    )
    keep = {"keep_teacher": True} if momentum else {}
    return write_folder(checkpoint, output_dir, convert, ALBEFProcessor, tokenizer, image_size, **keep)


def _head_class(state: Mapping[str, Tensor], grounding: bool) -> type[VLPPreTrainedModel]:
    refuse_other_papers(state, "ALBEF")
    model_class = _detect(state)
    if not grounding:
        return model_class
    if model_class is not ALBEFForRetrieval:
        raise ValueError(
            f"grounding=True, but the checkpoint is one for {model_class.__name__}; leave it out, or give a "
            "file with the keys of retrieval, such as refcoco.pth"
        )
    return ALBEFForGrounding


def _detect(state: Mapping[str, Tensor]) -> type[VLPPreTrainedModel]:
    if any(key.startswith("text_decoder.") for key in state):
        return ALBEFForQuestionAnswering
    if "ta_head.weight" in state:
        return ALBEFForTextAssignment
    if "cls_head.2.weight" in state:
        return ALBEFForVisualReasoning if len(state["cls_head.2.weight"]) == 2 else ALBEFForVisualEntailment
    if "text_encoder.cls.predictions.bias" in state:
        return ALBEFForPreTraining
    if "itm_head.weight" in state:
        return ALBEFForRetrieval
    raise ValueError(
        f"the checkpoint has no head of an ALBEF file (its first keys are {list(state)[:3]}); give the file "
        "of a pretrained or fine-tuned ALBEF"
    )


def _name(key: str, num_text_layers: int, num_images: int) -> str:
    """As `official_name`, with the momentum teacher's `x_m` as `teacher.x`."""
    part, _, rest = key.partition(".")
    if not part.endswith("_m"):
        return official_name(key, num_text_layers, num_images)
    return "teacher." + official_name(f"{part.removesuffix('_m')}.{rest}", num_text_layers, num_images)


def _reshape(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The temperature as a row of one, the queues as rows of features."""
    shaped = dict(renamed)
    for name, value in renamed.items():
        if name in ("model.temperature", "queue.image_ids"):
            shaped[name] = value.reshape(-1)
        elif name == "queue.pointer":
            shaped[name] = value.squeeze()
        elif name in ("queue.image_features", "queue.text_features"):
            shaped[name] = value.mT
    return shaped


def _read_config(
    state: Mapping[str, Tensor], num_text_heads: int | None, num_vision_heads: int | None, num_images: int
) -> ALBEFConfig:
    fields = {}
    if "vision_proj.weight" in state:
        fields["projection_dim"] = len(state["vision_proj.weight"])
    if "image_queue" in state:
        fields["queue_size"] = state["image_queue"].shape[1]
    text = read_text_config(state, num_text_heads, num_images)
    return ALBEFConfig(
        vision_config=read_vit(state, "visual_encoder", num_vision_heads), text_config=text, **fields
    )
