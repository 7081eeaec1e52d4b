"""Configuration of SOHO (Huang et al., CVPR 2021, arXiv 2104.03135)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .base import CarriesCode

_FUSIONS = ("gate", "add", "vd_only", "none")
_MASK_MODES = ("square_legacy", "exact")
_PICKS = ("location", "entry")


@strict
class SOHOConfig(CarriesCode, PreTrainedConfig):
    """SOHO; the defaults are the released model and its code (ResNet-18, 3 layers), `paper()` gives the
    paper's.

    The image:
    - `backbone_config`: a CNN of transformers or, through `TimmWrapperConfig`, of timm, or its dict;
      ResNet-18 without it;
    - `frozen_stages`: its stem and this many stages are never trained, -1 for none. ResNet of transformers
      only;
    - `backbone_norm_eval`: keep the batch normalisation of the whole trunk as it is loaded;
    - `padding_mask_mode`: "exact", or "square_legacy" for the official mask, which takes the canvas of a
      batch for a square, so that columns of upright images are lost and padding beside wide ones is seen;
    - `visual_layer_norm_eps`: of the norm that ends in image tokens.

    The visual dictionary:
    - `visual_fusion`: how tokens come from an entry and the image itself: "gate", "add", "vd_only" for the
      entry alone, "none" without a dictionary, as the official fine-tuning has it;
    - `vd_size`, `vd_decay`, `vd_eps`: its entries, the weight of what was before, and the smoothing of
      counts;
    - `vd_update_on_padding`: whether padding moves entries, as in the official code;
    - `vd_start_from_entries`: start from the random entries themselves rather than from empty averages, with
      which every entry that the first step does not use is lost;
    - `vd_revive_below`: an unused entry whose moving average of cells a step falls below this becomes a cell
      of the batch; 0 for never. With empty averages the dictionary thus starts from the first batch;
    - `mvm_prob`: share of texts whose image is masked, by all cells of one entry;
    - `mvm_pick`: "location", the entry at one place of all images, as in the official code, or "entry", one
      of those that the image has, all equally often;
    - `mvm_on_mismatched`: whether masked cells are to be found beside texts of other images too.

    The fusion transformer has BERT's fields; `num_labels` classes of entailment by `id2label`; `answers` as
    strings and `num_answers` of question answering, `classifier_dropout` in its head.
    """

    model_type = "vlp_soho"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "loss_mlm",
        "loss_mvm",
        "loss_itm",
        "mlm_logits",
        "mvm_logits",
        "mvm_labels",
    ]
    released_backbone: ClassVar[dict[str, Any]] = {
        "model_type": "resnet",
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
    }
    paper_backbone: ClassVar[dict[str, Any]] = {"model_type": "resnet", "depths": [3, 4, 23, 3]}  # ResNet-101

    backbone_config: dict | PreTrainedConfig | None = None
    frozen_stages: int = 1
    backbone_norm_eval: bool = False
    padding_mask_mode: str = "square_legacy"
    visual_layer_norm_eps: float | int = 1e-5
    visual_fusion: str = "gate"
    vd_size: int = 2048
    vd_decay: float | int = 0.4
    vd_eps: float | int = 1e-5
    vd_update_on_padding: bool = True
    vd_start_from_entries: bool = False
    vd_revive_below: float | int = 0.0
    mvm_prob: float | int = 0.015
    mvm_pick: str = "location"
    mvm_on_mismatched: bool = True
    mlm_weight: float | int = 1.0
    mvm_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 3
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
    num_answers: int = 3129
    answers: list[str] | None = None
    classifier_dropout: float | int = 0.5

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = self.released_backbone
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            self.backbone_config = CONFIG_MAPPING[fields["model_type"]](**fields)
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
        super().__post_init__(**kwargs)
        self.label2id = {name: label for label, name in self.id2label.items()}
        chosen = {"visual_fusion": _FUSIONS, "padding_mask_mode": _MASK_MODES, "mvm_pick": _PICKS}
        for name, choices in chosen.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if not 0 <= self.mvm_prob <= 1 or not 0 <= self.vd_decay < 1:
            raise ValueError(
                f"mvm_prob={self.mvm_prob} and vd_decay={self.vd_decay}; give shares from 0 to 1"
            )
        if self.vd_revive_below < 0:
            raise ValueError(
                f"vd_revive_below is {self.vd_revive_below}; give a number of cells, 0 for never"
            )
        if self.answers is not None and len(self.answers) != self.num_answers:
            raise ValueError(
                f"answers holds {len(self.answers)} strings and num_answers is {self.num_answers}; give one "
                "string for each class"
            )
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size}; use a multiple of num_attention_heads="
                f"{self.num_attention_heads} and of 4"
            )

    @classmethod
    def paper(cls, **fields) -> "SOHOConfig":
        """The paper's model: ResNet-101, 12 layers, and what the released code does otherwise put right."""
        paper = {
            "backbone_config": cls.paper_backbone,
            "num_hidden_layers": 12,
            "padding_mask_mode": "exact",
            "vd_update_on_padding": False,
            "vd_start_from_entries": True,
            "mvm_pick": "entry",
            "mvm_on_mismatched": False,
        }
        return cls(**paper | fields)
