"""BERT cut in two, layers that read text and layers that also attend to the image, and a decoder of texts
(ALBEF, X-VLM); its embeddings, attention and layers are LXMERT's too.

B: images, R: texts, L: text length, S: image tokens, D: text width, W: image width, H: heads, d = D / H, V:
vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .base import VLPPreTrainedModel
from .configuration_text import VLPTextConfig

KeyValues = tuple[Tensor, Tensor]  # keys and values, each (B, H, S, d)
Remember = Callable[[Tensor, Tensor], KeyValues]  # adds those of new words to those of the words before


class Packing(NamedTuple):
    """Texts one after the other without padding: (1, N, D) in place of (T, L, D), N words in all.

    `mask` (T, L) marks words, `slots` (T, L) is the word in each slot, any word where there is padding, and
    `words` (N,) the slot of each word.
    """

    mask: Tensor
    slots: Tensor
    words: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> "Packing":
        """The packing of texts whose words `attention_mask` (T, L) marks."""
        mask = attention_mask.bool()
        slots = mask.flatten().cumsum(0).sub(1).clamp(min=0).view_as(mask)
        return cls(mask, slots, mask.flatten().nonzero().squeeze(1))

    def pad(self, states: Tensor) -> Tensor:
        """(1, N, D) -> (T, L, D)."""
        return F.embedding(self.slots, states[0])  # several times as fast as indexing in the backward pass

    def pack(self, states: Tensor) -> Tensor:
        """(T, L, D) -> (1, N, D)."""
        return states.flatten(0, 1).index_select(0, self.words)[None]


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention that returns its weights (R, H, L, S) beside the result (R, L, H, d)."""
    weights = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1)
    result = F.dropout(weights, dropout, module.training) @ value
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

    def forward(self, input_ids: Tensor, words_before: int = 0) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (L,)
        positions = positions + self.position_offset + words_before
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
        return split_heads(self.key(context), self.num_heads), split_heads(
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

    def forward(
        self,
        hidden_states: Tensor,
        key_values: KeyValues,
        attention_mask: Tensor | None,
        packing: Packing | None = None,
    ) -> Tensor:
        queries, images = self.query(hidden_states), len(key_values[0])
        if packing is None or images == 1:  # packed texts of one image are one query as they are
            grouped = _group_rows(queries, images)  # (R, L, D) -> (B, T * L, D)
            return self.attend(grouped, key_values, attention_mask).view_as(hidden_states)
        padded = packing.pad(queries)
        context = self.attend(_group_rows(padded, images), key_values, attention_mask)
        return packing.pack(context.view_as(padded))

    def attend(self, queries: Tensor, key_values: KeyValues, attention_mask: Tensor | None) -> Tensor:
        """Queries (B, M, D) over keys and values (B, H, S, d): (B, M, D)."""
        queries = split_heads(queries, self.num_heads)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, _ = attend(self, queries, *key_values, attention_mask, scaling=self.scaling, dropout=dropout)
        return context.flatten(2)  # (B, M, H, d) -> (B, M, D)


class BertSelfAttention(BertCrossAttention):
    """Multi-head attention that makes its own keys and values from the words it reads.

    Where texts are packed, every projection sees words only, and padding is there within the attention alone.
    Of packed texts the states that attend are those of all words, or of the first of each text (1, T, D).
    """

    def __init__(self, config):
        super().__init__(config)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        words: Tensor,
        attention_mask: Tensor | None,
        packing: Packing | None = None,
        remember: Remember | None = None,
    ) -> Tensor:
        only_first = packing is not None and hidden_states is not words
        if only_first and not (self.training or torch.is_grad_enabled()) and are_plain(self.key, self.value):
            return self.read_once(hidden_states, packing.pad(words), packing.mask)
        queries, *states = self.query(hidden_states), self.key(words), self.value(words)
        if packing is not None:
            queries = queries.transpose(0, 1) if only_first else packing.pad(queries)
            states = map(packing.pad, states)
        key_values = tuple(split_heads(state, self.num_heads) for state in states)
        if remember is not None:
            key_values = remember(*key_values)
        context = self.attend(queries, key_values, attention_mask)
        if packing is None:
            return context
        return context.transpose(0, 1) if only_first else packing.pack(context)

    def read_once(self, first: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """One word of each text (1, T, D) attends to its words (T, L, D), without keys and values of these.

        q (W x) is (q W) x, and the sum of a (W x) is W times that of a x: the matrices meet T rows in place
        of T * L. The bias of the keys moves all scores of a head alike and drops out.
        """
        per_head = (self.num_heads, -1, words.shape[-1])  # of a weight (D, D): (H, d, D)
        queries = self.query(first)[0].unflatten(-1, (self.num_heads, -1))  # (T, H, d)
        probes = torch.einsum("thd,hdw->thw", queries, self.key.weight.view(per_head))
        scores = (probes @ words.mT * self.scaling).masked_fill(~mask[:, None], -torch.inf)  # (T, H, L)
        mixed = scores.softmax(dim=-1) @ words  # (T, H, D)
        context = torch.einsum("thw,hdw->thd", mixed, self.value.weight.view(per_head))
        return context.flatten(1)[None] + self.value.bias  # (1, T, D)


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

    def forward(self, hidden_states: Tensor, *context) -> Tensor:
        return self.output(self.self(hidden_states, *context), hidden_states)


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

    With `cls_only` just the first word of each text is computed, which is all that a pooled head reads. With
    `words_read` the self-attention was done before. Keys and values of the image come apart, since gradient
    checkpointing sees tensors only where they are arguments of their own.
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
        image_keys: Tensor | None = None,
        image_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        cls_only: bool = False,
        words_read: bool = False,
        packing: Packing | None = None,
        remember: Remember | None = None,
    ) -> Tensor:
        words = hidden_states
        if cls_only:
            hidden_states = words[:, :1] if packing is None else words[:, packing.slots[:, 0]]
        if not words_read:
            hidden_states = self.attention(hidden_states, words, attention_mask, packing, remember)
        if self.crossattention is not None:
            image = (image_keys, image_values)
            hidden_states = self.crossattention(hidden_states, image, image_mask, packing)
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
        mask = key_mask(self.config, hidden_states, attention_mask)
        for layer in self.layer:
            hidden_states = layer(hidden_states, mask)
        return hidden_states  # (R, L, D)


class FusionEncoder(VLPPreTrainedModel):
    """The upper layers of BERT: text embeds that attend to the image.

    Keys and values of an image are made once (`project_image`) and serve every text and every objective. With
    two images, each layer for the first is followed by one for the second, and both share the projection.
    """

    config: VLPTextConfig
    main_input_name = "text_embeds"

    def __init__(self, config: VLPTextConfig, image_width: int, num_images: int = 1):
        super().__init__(config)
        depth = range(config.num_fusion_layers)
        self.layer = nn.ModuleList(BertLayer(config, fuses=True) for _ in depth)
        self.second_layer = None
        if num_images == 2:
            self.second_layer = nn.ModuleList(BertLayer(config, fuses=True) for _ in depth)
        self.image_key_values = nn.ModuleList(KeyValueProjection(config, image_width) for _ in self.layer)
        self.post_init()

    @property
    def layers(self) -> list[BertLayer]:
        """All layers in the order in which a text passes them."""
        if self.second_layer is None:
            return list(self.layer)
        return [layer for pair in zip(self.layer, self.second_layer, strict=True) for layer in pair]

    def project_image(self, image_embeds: Tensor) -> list[KeyValues]:
        """Keys and values of each fusion layer: (B, S, W) -> per layer two tensors (B, H, S, d)."""
        return [project(image_embeds) for project in self.image_key_values]

    def read_words(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """The first self-attention (R, L, D), which sees no image, so that a text needs it once for all
        images."""
        mask = key_mask(self.config, text_embeds, attention_mask)
        return self.layer[0].attention(text_embeds, text_embeds, mask)

    def forward(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_key_values: list[KeyValues],
        image_mask: Tensor | None = None,
        cls_only: bool = False,
        words_read: bool = False,
    ) -> Tensor:
        """Fuse texts (R, L, D) with the image each belongs to: (R, L, D), or (R, 1, D) with `cls_only`.

        `attention_mask` (R, L) marks words, `image_mask` (B, S) the image tokens to see (all without it); R
        is B, or a multiple of it with the texts of each image next to one another. With `words_read`, texts
        come from `read_words`. Many texts of one image are packed in evaluation, so that padding costs
        nothing.
        """
        images, hidden_states = len(image_key_values[0][0]), text_embeds
        mask = key_mask(self.config, text_embeds, attention_mask)
        packing = None
        if images == 1 < len(text_embeds) and not self.training:
            packing = Packing.of(attention_mask)
            hidden_states = packing.pack(text_embeds)
        context_mask = _image_mask(self.config, hidden_states, images, image_mask)
        for i, (layer, key_values) in enumerate(zip(self.layers, image_key_values, strict=True)):
            is_last = i == len(image_key_values) - 1
            if cls_only and is_last:  # masks for one query per text
                mask = key_mask(self.config, text_embeds[:, :1], attention_mask, text_embeds)
                context_mask = _image_mask(self.config, text_embeds[:, :1], images, image_mask)
            hidden_states = layer(
                hidden_states,
                mask,
                *key_values,
                context_mask,
                cls_only and is_last,
                words_read and i == 0,
                packing,
            )
        if packing is not None:
            hidden_states = hidden_states.transpose(0, 1) if cls_only else packing.pad(hidden_states)
        return hidden_states


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


class Context(NamedTuple):
    """What a decoder attends to: per layer keys and values (B, H, S, d), and the mask (B, S) of what to see,
    None for all."""

    key_values: list[KeyValues]
    mask: Tensor | None = None

    def select(self, index: Tensor) -> "Context":
        """The contexts at `index` (M,), which may repeat."""
        key_values = [(keys[index], values[index]) for keys, values in self.key_values]
        return Context(key_values, None if self.mask is None else self.mask[index])


class TextDecoder(VLPPreTrainedModel, GenerationMixin):
    """BERT that writes: each word attends to the words before it, and to a context (ALBEF section 5).

    Keys and values of the context are made once (`read_context`) and serve every text and every beam. The
    context is seen by `num_layers` layers, those of the config without it; `num_plain_layers` layers below
    them see words only.
    """

    config: VLPTextConfig
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.decoder.weight": "embeddings.word_embeddings.weight"}

    def __init__(
        self,
        config: VLPTextConfig,
        context_width: int,
        num_layers: int | None = None,
        num_plain_layers: int = 0,
    ):
        super().__init__(config)
        num_layers = config.num_decoder_layers if num_layers is None else num_layers
        self.embeddings = BertEmbeddings(config)
        self.plain_layer = nn.ModuleList(BertLayer(config, fuses=False) for _ in range(num_plain_layers))
        self.layer = nn.ModuleList(BertLayer(config, fuses=True) for _ in range(num_layers))
        self.key_values = nn.ModuleList(KeyValueProjection(config, context_width) for _ in self.layer)
        self.lm_head = MaskedLMHead(config)
        for layer in [*self.plain_layer, *self.layer]:
            layer.attention.self.is_causal = True
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head.decoder = value

    def read_context(self, states: Tensor, mask: Tensor | None = None) -> Context:
        """Keys and values of every layer for states (B, S, W), of which `mask` (B, S) marks those to see."""
        return Context([project(states) for project in self.key_values], mask)

    def decode(
        self,
        input_ids: Tensor,
        context: Context,
        cache: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """States (R, L, D) that predict the word after each of `input_ids` (R, L); packed (1, N, D) with
        `packing`.

        R is the number of contexts or a multiple of it, with the texts of each next to one another. Padding
        on the right is seen by no word before it. The words go into `cache` after those it holds.
        """
        words_before = 0 if cache is None else cache.get_seq_length()
        hidden_states = self.embeddings(input_ids, words_before)
        mask = create_causal_mask(self.config, hidden_states, None, cache)
        context_mask = _image_mask(self.config, hidden_states, len(context.key_values[0][0]), context.mask)
        if packing is not None:
            hidden_states = packing.pack(hidden_states)
        layers = [(layer, (None, None)) for layer in self.plain_layer]
        layers += zip(self.layer, context.key_values, strict=True)
        for i, (layer, key_values) in enumerate(layers):
            remember = None if cache is None else partial(cache.update, layer_idx=i)
            hidden_states = layer(
                hidden_states, mask, *key_values, context_mask, packing=packing, remember=remember
            )
        return hidden_states

    def first_words(self, texts: int) -> Tensor:
        """What texts begin with: [CLS] (texts, 1).

        Raises:
            ValueError: the config does not tell which ids texts begin and end with.
        """
        bos, eos = self.config.bos_token_id, self.config.eos_token_id
        if bos is None or eos is None:
            raise ValueError(
                f"text_config.bos_token_id is {bos} and text_config.eos_token_id {eos}; set them to the ids "
                "of [CLS] and [SEP]"
            )
        return torch.full((texts, 1), bos, device=self.device)

    def forward(
        self,
        input_ids: Tensor,
        context: Context,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (R, L, V) of the word after each; what `generate` calls."""
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        logits = self.lm_head(self.decode(input_ids, context, past_key_values))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, past_key_values=None, context=None, **kwargs):
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "context": context,
            "use_cache": kwargs.get("use_cache", True),
        }


def are_plain(*layers: nn.Module) -> bool:
    """Whether weight and bias say all that the layers do: not those of adapters, nor offloaded ones."""
    return all(type(layer) is nn.Linear and not layer.weight.is_meta for layer in layers)


def project_together(states: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What linear layers of one width make of the same states (..., W), in one product if they are plain."""
    if not are_plain(*layers):
        return tuple(layer(states) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return F.linear(states, weight, bias).chunk(len(layers), dim=-1)


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (R, L, D) -> (R, H, L, d)


def _group_rows(states: Tensor, groups: int) -> Tensor:
    return states.reshape(groups, -1, states.shape[-1])  # (B * T, L, D) -> (B, T * L, D)


def key_mask(config, queries: Tensor, mask: Tensor | None, keys: Tensor | None = None) -> Tensor | None:
    """Which keys (B, S) to see, as the attention of `config` wants it for `queries` (B, M, D); `keys` (B, S,
    D) where they are not the queries themselves. None for all."""
    return create_bidirectional_mask(
        config=config, inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=keys
    )


def _image_mask(config, text_embeds: Tensor, images: int, image_mask: Tensor | None):
    if image_mask is None:
        return None
    keys = text_embeds.new_empty(*image_mask.shape, 0)  # only its shape and type are looked at
    return key_mask(config, _group_rows(text_embeds, images), image_mask, keys)
