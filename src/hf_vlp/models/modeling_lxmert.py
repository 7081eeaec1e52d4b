"""LXMERT: learning cross-modality encoder representations from transformers (arXiv 1908.07490).

Words and the regions of an image pass layers of their own, then layers in which each reads the other. The
first word's state, pooled, stands for the pair. Names of modules and parameters are those of transformers'
LXMERT and, after the prefix, of the official code, whose files load as they are.

B: images, T: texts, R: regions of an image, L: text length, D: hidden width, F: width of a region's feature.
Texts that have padding are packed (`Packing`): (1, N, D) for N words, so that padding costs nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForPreTraining
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, is_torchdynamo_exporting

from .attention_maps import RECORDED, recording
from .base import VLPPreTrainedModel
from .checks import check_index, check_pairs
from .configuration_lxmert import LXMERTConfig
from .layers_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    KeyValues,
    Packing,
    key_mask,
    project_together,
    split_heads,
)
from .public_weights import load_public_weights, shared_fields


class LXMERTEmbeddings(BertEmbeddings):
    """Word, position and token-type embeddings."""

    def __init__(self, config: LXMERTConfig):
        super().__init__(config)
        if config.official_padding_idx:  # no gradient for the row
            self.position_embeddings.padding_idx = self.token_type_embeddings.padding_idx = 0


class RegionEmbeddings(nn.Module):
    """Features and boxes, each projected and normalised, to their mean. LXMERT section 2.1."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.visn_fc = nn.Linear(config.visual_feat_dim, config.hidden_size)
        self.visn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.box_fc = nn.Linear(config.visual_pos_dim, config.hidden_size)
        self.box_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, visual_feats: Tensor, visual_pos: Tensor) -> Tensor:
        features = self.visn_layer_norm(self.visn_fc(visual_feats))
        boxes = self.box_layer_norm(self.box_fc(visual_pos))
        return self.dropout((features + boxes) / 2)  # (B, R, D)


class Pairs(NamedTuple):
    """How T pairs of words (T, L, D) and regions (T, R, D) attend: who sees what, as `key_mask` makes it, and
    the packing of the words, None where they are padded."""

    words: Tensor | None
    words_for_first: Tensor | None
    words_for_regions: Tensor | None
    regions: Tensor | None
    regions_for_words: Tensor | None
    packing: Packing | None


class CrossAttention(nn.Module):
    """Words attend to regions and regions to words, with the same weights (LXMERT section 2.2)."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.att = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, words: Tensor, regions: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Both directions read the inputs, and are projected as one row of words and regions."""
        both = torch.cat([words.flatten(0, 1), regions.flatten(0, 1)])
        counts = [words.shape[0] * words.shape[1], regions.shape[0] * regions.shape[1]]
        states = project_together(both, self.att.query, self.att.key, self.att.value)
        of_words, of_regions = zip(*(part.split(counts) for part in states), strict=True)
        word_queries, *word_keys = (_pad(part.view_as(words), pairs) for part in of_words)
        region_queries, *region_keys = (part.view_as(regions) for part in of_regions)
        attended = [
            _pack(self.att.attend(word_queries, self._heads(region_keys), pairs.regions_for_words), pairs),
            self.att.attend(region_queries, self._heads(word_keys), pairs.words_for_regions),
        ]
        output = self.output(torch.cat([part.flatten(0, 1) for part in attended]), both)
        new_words, new_regions = output.split(counts)
        return new_words.view_as(words), new_regions.view_as(regions)

    def read_regions(self, words: Tensor, regions: Tensor, pairs: Pairs) -> Tensor:
        """The direction from words alone."""
        keys = project_together(regions, self.att.key, self.att.value)
        queries = _pad(self.att.query(words), pairs)
        attended = self.att.attend(queries, self._heads(keys), pairs.regions_for_words)
        return self.output(_pack(attended, pairs), words)

    def _heads(self, key_values: Iterable[Tensor]) -> KeyValues:
        return tuple(split_heads(states, self.att.num_heads) for states in key_values)


def _pad(words: Tensor, pairs: Pairs) -> Tensor:
    return words if pairs.packing is None else pairs.packing.pad(words)


def _pack(words: Tensor, pairs: Pairs) -> Tensor:
    return words if pairs.packing is None else pairs.packing.pack(words)


class CrossModalityLayer(GradientCheckpointingLayer):
    """Cross-attention, then self-attention and feed-forward of each side (LXMERT section 2.2).

    With `pooled_only` it is the last layer of a model of which nothing but the first word's state is read: it
    has no layers for regions, and gives (T, 1, D).
    """

    def __init__(self, config: LXMERTConfig, pooled_only: bool = False):
        super().__init__()
        self.pooled_only = pooled_only
        self.visual_attention = CrossAttention(config)
        self.lang_self_att = BertAttention(config, BertSelfAttention)
        self.lang_inter = BertIntermediate(config)
        self.lang_output = BertOutput(config, config.intermediate_size)
        if not pooled_only:
            self.visn_self_att = BertAttention(config, BertSelfAttention)
            self.visn_inter = BertIntermediate(config)
            self.visn_output = BertOutput(config, config.intermediate_size)

    def forward(self, words: Tensor, regions: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        if self.pooled_only:
            words = self.visual_attention.read_regions(words, regions, pairs)
            first = words[:, :1] if pairs.packing is None else words[:, pairs.packing.slots[:, 0]]
            first = self.lang_self_att(first, words, pairs.words_for_first, pairs.packing)
            return self.lang_output(self.lang_inter(first), first), None
        words, regions = self.visual_attention(words, regions, pairs)
        words = self.lang_self_att(words, words, pairs.words, pairs.packing)
        regions = self.visn_self_att(regions, regions, pairs.regions)
        words = self.lang_output(self.lang_inter(words), words)
        return words, self.visn_output(self.visn_inter(regions), regions)


class LXMERTEncoder(nn.Module):
    """The region embeddings and the three stacks of layers."""

    def __init__(self, config: LXMERTConfig, pooled_only: bool):
        super().__init__()
        self.visn_fc = RegionEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(config, fuses=False) for _ in range(config.l_layers))
        self.r_layers = nn.ModuleList(BertLayer(config, fuses=False) for _ in range(config.r_layers))
        self.x_layers = nn.ModuleList(
            CrossModalityLayer(config, pooled_only and i == config.x_layers - 1)
            for i in range(config.x_layers)
        )


class Pooler(nn.Module):
    """The first word's state (T, L, D) -> (T, D)."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, words: Tensor) -> Tensor:
        return self.dense(words[:, 0]).tanh()


@dataclass
class LXMERTModelOutput(ModelOutput):
    """States of words and regions, and the pooled state.

    - last_hidden_state (T, L, D), the first word's (T, 1, D) from a model that reads only this
    - region_hidden_state (T, R, D), None from such a model
    - pooler_output (T, D)
    - text_attentions, region_attentions: self-attention maps (., H, L, L) and (., H, R, R) of every layer,
      those of the cross-modality layers last
    - text_to_region_attentions (T, H, L, R), region_to_text_attentions (T, H, R, L): one for each
      cross-modality layer
    """

    last_hidden_state: Tensor | None = None
    region_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    text_attentions: tuple[Tensor, ...] | None = None
    region_attentions: tuple[Tensor, ...] | None = None
    text_to_region_attentions: tuple[Tensor, ...] | None = None
    region_to_text_attentions: tuple[Tensor, ...] | None = None


class LXMERTPreTrainedModel(VLPPreTrainedModel):
    """Common parent of the LXMERT classes."""

    config: LXMERTConfig
    config_class = LXMERTConfig
    base_model_prefix = "lxmert"
    main_input_name = "visual_feats"
    _no_split_modules = ["LXMERTEmbeddings", "RegionEmbeddings", "BertLayer", "CrossModalityLayer"]
    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)(cls|obj_predict_head|answer_head|cls_head|region_head)\.",
        # of the last layer, in models that read only the pooled state
        r"encoder\.x_layers\.\d+\.visn_(self_att|inter|output)\.",
    ]

    @classmethod
    def from_bert(cls, text: str, **config_fields):
        """Start from a public BERT: its embeddings, its lower layers, its pooler, and what its heads for
        words and sentence pairs know. All else is new (`new_parameters`).

        The paper's model starts from scratch; the official code offers this too.

        Args:
            text: name or folder of a BERT.
            config_fields: further fields of the config, such as `l_layers`, 9 without it.

        Raises:
            ValueError: the BERT has fewer layers than `l_layers`.
        """
        bert = AutoModelForPreTraining.from_pretrained(text)
        config = cls.config_class(**shared_fields(cls.config_class, bert.config) | config_fields)
        if config.l_layers > bert.config.num_hidden_layers:
            raise ValueError(
                f"l_layers={config.l_layers}, but {text} has {bert.config.num_hidden_layers} layers; use "
                "fewer"
            )
        model = cls(config)
        state = {name.removeprefix("bert."): value for name, value in bert.state_dict().items()}
        model.new_parameters = load_public_weights(model, state)
        return model.eval()

    def set_image_size(self, image_size: int):
        """LXMERT reads regions of images of any size.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"image_size is {image_size}, but LXMERT reads regions; leave image_size out")


class LXMERTModel(LXMERTPreTrainedModel):
    """The encoder of words, the encoder of regions, and the cross-modality encoder.

    With `pooled_only` the last layer computes the first word alone, which is all that most heads read.
    """

    def __init__(self, config: LXMERTConfig, pooled_only: bool = False):
        super().__init__(config)
        self.pooled_only = pooled_only
        self.embeddings = LXMERTEmbeddings(config)
        self.encoder = LXMERTEncoder(config, pooled_only)
        self.pooler = Pooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, keep_padding: bool = True
    ) -> BaseModelOutput:
        """Texts (T, L) that have seen no image: `last_hidden_state` (T, L, D); `keep_padding` as in
        `forward`."""
        words = self.embeddings(input_ids)
        mask = key_mask(self.config, words, attention_mask)
        packing = self._packing(attention_mask, keep_padding)
        if packing is not None:
            words = packing.pack(words)
        for layer in self.encoder.layer:
            words = layer(words, mask, packing=packing)
        return BaseModelOutput(words if packing is None else packing.pad(words))

    def get_image_features(
        self, visual_feats: Tensor, visual_pos: Tensor, visual_attention_mask: Tensor | None = None
    ) -> BaseModelOutput:
        """Regions with features (B, R, F) and boxes (B, R, 4) that have seen no text: `last_hidden_state`
        (B, R, D)."""
        _check_regions(visual_feats, visual_pos, visual_attention_mask, self.config)
        regions = self.encoder.visn_fc(visual_feats, visual_pos)
        mask = key_mask(self.config, regions, visual_attention_mask)
        for layer in self.encoder.r_layers:
            regions = layer(regions, mask)
        return BaseModelOutput(regions)

    def fuse(
        self,
        words: Tensor,
        attention_mask: Tensor | None,
        regions: Tensor,
        visual_attention_mask: Tensor | None,
        keep_padding: bool = True,
    ) -> LXMERTModelOutput:
        """The cross-modality encoder on T pairs of words (T, L, D) and regions (T, R, D), each from its own
        encoder; `keep_padding` as in `forward`."""
        packing = self._packing(attention_mask, keep_padding)
        pairs = self._pairs(words, attention_mask, regions, visual_attention_mask, packing)
        words = _pack(words, pairs)
        for layer in self.encoder.x_layers:
            words, regions = layer(words, regions, pairs)
        if pairs.packing is not None:
            words = words.transpose(0, 1) if regions is None else pairs.packing.pad(words)
        return LXMERTModelOutput(words, regions, self.pooler(words))

    def forward(
        self,
        input_ids: Tensor,
        visual_feats: Tensor,
        visual_pos: Tensor,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        keep_padding: bool = True,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> LXMERTModelOutput | tuple:
        """Read texts with the regions of their images.

        Args:
            input_ids, attention_mask: texts (T, L), and 1 where there is a word.
            visual_feats: features of regions (B, R, F).
            visual_pos: their boxes (B, R, 4), x1, y1, x2, y2 over the image's width and height, 0..1.
            visual_attention_mask: (B, R), 1 where there is a region.
            image_index: (T,) the image of each text, whose regions are encoded once; text t reads image t
                without it.
            keep_padding: compute the states of padding too, as the official code does. Without it, and with
                `pooled_only`, they cost nothing and are those of some word.
            output_attentions: give the attention maps of every layer, which takes the eager attention.

        Raises:
            ValueError: shapes that do not fit.
        """
        inputs = (input_ids, visual_feats, visual_pos, attention_mask, visual_attention_mask, image_index)
        inputs = (*inputs, keep_padding)
        output = self._with_attentions(*inputs) if output_attentions else self._encode(*inputs)
        return output if return_dict else output.to_tuple()

    def _encode(
        self,
        input_ids: Tensor,
        visual_feats: Tensor,
        visual_pos: Tensor,
        attention_mask: Tensor | None,
        visual_attention_mask: Tensor | None,
        image_index: Tensor | None,
        keep_padding: bool,
    ) -> LXMERTModelOutput:
        words = self.get_text_features(input_ids, attention_mask, keep_padding).last_hidden_state
        regions = self.get_image_features(visual_feats, visual_pos, visual_attention_mask).last_hidden_state
        if image_index is not None:
            check_index(image_index, len(regions))
            regions = regions[image_index]
            visual_attention_mask = select(visual_attention_mask, image_index)
        check_pairs(len(regions), input_ids)
        return self.fuse(words, attention_mask, regions, visual_attention_mask, keep_padding)

    def _with_attentions(self, *inputs) -> LXMERTModelOutput:
        encoder = self.encoder
        own = [[layer.attention.self for layer in layers] for layers in (encoder.layer, encoder.r_layers)]
        own[0] += [layer.lang_self_att.self for layer in encoder.x_layers]
        own[1] += [layer.visn_self_att.self for layer in encoder.x_layers if not layer.pooled_only]
        cross = [layer.visual_attention.att for layer in encoder.x_layers]
        with recording([*own[0], *own[1], *cross], self.config) as maps:
            output = self._encode(*inputs)
        # a checkpointed layer records its maps once more in the backward pass, words to regions come first
        text, region = maps[: len(own[0])], maps[len(own[0]) : -len(cross)]
        output.text_attentions = tuple(recorded[0] for recorded in text)
        output.region_attentions = tuple(recorded[0] for recorded in region)
        output.text_to_region_attentions = tuple(recorded[0] for recorded in maps[-len(cross) :])
        output.region_to_text_attentions = tuple(
            recorded[1] for recorded in maps[-len(cross) :] if len(recorded) > 1
        )
        return output

    def _packing(self, attention_mask: Tensor | None, keep_padding: bool) -> Packing | None:
        """How to leave padding out, where there is any that nobody reads; attention maps are read with it."""
        keep_padding = keep_padding and not self.pooled_only or is_torchdynamo_exporting()
        if attention_mask is None or keep_padding or self.config._attn_implementation == RECORDED:
            return None
        return None if attention_mask.all() else Packing.of(attention_mask)

    def _pairs(
        self,
        words: Tensor,
        word_mask: Tensor | None,
        regions: Tensor,
        region_mask: Tensor | None,
        packing: Packing | None,
    ) -> Pairs:
        config = self.config
        return Pairs(
            words=key_mask(config, words, word_mask),
            words_for_first=key_mask(config, words[:, :1], word_mask, words),
            words_for_regions=key_mask(config, regions, word_mask, words),
            regions=key_mask(config, regions, region_mask),
            regions_for_words=key_mask(config, words, region_mask, regions),
            packing=packing,
        )


def select(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """The rows of a mask at `index`, None of none."""
    return None if mask is None else mask[index]


def _check_regions(features: Tensor, boxes: Tensor, mask: Tensor | None, config: LXMERTConfig):
    width = config.visual_feat_dim
    if features.ndim != 3 or features.shape[-1] != width:
        raise ValueError(
            f"visual_feats is {tuple(features.shape)}, but the model reads (images, regions, {width}); use "
            "the extractor that the model was trained with"
        )
    if boxes.shape != (*features.shape[:2], config.visual_pos_dim):
        raise ValueError(
            f"visual_pos is {tuple(boxes.shape)} for visual_feats {tuple(features.shape)}; give one box of "
            f"{config.visual_pos_dim} numbers for each region"
        )
    if mask is not None and mask.shape != features.shape[:2]:
        raise ValueError(
            f"visual_attention_mask is {tuple(mask.shape)} for visual_feats {tuple(features.shape)}; give 1 "
            "or 0 for each region"
        )


class PredictionTransform(nn.Module):
    """What prediction heads of words and of regions begin with: (M, D) -> (M, D)."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class ClassificationHead(nn.Module):
    """The two-layer head on the pooled state, or on those of two images: (T, width) -> (T, classes)."""

    def __init__(self, config: LXMERTConfig, width: int, classes: int):
        super().__init__()
        inner = 2 * config.hidden_size
        self.logit_fc = nn.Sequential(
            nn.Linear(width, inner),
            nn.GELU(),
            nn.LayerNorm(inner, eps=config.layer_norm_eps),
            nn.Linear(inner, classes),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.logit_fc(hidden_states)
