"""Configuration of LXMERT (Tan and Bansal, EMNLP 2019, arXiv 1908.07490)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .base import CarriesCode


@strict
class LXMERTConfig(CarriesCode, PreTrainedConfig):
    """LXMERT; the defaults are the paper's model. Fields that transformers' `LxmertConfig` has are named as
    there.

    Layers:
    - `l_layers`, `r_layers`, `x_layers`: layers that read words, regions, and both;
    - `visual_feat_dim`, `visual_pos_dim`: widths of a region's feature and of its box;
    - `num_object_labels`, `num_attr_labels`: classes of the detector that the regions come from;
    - `num_qa_labels`: answers to choose from, and `answers`: these answers as strings, where they are known;
    - `id2label`: classes of visual entailment, those of SNLI-VE in ALBEF's order without it;
    - `official_padding_idx`: leave [CLS]'s position and the first token type without gradient, as the
      official code does.

    Pretraining:
    - `mlm_weight`, `itm_weight`, `object_weight`, `attribute_weight`, `feature_weight`, `answer_weight`:
      weights of the loss terms;
    - `visual_loss_normalizer`: factor on the three terms of regions, one over the share of masked regions;
    - `mask_region_labels`: predict object and attribute of masked regions only, as the paper says, and not of
      all regions, as the official code does.
    """

    model_type = "vlp_lxmert"
    # loss terms, and what has no row for each row of the batch
    keys_to_ignore_at_inference = ["loss_mlm", "loss_itm", "loss_object", "loss_attribute", "loss_feature"]
    keys_to_ignore_at_inference += ["loss_answer", "loss_region", "loss_bbox", "loss_giou"]
    keys_to_ignore_at_inference += ["mlm_logits", "object_logits", "attribute_logits", "pred_feats"]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    position_offset: int = 0
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    l_layers: int = 9
    r_layers: int = 5
    x_layers: int = 5
    visual_feat_dim: int = 2048
    visual_pos_dim: int = 4
    num_object_labels: int = 1600
    num_attr_labels: int = 400
    num_qa_labels: int = 9500
    answers: list[str] | None = None
    official_padding_idx: bool = False
    mlm_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    object_weight: float | int = 1.0
    attribute_weight: float | int = 1.0
    feature_weight: float | int = 1.0
    answer_weight: float | int = 1.0
    visual_loss_normalizer: float | int = 1 / 0.15
    mask_region_labels: bool = False

    def __post_init__(self, **kwargs):
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
        super().__post_init__(**kwargs)
        self.label2id = {name: label for label, name in self.id2label.items()}
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}; choose a number of heads that does"
            )
        if self.x_layers < 1:
            raise ValueError(f"x_layers={self.x_layers} reads no image and text together; give at least 1")
        if self.answers is not None and len(self.answers) != self.num_qa_labels:
            raise ValueError(
                f"answers holds {len(self.answers)} strings and num_qa_labels is {self.num_qa_labels}; give "
                "one string for each class"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; transformers' own LXMERT configs are read too.

        Their normalizer of the region losses, 6.67, becomes the official 1 / 0.15.

        Raises:
            ValueError: `model_type` is that of another model.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "lxmert":
            shared = set(cls.__dataclass_fields__) - {"visual_loss_normalizer", "id2label", "label2id"}
            config_dict = {
                name: value
                for name, value in config_dict.items()
                if name in shared and value is not None and name != "model_type"
            }
        elif model_type != cls.model_type:
            raise ValueError(
                f"the config has model_type={model_type!r}, but {cls.__name__} is {cls.model_type!r}; load "
                "it with the classes of its own model, or with the Auto classes"
            )
        return super().from_dict(config_dict, **kwargs)
