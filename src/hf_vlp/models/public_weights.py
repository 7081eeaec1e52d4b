"""Public weights of BERT, RoBERTa or XLM-R for a text encoder, and the fusion layers above it (ALBEF, X-VLM;
LXMERT and SOHO the former)."""

import re
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_text import VLPTextConfig

# Of a config, never another model's
_OWN_FIELDS = {"model_type", "id2label", "label2id", "num_hidden_layers", "classifier_dropout"}


def shared_fields(config_class: type[PreTrainedConfig], bert: PreTrainedConfig) -> dict[str, Any]:
    """The geometry of a BERT, as far as `config_class` has fields for it, but for the number of layers."""
    names = set(config_class.__dataclass_fields__) & set(bert.to_dict()) - _OWN_FIELDS
    return {name: getattr(bert, name) for name in names}


# RoBERTa's names, which are XLM-R's too, as BERT's
_ROBERTA = {
    r"roberta\.(.+)": r"bert.\1",
    r"lm_head\.dense\.(.+)": r"cls.predictions.transform.dense.\1",
    r"lm_head\.layer_norm\.(.+)": r"cls.predictions.transform.LayerNorm.\1",
    r"lm_head\.bias": "cls.predictions.bias",
}


def split_bert_config(bert: PreTrainedConfig, num_fusion_layers: int) -> VLPTextConfig:
    """BERT's geometry, its lower half as text layers.

    RoBERTa and XLM-R count positions from `pad_token_id + 1`.

    Raises:
        ValueError: the model is none of these, or the upper half is no multiple of `num_fusion_layers`.
    """
    if bert.model_type not in ("bert", "roberta", "xlm-roberta"):
        raise ValueError(f"text is a {bert.model_type} model; give a BERT, a RoBERTa or an XLM-R")
    num_text_layers = bert.num_hidden_layers // 2
    upper = bert.num_hidden_layers - num_text_layers
    if num_fusion_layers < 1 or upper % num_fusion_layers:
        raise ValueError(
            f"num_fusion_layers={num_fusion_layers} cannot be taken evenly from the upper {upper} layers of "
            "the BERT; use a divisor of them"
        )
    fields = shared_fields(VLPTextConfig, bert)
    if bert.model_type != "bert":
        fields["position_offset"] = bert.pad_token_id + 1
    return VLPTextConfig(**fields, num_text_layers=num_text_layers, num_fusion_layers=num_fusion_layers)


def text_and_fusion_weights(
    state: dict[str, Tensor], config: VLPTextConfig, num_layers: int
) -> dict[str, Tensor]:
    """The state of a `BertForMaskedLM`, or of RoBERTa's, of `num_layers` layers under our names.

    Fusion layers are spread over the upper half and end with the last layer: 6, 7, ..., 11 of 12 layers, or
    13, 15, ..., 23 of 24, as the official code takes them.
    """
    step = (num_layers - config.num_text_layers) // config.num_fusion_layers
    fusion = {config.num_text_layers + step * (i + 1) - 1: i for i in range(config.num_fusion_layers)}
    renamed = {}
    for name, value in state.items():
        name = _bert_name(name)
        prefix, _, rest = name.partition("encoder.layer.")
        number, _, rest = rest.partition(".")
        if name.startswith("bert.embeddings."):
            renamed[name.replace("bert.", "text_model.")] = value
        elif prefix == "bert." and int(number) < config.num_text_layers:
            renamed[f"text_model.layer.{number}.{rest}"] = value
        elif prefix == "bert." and int(number) in fusion:
            renamed[f"fusion_model.layer.{fusion[int(number)]}.{rest}"] = value
        elif name.startswith("cls.predictions.transform."):
            renamed[name.replace("cls.predictions.transform.", "lm_head.")] = value
        elif name == "cls.predictions.bias":
            renamed["lm_head.decoder.bias"] = value
    return renamed


def _bert_name(name: str) -> str:
    for pattern, bert in _ROBERTA.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(bert)
    return name


def load_public_weights(model: PreTrainedModel, state: dict[str, Tensor]) -> frozenset[str]:
    """Load what a base model or a head has a place for; return the names of its other parameters."""
    own = set(model.state_dict())
    prefix = model.base_model_prefix
    placed = {(name if name in own else f"{prefix}.{name}"): value for name, value in state.items()}
    loaded = model.load_state_dict({name: placed[name] for name in own & set(placed)}, strict=False)
    missing = set(loaded.missing_keys) - set(model.all_tied_weights_keys)
    model.fill_from_twins(missing)
    return frozenset(missing)
