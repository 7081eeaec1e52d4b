"""Official X-VLM checkpoints, with any of its encoders: files of pretraining, of NLVR2's text assignment,
and of every task."""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, SwinConfig

from ..models.configuration_xvlm import XVLMConfig
from ..models.modeling_xvlm import (
    XVLMForGrounding,
    XVLMForPreTraining,
    XVLMForRetrieval,
    XVLMPreTrainedModel,
)
from ..models.modeling_xvlm_captioning import XVLMForCaptioning
from ..models.modeling_xvlm_tasks import (
    XVLMForQuestionAnswering,
    XVLMForTextAssignment,
    XVLMForVisualReasoning,
)
from ..models.processing_xvlm import XVLMProcessor
from .bert import DECODER_KEYS, PAIR_KEYS, TEXT_KEYS, official_name, read_text_config, strip_bert
from .checkpoints import Conversion, OfficialWeights, write_folder
from .detect import refuse_other_papers
from .keys import KeyReport, load_into, rename_keys
from .vision import clip_keys, read_clip, read_vit, vit_keys

_BLOCK, _OUR_BLOCK = (
    r"vision_encoder\.layers\.(\d+)\.blocks\.(\d+)\.",
    r"model.vision_model.trunk.encoder.layers.\1.blocks.\2.",
)
_TRUNK = "model.vision_model.trunk."
_KEYS: dict[str, str | list[str]] = {
    r"vision_encoder\.patch_embed\.proj\.(weight|bias)": _TRUNK
    + r"embeddings.patch_embeddings.projection.\1",
    r"vision_encoder\.patch_embed\.norm\.(weight|bias)": _TRUNK + r"embeddings.norm.\1",
    r"vision_encoder\.norm\.(weight|bias)": _TRUNK + r"layernorm.\1",
    r"vision_encoder\.layers\.(\d+)\.downsample\.(.+)": _TRUNK + r"encoder.layers.\1.downsample.\2",
    _BLOCK + r"norm1\.(weight|bias)": _OUR_BLOCK + r"layernorm_before.\3",
    _BLOCK + r"norm2\.(weight|bias)": _OUR_BLOCK + r"layernorm_after.\3",
    _BLOCK + r"mlp\.(fc[12])\.(weight|bias)": _OUR_BLOCK + r"mlp.\3.\4",
    _BLOCK + r"attn\.qkv\.(weight|bias)": [_OUR_BLOCK + rf"attention.{part}_proj.\3" for part in "qkv"],
    _BLOCK + r"attn\.proj\.(weight|bias)": _OUR_BLOCK + r"attention.o_proj.\3",
    _BLOCK + r"attn\.(relative_position_bias_table)": _OUR_BLOCK + r"attention.relative_position_bias.\3",
    **clip_keys("vision_encoder"),
    **vit_keys("vision_encoder"),
    **TEXT_KEYS,
    **PAIR_KEYS,
    **DECODER_KEYS,
    r"(itm|bbox|cls)_head\.0\.(weight|bias)": r"\1_head.fc1.\2",
    r"(itm|bbox|cls)_head\.1\.(weight|bias)": r"\1_head.layer_norm.\2",
    r"(itm|bbox|cls)_head\.3\.(weight|bias)": r"\1_head.fc2.\2",
    r"ta_head\.(weight|bias)": r"ta_head.\1",
}
_DROPPED = {
    r".*\.relative_position_index": "buffer, made anew from the window",
    r".*\.attn_mask": "buffer, made anew from the window",
    r".*\.position_ids": "buffer, made anew",
}


def convert_state_dict(
    official: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    num_vision_heads: int | None = None,
) -> Conversion:
    """Official weights to our model; task, trunk, depth, widths and window are read from the tensors.

    Numbers of heads cannot be read, but for Swin's: those of the text layers are 64 wide without
    `num_attention_heads`, those of a CLIP or DeiT trunk as many, or `num_vision_heads`.

    Raises:
        ValueError: the weights belong to another model or kind, are incomplete, or do not fit.
    """
    model_class = _head_class(official)
    num_images = 2 if model_class in (XVLMForTextAssignment, XVLMForVisualReasoning) else 1
    pretraining_key = _pretraining_key if model_class is XVLMForCaptioning else str
    weights = OfficialWeights({strip_bert(pretraining_key(key)): value for key, value in official.items()})
    config = _read_config(weights, num_attention_heads, num_vision_heads or num_attention_heads, num_images)
    num_text_layers = config.text_config.num_text_layers
    renamed, report = rename_keys(
        official,
        _KEYS,
        _DROPPED,
        lambda key: official_name(pretraining_key(key), num_text_layers, num_images),
    )
    renamed = {model_class.renamed(name): value for name, value in renamed.items()}
    report.used = {key: [model_class.renamed(name) for name in names] for key, names in report.used.items()}
    if "model.temperature" in renamed:
        renamed["model.temperature"] = renamed["model.temperature"].reshape(-1)
    model = model_class(config)
    load_into(model, renamed, report)
    return Conversion(model.eval(), report)


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase = "bert-base-uncased",
    image_size: int | None = None,
    num_attention_heads: int | None = None,
) -> KeyReport:
    """Convert an official file into a folder with model, processor and code, or write nothing.

    Args:
        checkpoint: the official file.
        output_dir: a folder that does not exist yet, or is empty.
        tokenizer: the tokenizer the text encoder was trained with; a name, a folder, or the tokenizer itself.
        image_size: resample the trunk's position tables to this size in pixels.
        num_attention_heads: of the text layers, and of a CLIP or DeiT trunk, where they are not 64 wide.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: as `convert_state_dict`; a file that cannot be read; a folder that is not empty; a
            tokenizer that does not fit the word embeddings.
    """
    convert = partial(convert_state_dict, num_attention_heads=num_attention_heads)
    return write_folder(checkpoint, output_dir, convert, XVLMProcessor, tokenizer, image_size)


def _pretraining_key(key: str) -> str:
    """A key of a captioning file as pretraining has it."""
    return re.sub(r"^text_decoder\.", "text_encoder.", key)


def _head_class(state: Mapping[str, Tensor]) -> type[XVLMPreTrainedModel]:
    refuse_other_papers(state, "X-VLM")
    parts = {key.partition(".")[0] for key in state}
    if "text_decoder" in parts:  # that of captions is the whole text encoder of pretraining
        return XVLMForQuestionAnswering if "text_encoder" in parts else XVLMForCaptioning
    if "ta_head.weight" in state:
        return XVLMForTextAssignment
    has = {name for name in ("itm_head", "bbox_head", "cls_head") if f"{name}.0.weight" in state}
    if "text_encoder.cls.predictions.bias" in state or "text_encoder.lm_head.bias" in state:
        return XVLMForPreTraining
    if has == {"itm_head"}:
        return XVLMForRetrieval
    if has == {"bbox_head"}:
        return XVLMForGrounding
    if has == {"cls_head"}:
        return XVLMForVisualReasoning
    raise ValueError(
        "the checkpoint has no heads of an X-VLM file (its first keys are "
        f"{list(state)[:3]}); give the file of a pretrained or fine-tuned X-VLM"
    )


def _read_config(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None,
    num_vision_heads: int | None,
    num_images: int,
) -> XVLMConfig:
    projection = {"projection_dim": len(state["vision_proj.weight"])} if "vision_proj.weight" in state else {}
    return XVLMConfig(
        vision_config=_read_vision(state, num_vision_heads),
        text_config=read_text_config(state, num_attention_heads, num_images),
        **projection,
    )


def _read_vision(state: Mapping[str, Tensor], num_heads: int | None) -> PreTrainedConfig:
    if "vision_encoder.class_embedding" in state:
        return read_clip(state, "vision_encoder", num_heads)
    if "vision_encoder.cls_token" in state:
        return read_vit(state, "vision_encoder", num_heads)
    return _read_swin(state)


def _read_swin(state: Mapping[str, Tensor]) -> SwinConfig:
    embed_dim, _, patch_size, _ = state["vision_encoder.patch_embed.proj.weight"].shape
    depths: dict[int, int] = {}
    for key in state:
        if found := re.match(_BLOCK, key):
            depths[int(found[1])] = max(depths.get(int(found[1]), 0), int(found[2]) + 1)
    tables = [
        state[f"vision_encoder.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in sorted(depths)
    ]
    windows = [(math.isqrt(len(table)) + 1) // 2 for table in tables]
    return SwinConfig(
        image_size=_read_image_size(state, windows, patch_size),
        patch_size=patch_size,
        embed_dim=embed_dim,
        depths=[depths[i] for i in sorted(depths)],
        num_heads=[table.shape[1] for table in tables],
        window_size=max(windows),
        mlp_ratio=len(state["vision_encoder.layers.0.blocks.0.mlp.fc1.weight"]) / embed_dim,
        drop_path_rate=0.1,
    )


def _read_image_size(state: Mapping[str, Tensor], windows: list[int], patch_size: int) -> int:
    """From the masks of shifted windows where there are any, else from the one window of the last stage."""
    for stage, window in enumerate(windows):
        mask = state.get(f"vision_encoder.layers.{stage}.blocks.1.attn_mask")
        if mask is not None:
            return math.isqrt(len(mask)) * window * patch_size * 2**stage
    return windows[-1] * patch_size * 2 ** (len(windows) - 1)
