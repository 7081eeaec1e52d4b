"""Tiny models that find regions, saved with their image processors, for the tests of extractors."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d
from transformers import (
    AutoModelForObjectDetection,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DetrImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    RfDetrConfig,
    RfDetrImageProcessor,
    RTDetrConfig,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"}
LAST = {"backbone_config": ResNetConfig(**STAGES, out_features=["stage4"]), "use_timm_backbone": False}
SMALL = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 20,
    "num_labels": 5,
}
VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


class Detector(NamedTuple):
    """How to make one."""

    config: Callable[[], PreTrainedConfig]
    image_processor: Callable

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForObjectDetection.from_config(self.config())


def _keeping_aspect() -> DetrImageProcessor:
    return DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


def _deformable() -> DeformableDetrConfig:
    backbone = ResNetConfig(**STAGES, out_features=["stage2", "stage3", "stage4"])
    return DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, num_feature_levels=3, encoder_n_points=2,
        decoder_n_points=2, d_model=32, **SMALL,
    )  # fmt: skip


def _rt_detr() -> RTDetrConfig:
    backbone = RTDetrResNetConfig(**STAGES, out_features=["stage2", "stage3", "stage4"])
    small = {name: value for name, value in SMALL.items() if name != "num_queries"}
    return RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 24], d_model=16,
        num_queries=10, decoder_in_channels=[16, 16, 16], decoder_n_points=2, num_denoising=0, **small,
    )  # fmt: skip


def _rf_detr() -> RfDetrConfig:
    backbone = RfDetrDinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
        out_indices=[1, 2], num_windows=2, window_block_indices=[1],
    )  # fmt: skip
    return RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_layers=1, decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2, decoder_ffn_dim=16, decoder_n_points=2, num_queries=10, group_detr=2,
        num_labels=5,
    )  # fmt: skip


DETECTORS = {
    "detr": Detector(lambda: DetrConfig(**LAST, **SMALL, d_model=16), _keeping_aspect),
    "conditional": Detector(lambda: ConditionalDetrConfig(**LAST, **SMALL, d_model=16), _keeping_aspect),
    "dab": Detector(lambda: DabDetrConfig(**LAST, **SMALL, hidden_size=16), _keeping_aspect),
    "deformable": Detector(_deformable, _keeping_aspect),
    "rt_detr": Detector(_rt_detr, lambda: RTDetrImageProcessor(size={"height": 64, "width": 64})),
    "rf_detr": Detector(_rf_detr, lambda: RfDetrImageProcessor(size={"height": 56, "width": 56})),
}
TRUNKS = {
    "vit": lambda: (ViTModel(ViTConfig(**VIT)), ViTImageProcessor(size={"height": 32, "width": 32})),
    "clip": lambda: (
        CLIPModel(CLIPConfig(vision_config=VIT, text_config={**VIT, "vocab_size": 50, "eos_token_id": 2})),
        CLIPImageProcessor(),
    ),
    "resnet": lambda: (
        ResNetModel(ResNetConfig(**STAGES)),
        BitImageProcessor(size={"shortest_edge": 64}),
    ),
    "timm": lambda: (
        TimmWrapperModel(
            TimmWrapperConfig(
                architecture="resnet10t", num_classes=0, pretrained_cfg={"input_size": (3, 64, 64)}
            )
        ),
        None,  # in its config
    ),
}


class TinyBackbone(nn.Module):
    """One map of random features."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.convolution = nn.Conv2d(3, out_channels, 8, stride=8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.convolution(pixels)


class TinyPyramid(nn.Module):
    """Two levels that average pixels."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.out_channels = out_channels

    def forward(self, pixels: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return OrderedDict({"0": avg_pool2d(pixels, 8), "1": avg_pool2d(pixels, 16)})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_detector(kind: str, folder: Path) -> str:
    """The folder's name; a folder that is there already is left as it is."""
    if not folder.exists():
        DETECTORS[kind].model().save_pretrained(folder)
        DETECTORS[kind].image_processor().save_pretrained(folder)
    return str(folder)


def save_trunk(kind: str, folder: Path) -> str:
    """The folder's name; a folder that is there already is left as it is."""
    if not folder.exists():
        model, image_processor = TRUNKS[kind]()
        model.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
    return str(folder)
