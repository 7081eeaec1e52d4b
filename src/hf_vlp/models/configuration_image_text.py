"""What the configurations of ALBEF and X-VLM have in common: an image trunk, a text encoder, their fusion."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .base import CarriesCode
from .configuration_text import VLPTextConfig


@strict
class ImageTextConfig(CarriesCode, PreTrainedConfig):
    """Parts and objectives that both papers have.

    Fields:
    - `vision_config`: any transformers vision config (ViT, Swin, DeiT, ..., or `TimmWrapperConfig`), or its
      dict; the paper's own without it;
    - `text_config`: a `VLPTextConfig`, or its dict;
    - `projection_dim`: width of the features that the contrastive loss compares;
    - `initial_temperature`, `min_temperature`, `max_temperature`: the divisor of the contrastive logits, and
      the range it is held in while training;
    - `itc_weight`, `itm_weight`, `mlm_weight`: weights of the loss terms;
    - `id2label`: classes of visual entailment, those of SNLI-VE in the official order without it;
    - `count_first_token_twice`: rank answers by a score that holds the first token twice, as the official
      codes do;
    - `gradcam_layer`: fusion layer that Grad-CAM looks at, from 0.
    """

    sub_configs = {"text_config": VLPTextConfig, "vision_config": AutoConfig}
    default_vision_config: ClassVar[dict[str, Any]] = {}  # the paper's image trunk

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    initial_temperature: float | int = 0.07
    min_temperature: float | int = 0.001
    max_temperature: float | int = 0.5
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    count_first_token_twice: bool = True
    gradcam_layer: int | None = None
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = self.default_vision_config
        if isinstance(self.vision_config, dict):
            self.vision_config = _vision_config(self.vision_config)
        if self.text_config is None:
            self.text_config = VLPTextConfig()
        elif isinstance(self.text_config, dict):
            self.text_config = VLPTextConfig(**self.text_config)
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
        super().__post_init__(**kwargs)
        self.label2id = {name: label for label, name in self.id2label.items()}
        layers = self.text_config.num_fusion_layers
        if self.gradcam_layer is not None and not 0 <= self.gradcam_layer < layers:
            raise ValueError(
                f"gradcam_layer={self.gradcam_layer} is none of 0 to {layers - 1}; use one of these"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, but another paper's config is refused.

        Raises:
            ValueError: `model_type` is not that of this class.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"the config has model_type={model_type!r}, but {cls.__name__} is {cls.model_type!r}; load "
                "it with the classes of its own model, or with the Auto classes"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers, always with the classes: two unnamed ones are its default, but not ours."""
        labels = {name: value for name, value in self.to_dict().items() if name in ("id2label", "label2id")}
        return super().to_diff_dict() | labels


def _vision_config(fields: dict[str, Any]) -> PreTrainedConfig:
    if fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"vision_config has model_type={fields.get('model_type')!r}, which transformers does not know; "
            "use the config of a transformers vision model, such as SwinConfig, ViTConfig or "
            "TimmWrapperConfig"
        )
    return CONFIG_MAPPING[fields["model_type"]](**fields)
