"""Configuration of X-VLM (Zeng et al., ICML 2022, arXiv 2111.08276)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .backbones import LOCAL_ATTENTION
from .configuration_image_text import ImageTextConfig


@strict
class XVLMConfig(ImageTextConfig):
    """X-VLM; the defaults are the paper's base model (Swin-B at 224 pixels, BERT-base).

    Fields beside those of `ImageTextConfig`:
    - `head_layer_norm_eps`: of the matching and box heads;
    - `local_attn_depth`: last layers of a ViT, DeiT or CLIP trunk that attend within each region; 0 for
      regions that are means of the patches they cover. Without it 4, or all where there are fewer, for these
      trunks, and 0 for others;
    - `bbox_weight`, `giou_weight`: weights of the box losses;
    - `gradcam_layer`: without it the fourth of six fusion layers, as in the official code, and of others the
      one as high, but not the last, of whose words only [CLS] is read;
    - `official_gather_gradient`: give features gathered from other processes the official code's gradient,
      which is 1/number of processes of the true one on both encoders;
    - `label_smoothing`: share of probability that captions give to other words, 0 in domain pretraining.
    """

    model_type = "vlp_xvlm"
    # loss terms, and what has no row for each row of the batch
    keys_to_ignore_at_inference = ["loss_itc", "loss_itm", "loss_mlm", "loss_bbox", "loss_giou"]
    keys_to_ignore_at_inference += ["itm_logits", "mlm_logits", "logits_per_image", "answer_losses"]
    keys_to_ignore_at_inference += ["lm_logits"]
    # Swin-B, `config_swinB_224.json` of the official code
    default_vision_config: ClassVar[dict[str, Any]] = {
        "model_type": "swin",
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
    }

    head_layer_norm_eps: float | int = 1e-5
    local_attn_depth: int | None = None
    bbox_weight: float | int = 1.0
    giou_weight: float | int = 1.0
    official_gather_gradient: bool = False
    label_smoothing: float | int = 0.1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.gradcam_layer is None:
            layers = self.text_config.num_fusion_layers
            self.gradcam_layer = max(0, min(layers // 2, layers - 2))
        vision = self.vision_config
        layers = vision.num_hidden_layers if vision.model_type in LOCAL_ATTENTION else 0
        if self.local_attn_depth is None:
            self.local_attn_depth = min(4, layers)
        elif not 0 <= self.local_attn_depth <= layers:
            raise ValueError(
                f"local_attn_depth={self.local_attn_depth} with a {vision.model_type} trunk, which has "
                f"{layers} layers that can attend within regions; give 0 to {layers}, 0 for means of patches"
            )
