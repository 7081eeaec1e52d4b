"""What official ALBEF and X-VLM files share: one BERT (or RoBERTa) of text and fusion layers, projections,
temperature."""

import re
from collections.abc import Mapping

from torch import Tensor

from ..models.configuration_text import VLPTextConfig

# Of a stack of layers: all but the keys and values of its cross-attention, and these
BERT_LAYER = (
    r"(\d+)\.(attention\.(?:self\.(?:query|key|value)|output\.(?:dense|LayerNorm))|crossattention\.(?:self\."
    r"query|output\.(?:dense|LayerNorm))|intermediate\.dense|output\.(?:dense|LayerNorm))\.(weight|bias)"
)
BERT_KEY_VALUES = r"(\d+)\.crossattention\.self\.(key|value)\.(weight|bias)"

_ROBERTA = {"position_offset": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROBERTA |= {"layer_norm_eps": 1e-5}

# Official names as `official_name` gives them
TEXT_KEYS = {
    r"text_encoder\.embeddings\.(.+)": r"model.text_model.embeddings.\1",
    r"text_encoder\.encoder\.layer\." + BERT_LAYER: r"model.text_model.layer.\1.\2.\3",
    r"text_encoder\.encoder\.fusion\." + BERT_LAYER: r"model.fusion_model.layer.\1.\2.\3",
    r"text_encoder\.encoder\.fusion\." + BERT_KEY_VALUES: r"model.fusion_model.image_key_values.\1.\2.\3",
    r"text_encoder\.cls\.predictions\.transform\.(.+)": r"lm_head.\1",
    r"text_encoder\.cls\.predictions\.(?:decoder\.)?bias": "lm_head.decoder.bias",
    r"text_encoder\.cls\.predictions\.decoder\.weight": (  # tied
        "model.text_model.embeddings.word_embeddings.weight"
    ),
    r"text_encoder\.lm_head\.dense\.(.+)": r"lm_head.dense.\1",  # RoBERTa's
    r"text_encoder\.lm_head\.layer_norm\.(.+)": r"lm_head.LayerNorm.\1",
    r"text_encoder\.lm_head\.(?:decoder\.)?bias": "lm_head.decoder.bias",
    r"text_encoder\.lm_head\.decoder\.weight": "model.text_model.embeddings.word_embeddings.weight",
    r"vision_proj\.(weight|bias)": r"model.image_projection.\1",
    r"text_proj\.(weight|bias)": r"model.text_projection.\1",
    r"temp": "model.temperature",
}

# Of a decoder of answers
DECODER_KEYS = {
    r"text_decoder\.bert\.embeddings\.(.+)": r"decoder.embeddings.\1",
    r"text_decoder\.bert\.encoder\.layer\." + BERT_LAYER: r"decoder.layer.\1.\2.\3",
    r"text_decoder\.bert\.encoder\.layer\." + BERT_KEY_VALUES: r"decoder.key_values.\1.\2.\3",
    r"text_decoder\.cls\.predictions\.transform\.(.+)": r"decoder.lm_head.\1",
    r"text_decoder\.cls\.predictions\.(?:decoder\.)?bias": "decoder.lm_head.decoder.bias",
    r"text_decoder\.cls\.predictions\.decoder\.weight": "decoder.embeddings.word_embeddings.weight",  # tied
}
# Of the layers for the second of two images
PAIR_KEYS = {
    r"text_encoder\.encoder\.second\." + BERT_LAYER: r"model.fusion_model.second_layer.\1.\2.\3",
    r"text_encoder\.encoder\.second\." + BERT_KEY_VALUES: r"model.fusion_model.image_key_values.\1.\2.\3",
}


def strip_bert(key: str) -> str:
    """Only the classes with a language-modelling head have `bert.` or `roberta.` in the keys of their text
    encoder."""
    return re.sub(r"^text_encoder\.(bert|roberta)\.", "text_encoder.", key)


def official_name(key: str, num_text_layers: int, num_images: int = 1) -> str:
    """An official key without `bert.`, and with fusion layers counted from 0.

    With two images, layers for the first (`fusion`) and for the second (`second`) take turns.
    """
    key = strip_bert(key)
    match = re.match(r"text_encoder\.encoder\.layer\.(\d+)\.(.*)", key)
    if match is None or int(match[1]) < num_text_layers:
        return key
    number, image = divmod(int(match[1]) - num_text_layers, num_images)
    return f"text_encoder.encoder.{('fusion', 'second')[image]}.{number}.{match[2]}"


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Layers of the stack whose keys begin with `prefix` and a number."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def read_text_config(
    state: Mapping[str, Tensor], num_attention_heads: int | None, num_images: int = 1
) -> VLPTextConfig:
    """The geometry of a text encoder; without `num_attention_heads`, heads are 64 wide.

    BERT has two types of tokens, RoBERTa one.

    Args:
        state: `OfficialWeights` without `bert.` in their names.
        num_attention_heads: cannot be read from tensors.
        num_images: fusion layers that make one of ours, one for each image.

    Raises:
        ValueError: the weights are incomplete.
    """
    vocab_size, hidden_size = state["text_encoder.embeddings.word_embeddings.weight"].shape
    layers = count_layers(state, "text_encoder.encoder.layer.")
    reads_image = [
        f"text_encoder.encoder.layer.{i}.crossattention.self.query.weight" in state for i in range(layers)
    ]
    if True not in reads_image:
        raise ValueError(
            "the checkpoint has no text_encoder.encoder.layer.*.crossattention; it is incomplete or of "
            "another model"
        )
    num_text_layers = reads_image.index(True)
    num_fusion_layers = (layers - num_text_layers) // num_images
    num_token_types = len(state["text_encoder.embeddings.token_type_embeddings.weight"])
    return VLPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_text_layers=num_text_layers,
        num_fusion_layers=num_fusion_layers,
        # a decoder of answers starts from the fusion layers
        num_decoder_layers=count_layers(state, "text_decoder.bert.encoder.layer.") or num_fusion_layers,
        num_attention_heads=num_attention_heads or max(hidden_size // 64, 1),
        intermediate_size=len(state["text_encoder.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(state["text_encoder.embeddings.position_embeddings.weight"]),
        type_vocab_size=num_token_types,
        **(_ROBERTA if num_token_types == 1 else {}),
    )
