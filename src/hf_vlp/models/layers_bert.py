"""BERT cut in two: layers that read text, and layers that also attend to the image (ALBEF, X-VLM).

B: images, R: texts, L: text length, S: image tokens, D: text width, W: image width, H: heads, d = D / H, V:
vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .base import VLPPreTrainedModel
from .configuration_text import VLPTextConfig

KeyValues = tuple[Tensor, Tensor]  # keys and values, each (B, H, S, d)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention that returns its weights (R, H, L, S) beside the result (R, L, H, d)."""
    weights = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1)
    result = nn.functional.dropout(weights, dropout, module.training) @ value
    return result.transpose(1, 2), weights


class BertEmbeddings(nn.Module):
    """Word, position and token-type embeddings."""

    def __init__(self, config):
        super().__init__()
        self.position_offset = config.position_offset
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + self.position_offset  # (L,)
        embeds = self.word_embeddings(input_ids) + self.token_type_embeddings(torch.zeros_like(input_ids))
        embeds = embeds + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(embeds))  # (R, L, D)


class KeyValueProjection(nn.Module):
    """Keys and values of a context of any width; a module of its own, so that texts can share them."""

    def __init__(self, config, context_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.key = nn.Linear(context_size, config.hidden_size)
        self.value = nn.Linear(context_size, config.hidden_size)

    def forward(self, context: Tensor) -> KeyValues:  # (B, S, W)
        return _split_heads(self.key(context), self.num_heads), _split_heads(
            self.value(context), self.num_heads
        )


class BertCrossAttention(nn.Module):
    """Multi-head attention over given keys and values.

    With queries of R texts and keys of B images, R = T * B, rows are grouped by image: T consecutive texts
    attend to each image, side by side as one long query, and keys and values are never repeated.
    """

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, key_values: KeyValues, attention_mask: Tensor | None) -> Tensor:
        keys, values = key_values
        queries = _group_rows(self.query(hidden_states), len(keys))  # (R, L, D) -> (B, T * L, D)
        queries = _split_heads(queries, self.num_heads)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, _ = attend(
            self, queries, keys, values, attention_mask, scaling=self.scaling, dropout=dropout
        )
        return context.reshape(hidden_states.shape)


class BertSelfAttention(BertCrossAttention):
    """Multi-head attention that makes its own keys and values from the words it reads."""

    def __init__(self, config):
        super().__init__(config)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, words: Tensor, attention_mask: Tensor | None) -> Tensor:
        key_values = (
            _split_heads(self.key(words), self.num_heads),
            _split_heads(self.value(words), self.num_heads),
        )
        return super().forward(hidden_states, key_values, attention_mask)


class BertOutput(nn.Module):
    """Project, add the residual, normalise: the second half of each BERT block."""

    def __init__(self, config, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class BertAttention(nn.Module):
    """Attention and its output block; `self` and `output` are BERT's own names."""

    def __init__(self, config, attention: type[BertCrossAttention]):
        super().__init__()
        self.self = attention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, context, attention_mask: Tensor | None) -> Tensor:
        return self.output(self.self(hidden_states, context, attention_mask), hidden_states)


class BertIntermediate(nn.Module):
    """Widen and activate: the first half of the feed-forward block."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states))


class BertLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention to the image where the layer fuses, feed-forward; each ends in a norm.

    With `cls_only` just the first row of each text is computed, which is all that a pooled head reads.
    """

    def __init__(self, config, fuses: bool):
        super().__init__()
        self.attention = BertAttention(config, BertSelfAttention)
        self.crossattention = BertAttention(config, BertCrossAttention) if fuses else None
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_key_values: KeyValues | None = None,
        image_mask: Tensor | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        queries = hidden_states[:, :1] if cls_only else hidden_states
        hidden_states = self.attention(queries, hidden_states, attention_mask)
        if self.crossattention is not None:
            hidden_states = self.crossattention(hidden_states, image_key_values, image_mask)
        return self.output(self.intermediate(hidden_states), hidden_states)


class TextEncoder(VLPPreTrainedModel):
    """The lower layers of BERT: words to text embeds."""

    config: VLPTextConfig
    main_input_name = "input_ids"

    def __init__(self, config: VLPTextConfig):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(config, fuses=False) for _ in range(config.num_text_layers))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_states = self.embeddings(input_ids)
        mask = _attention_mask(self.config, hidden_states, attention_mask)
        for layer in self.layer:
            hidden_states = layer(hidden_states, mask)
        return hidden_states  # (R, L, D)


class FusionEncoder(VLPPreTrainedModel):
    """The upper layers of BERT: text embeds that attend to the image.

    Keys and values of an image are made once (`project_image`) and serve every text and every objective.
    """

    config: VLPTextConfig
    main_input_name = "text_embeds"

    def __init__(self, config: VLPTextConfig, image_width: int):
        super().__init__(config)
        self.layer = nn.ModuleList(BertLayer(config, fuses=True) for _ in range(config.num_fusion_layers))
        self.image_key_values = nn.ModuleList(KeyValueProjection(config, image_width) for _ in self.layer)
        self.post_init()

    def project_image(self, image_embeds: Tensor) -> list[KeyValues]:
        """Keys and values of each fusion layer: (B, S, W) -> per layer two tensors (B, H, S, d)."""
        return [project(image_embeds) for project in self.image_key_values]

    def forward(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_key_values: list[KeyValues],
        image_mask: Tensor | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        """Fuse texts (R, L, D) with the image each belongs to: (R, L, D), or (R, 1, D) with `cls_only`.

        `attention_mask` (R, L) marks words, `image_mask` (B, S) the image tokens to see (all without it); R
        is B, or a multiple of it with the texts of each image next to one another.
        """
        images = len(image_key_values[0][0])
        mask = _attention_mask(self.config, text_embeds, attention_mask)
        context_mask = _image_mask(self.config, text_embeds, images, image_mask)
        *lower, last = zip(self.layer, image_key_values, strict=True)
        hidden_states = text_embeds
        for layer, key_values in lower:
            hidden_states = layer(hidden_states, mask, key_values, context_mask)
        layer, key_values = last
        if cls_only:
            first = hidden_states[:, :1]
            mask = _attention_mask(self.config, first, attention_mask, hidden_states)
            context_mask = _image_mask(self.config, first, images, image_mask)
        return layer(hidden_states, mask, key_values, context_mask, cls_only)


class MaskedLMHead(nn.Module):
    """Vocabulary logits of given positions (M, D) -> (M, V)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.LayerNorm(self.activation(self.dense(hidden_states))))


def _split_heads(states: Tensor, num_heads: int) -> Tensor:
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (R, L, D) -> (R, H, L, d)


def _group_rows(states: Tensor, groups: int) -> Tensor:
    return states.reshape(groups, -1, states.shape[-1])  # (B * T, L, D) -> (B, T * L, D)


def _attention_mask(config, queries: Tensor, mask: Tensor, keys: Tensor | None = None):
    return create_bidirectional_mask(
        config=config, inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=keys
    )


def _image_mask(config, text_embeds: Tensor, images: int, image_mask: Tensor | None):
    if image_mask is None:
        return None
    keys = text_embeds.new_empty(*image_mask.shape, 0)  # only its shape and type are looked at
    return _attention_mask(config, _group_rows(text_embeds, images), image_mask, keys)
