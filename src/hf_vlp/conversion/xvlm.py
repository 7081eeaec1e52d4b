"""Official X-VLM checkpoints with a Swin trunk: files of pretraining, retrieval and grounding."""

import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SwinConfig

from ..models.configuration_text import VLPTextConfig
from ..models.configuration_xvlm import XVLMConfig
from ..models.modeling_xvlm import XVLMForGrounding, XVLMForPreTraining, XVLMForRetrieval, XVLMHead
from ..models.processing_xvlm import XVLMProcessor
from .keys import KeyReport, load_into, read_state_dict, rename_keys

# Official names without `bert.`, and with fusion layers counted from 0
_LAYER = (
    r"(attention\.(?:self\.(?:query|key|value)|output\.(?:dense|LayerNorm))|crossattention\.(?:self\.query|"
)
_LAYER += r"output\.(?:dense|LayerNorm))|intermediate\.dense|output\.(?:dense|LayerNorm))\.(weight|bias)"
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
    r"text_encoder\.embeddings\.(.+)": r"model.text_model.embeddings.\1",
    r"text_encoder\.encoder\.layer\.(\d+)\." + _LAYER: r"model.text_model.layer.\1.\2.\3",
    r"text_encoder\.encoder\.fusion\.(\d+)\." + _LAYER: r"model.fusion_model.layer.\1.\2.\3",
    r"text_encoder\.encoder\.fusion\.(\d+)\.crossattention\.self\.(key|value)\.(weight|bias)": (
        r"model.fusion_model.image_key_values.\1.\2.\3"
    ),
    r"text_encoder\.cls\.predictions\.transform\.(.+)": r"lm_head.\1",
    r"text_encoder\.cls\.predictions\.bias": "lm_head.decoder.bias",
    r"vision_proj\.(weight|bias)": r"model.image_projection.\1",
    r"text_proj\.(weight|bias)": r"model.text_projection.\1",
    r"temp": "model.temperature",
    r"(itm|bbox)_head\.0\.(weight|bias)": r"\1_head.fc1.\2",
    r"(itm|bbox)_head\.1\.(weight|bias)": r"\1_head.layer_norm.\2",
    r"(itm|bbox)_head\.3\.(weight|bias)": r"\1_head.fc2.\2",
}
_DROPPED = {
    r".*\.relative_position_index": "buffer, made anew from the window",
    r".*\.attn_mask": "buffer, made anew from the window",
    r".*\.position_ids": "buffer, made anew",
    r"text_encoder\.cls\.predictions\.decoder\.weight": "tied to the word embeddings",
    r"text_encoder\.cls\.predictions\.decoder\.bias": "the same tensor as cls.predictions.bias",
}
_OTHER_KINDS = {
    "text_decoder.": "a question-answering or captioning file",
    "cls_head.": "a pair-reasoning (NLVR2) file",
    "ta_head.": "a file of the NLVR2 domain pretraining",
    "vision_encoder.encoder.": "a file with a CLIP trunk",
    "vision_encoder.blocks.": "a file with a DeiT trunk",
    "visual_encoder.": "a checkpoint of another model, probably ALBEF",
    "bert.encoder.r_layers.": "a checkpoint of another model, probably LXMERT",
    "backbone.": "a checkpoint of another model, probably SOHO",
}


@dataclass
class Conversion:
    """A converted model, and what became of each key of its checkpoint."""

    model: XVLMHead
    report: KeyReport


def convert_state_dict(official: Mapping[str, Tensor], num_attention_heads: int | None = None) -> Conversion:
    """Official weights to our model; task, depth, widths and window are read from the tensors.

    The number of heads of the text layers cannot be read; without `num_attention_heads` they are 64 wide, as
    in BERT.

    Raises:
        ValueError: the weights belong to another model or kind, are incomplete, or do not fit.
    """
    model_class = _head_class(official)
    config = _read_config({_strip_bert(key): value for key, value in official.items()}, num_attention_heads)
    alias = partial(_count_fusion_layers, num_text_layers=config.text_config.num_text_layers)
    renamed, report = rename_keys(official, _KEYS, _DROPPED, alias)
    if "model.temperature" in renamed:
        renamed["model.temperature"] = renamed["model.temperature"].reshape(1)
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
        num_attention_heads: of the text layers, where they are not 64 wide.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: as `convert_state_dict`; a file that cannot be read; a folder that is not empty; a
        tokenizer that does
            not fit the word embeddings.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir={str(output_dir)!r} exists and is not an empty folder; choose another")
    converted = convert_state_dict(read_state_dict(checkpoint), num_attention_heads)
    if image_size is not None:
        converted.model.set_image_size(image_size)
    processor = _processor(converted.model.config, _load_tokenizer(tokenizer))
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        converted.model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.replace(output_dir)  # at once: a folder is there whole, or not at all
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return converted.report


def _head_class(state: Mapping[str, Tensor]) -> type[XVLMHead]:
    for prefix, kind in _OTHER_KINDS.items():
        if any(key.startswith(prefix) for key in state):
            raise ValueError(
                f"the checkpoint is {kind}; X-VLM pretraining, retrieval and grounding files are converted"
            )
    has = {name for name in ("itm_head", "bbox_head") if f"{name}.0.weight" in state}
    if "text_encoder.cls.predictions.bias" in state:
        return XVLMForPreTraining
    if has == {"itm_head"}:
        return XVLMForRetrieval
    if has == {"bbox_head"}:
        return XVLMForGrounding
    raise ValueError(
        "the checkpoint has no heads of an X-VLM pretraining, retrieval or grounding file (its first keys "
        f"are {list(state)[:3]}); give one of these files"
    )


def _strip_bert(key: str) -> str:
    """Only the classes with a language-modelling head have `bert.` in their keys."""
    return key.replace("text_encoder.bert.", "text_encoder.")


def _count_fusion_layers(key: str, num_text_layers: int) -> str:
    key = _strip_bert(key)
    match = re.match(r"text_encoder\.encoder\.layer\.(\d+)\.(.*)", key)
    if match is None or int(match[1]) < num_text_layers:
        return key
    return f"text_encoder.encoder.fusion.{int(match[1]) - num_text_layers}.{match[2]}"


def _read_config(state: Mapping[str, Tensor], num_attention_heads: int | None) -> XVLMConfig:
    try:
        vision, text = _read_vision(state), _read_text(state, num_attention_heads)
    except KeyError as error:
        raise ValueError(
            f"the checkpoint has no {error.args[0]}; it is incomplete or of another model"
        ) from error
    projection = {"projection_dim": len(state["vision_proj.weight"])} if "vision_proj.weight" in state else {}
    return XVLMConfig(vision_config=vision, text_config=text, **projection)


def _read_text(state: Mapping[str, Tensor], num_attention_heads: int | None) -> VLPTextConfig:
    embeddings = "text_encoder.embeddings.{}_embeddings.weight"
    vocab_size, hidden_size = state[embeddings.format("word")].shape
    numbers = {
        int(found[1])
        for found in (re.match(r"text_encoder\.encoder\.layer\.(\d+)\.", k) for k in state)
        if found
    }
    fusion = [
        i
        for i in sorted(numbers)
        if f"text_encoder.encoder.layer.{i}.crossattention.self.query.weight" in state
    ]
    if not fusion:
        raise KeyError("text_encoder.encoder.layer.*.crossattention")
    return VLPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_text_layers=fusion[0],
        num_fusion_layers=len(numbers) - fusion[0],
        num_attention_heads=num_attention_heads or max(hidden_size // 64, 1),
        intermediate_size=len(state["text_encoder.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(state[embeddings.format("position")]),
        type_vocab_size=len(state[embeddings.format("token_type")]),
    )


def _read_vision(state: Mapping[str, Tensor]) -> SwinConfig:
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


def _load_tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} cannot be loaded; give the name or the folder of the tokenizer "
            "that the text encoder was trained with (bert-base-uncased for the released files)"
        ) from error


def _processor(config: XVLMConfig, tokenizer: PreTrainedTokenizerBase) -> XVLMProcessor:
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, but the checkpoint embeds "
            f"{config.text_config.vocab_size}; give the tokenizer that the text encoder was trained with"
        )
    return XVLMProcessor.from_config(config, tokenizer)
