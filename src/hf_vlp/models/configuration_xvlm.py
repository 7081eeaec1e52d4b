"""Configuration of X-VLM (Zeng et al., ICML 2022, arXiv 2111.08276)."""

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .base import CarriesCode
from .configuration_text import VLPTextConfig


@strict
class XVLMConfig(CarriesCode, PreTrainedConfig):
    """X-VLM; the defaults are the paper's base model (Swin-B at 224 pixels, BERT-base).

    Fields:
    - `vision_config`: any transformers vision config (Swin, ViT, DeiT, ..., or `TimmWrapperConfig`), or its
      dict;
    - `text_config`: a `VLPTextConfig`, or its dict;
    - `projection_dim`: width of the features that the contrastive loss compares;
    - `initial_temperature`, `min_temperature`, `max_temperature`: the divisor of the contrastive logits, and
      the range it is held in while training;
    - `head_layer_norm_eps`: of the matching and box heads;
    - `itc_weight`, `itm_weight`, `mlm_weight`, `bbox_weight`, `giou_weight`: weights of the loss terms;
    - `official_gather_gradient`: give features gathered from other processes the official code's gradient,
      which is 1/number of processes of the true one on both encoders.
    """

    model_type = "vlp_xvlm"
    sub_configs = {"text_config": VLPTextConfig, "vision_config": AutoConfig}
    # loss terms, and what has no row for each row of the batch
    keys_to_ignore_at_inference = ["loss_itc", "loss_itm", "loss_mlm", "loss_bbox", "loss_giou"]
    keys_to_ignore_at_inference += ["itm_logits", "mlm_logits", "logits_per_image"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    initial_temperature: float | int = 0.07
    min_temperature: float | int = 0.001
    max_temperature: float | int = 0.5
    head_layer_norm_eps: float | int = 1e-5
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    bbox_weight: float | int = 1.0
    giou_weight: float | int = 1.0
    official_gather_gradient: bool = False
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.vision_config = _vision_config(self.vision_config)
        if self.text_config is None:
            self.text_config = VLPTextConfig()
        elif isinstance(self.text_config, dict):
            self.text_config = VLPTextConfig(**self.text_config)
        super().__post_init__(**kwargs)


def _vision_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if value is None:  # Swin-B, `config_swinB_224.json` of the official code
        value = {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    if not isinstance(value, dict):
        return value
    if value.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"vision_config has model_type={value.get('model_type')!r}, which transformers does not know; "
            "use the config of a transformers vision model, such as SwinConfig, ViTConfig or "
            "TimmWrapperConfig"
        )
    return CONFIG_MAPPING[value["model_type"]](**value)
