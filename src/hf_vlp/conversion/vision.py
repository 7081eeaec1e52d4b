"""What official files hold of the ViT of timm and of CLIP's image encoder."""

import math
from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPVisionConfig, ViTConfig

from .bert import count_layers

_TRUNK = "model.vision_model.trunk."


def vit_keys(encoder: str) -> dict[str, str | list[str]]:
    """Names of a ViT in official files, where it is called `encoder`, and ours."""
    block, ours = rf"{encoder}\.blocks\.(\d+)\.", _TRUNK + r"layers.\1."
    return {
        rf"{encoder}\.cls_token": _TRUNK + "embeddings.cls_token",
        rf"{encoder}\.pos_embed": _TRUNK + "embeddings.position_embeddings",
        rf"{encoder}\.patch_embed\.proj\.(weight|bias)": _TRUNK
        + r"embeddings.patch_embeddings.projection.\1",
        rf"{encoder}\.norm\.(weight|bias)": _TRUNK + r"layernorm.\1",
        block + r"norm1\.(weight|bias)": ours + r"layernorm_before.\2",
        block + r"norm2\.(weight|bias)": ours + r"layernorm_after.\2",
        block + r"mlp\.(fc[12])\.(weight|bias)": ours + r"mlp.\2.\3",
        block + r"attn\.qkv\.(weight|bias)": [ours + rf"attention.{part}_proj.\2" for part in "qkv"],
        block + r"attn\.proj\.(weight|bias)": ours + r"attention.o_proj.\2",
    }


def read_vit(state: Mapping[str, Tensor], encoder: str, num_heads: int | None) -> ViTConfig:
    """The geometry of a ViT; without `num_heads`, heads are 64 wide."""
    width, _, patch_size, _ = state[f"{encoder}.patch_embed.proj.weight"].shape
    return ViTConfig(
        image_size=_image_side(state[f"{encoder}.pos_embed"].shape[1], patch_size),
        patch_size=patch_size,
        hidden_size=width,
        num_hidden_layers=count_layers(state, f"{encoder}.blocks."),
        num_attention_heads=num_heads or max(width // 64, 1),
        intermediate_size=len(state[f"{encoder}.blocks.0.mlp.fc1.weight"]),
        layer_norm_eps=1e-6,
    )


def clip_keys(encoder: str) -> dict[str, str]:
    """Names of CLIP's image encoder in official files, where it is called `encoder`, and ours."""
    return {
        rf"{encoder}\.class_embedding": _TRUNK + "embeddings.class_embedding",
        rf"{encoder}\.patch_embed\.weight": _TRUNK + "embeddings.patch_embedding.weight",
        rf"{encoder}\.pos_embed\.weight": _TRUNK + "embeddings.position_embedding.weight",
        rf"{encoder}\.((?:pre_layrnorm|post_layernorm|encoder\.layers\.\d+)\..+)": _TRUNK + r"\1",
    }


def read_clip(state: Mapping[str, Tensor], encoder: str, num_heads: int | None) -> CLIPVisionConfig:
    """The geometry of CLIP's image encoder; without `num_heads`, heads are 64 wide."""
    width, _, patch_size, _ = state[f"{encoder}.patch_embed.weight"].shape
    return CLIPVisionConfig(
        image_size=_image_side(len(state[f"{encoder}.pos_embed.weight"]), patch_size),
        patch_size=patch_size,
        hidden_size=width,
        num_hidden_layers=count_layers(state, f"{encoder}.encoder.layers."),
        num_attention_heads=num_heads or max(width // 64, 1),
        intermediate_size=len(state[f"{encoder}.encoder.layers.0.mlp.fc1.weight"]),
    )


def _image_side(num_positions: int, patch_size: int) -> int:
    return math.isqrt(num_positions - 1) * patch_size
