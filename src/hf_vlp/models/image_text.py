"""What ALBEF and X-VLM have in common: an image trunk, a text encoder, a fusion of both, and matching.

B: images, R: texts and their visual concepts, S = 1 + N image tokens, L: text length, D: text width, W: image
width, P: projection width, H: heads, d = D / H.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbones import ImageTrunk
from .base import Projection, VLPPreTrainedModel
from .checks import check_index, check_pairs
from .layers_bert import FusionEncoder, KeyValues, TextEncoder
from .negatives import hard_negatives
from .objectives import contrastive_logits
from .outputs import VLPModelOutput
from .public_weights import load_public_weights, split_bert_config, text_and_fusion_weights


class VisualConcepts(NamedTuple):
    """What texts attend to: an image or a region each.

    `embeds` (R, W) is the global token of each concept, `key_values` hold (R, H, S, d) per fusion layer,
    `mask` (R, S) marks the tokens to see, None for all.
    """

    embeds: Tensor
    key_values: list[KeyValues]
    mask: Tensor | None = None

    def select(self, index: Tensor) -> "VisualConcepts":
        """The concepts at `index` (M,), which may repeat."""
        key_values = [(keys[index], values[index]) for keys, values in self.key_values]
        return VisualConcepts(self.embeds[index], key_values, None if self.mask is None else self.mask[index])


def unit_vectors(projection: nn.Module | None, embeds: Tensor) -> Tensor | None:
    """What the contrastive loss compares: projected [CLS] states (R, W) of length 1, (R, P)."""
    return None if projection is None else F.normalize(projection(embeds), dim=-1)


class ImageTextPreTrainedModel(VLPPreTrainedModel):
    """Common parent of the models and heads."""

    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)(\w+_head|image_projection|text_projection)\.",
        r"(^|\.)temperature$",
    ]
    # what weights of the base model or of pretraining become in a head that holds them elsewhere: pattern of
    # the old name, and the new one
    _pretrained_keys: dict[str, str] = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ImageTextModel) and module.temperature is not None:
            init.constant_(module.temperature, self.config.initial_temperature)

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        image_size: int | None = None,
        num_fusion_layers: int = 6,
        **config_fields,
    ):
        """Start from a public vision model and a public BERT, RoBERTa or XLM-R, as the paper does.

        Its lower half becomes the text layers, the upper half the fusion layers. Cross-attention,
        projections and heads are new (`new_parameters`).

        Args:
            vision: name or folder of a vision model, or of a CLIP, of which the image encoder is taken.
            text: name or folder of a BERT, a RoBERTa or an XLM-R.
            image_size: side of the images in pixels, where the vision model's position tables are to be
                resampled.
            num_fusion_layers: fusion layers, taken evenly from the upper half.
            config_fields: further fields of the config.

        Raises:
            ValueError: `text` is a model of another kind, its upper half is no multiple of
                `num_fusion_layers`, or the image size does not fit.
        """
        trunk, bert = AutoModel.from_pretrained(vision), AutoModelForMaskedLM.from_pretrained(text)
        trunk = getattr(trunk, "vision_model", trunk)  # of CLIP
        text_config = split_bert_config(bert.config, num_fusion_layers)
        model = cls(cls.config_class(vision_config=trunk.config, text_config=text_config, **config_fields))
        state = {f"vision_model.trunk.{name}": value for name, value in trunk.state_dict().items()}
        state |= text_and_fusion_weights(bert.state_dict(), text_config, bert.config.num_hidden_layers)
        state = {cls.renamed(name): value for name, value in state.items()}
        model.new_parameters = load_public_weights(model, state)
        if image_size is not None:
            model.set_image_size(image_size)
        return model.eval()

    @classmethod
    def renamed(cls, name: str) -> str:
        """The name in this head of a weight of the base model or of pretraining."""
        for pattern, target in cls._pretrained_keys.items():
            name = re.sub(pattern, target, name)
        return name


class ImageTextModel(ImageTextPreTrainedModel):
    """The image trunk, the text encoder, their fusion, and the projections to what ITC compares.

    Heads that compare nothing leave the projections out (`add_projections=False`), those that read two images
    for each text have `num_images=2`.
    """

    def __init__(self, config, add_projections: bool = True, num_images: int = 1):
        super().__init__(config)
        self.vision_model = ImageTrunk(config.vision_config)
        self.text_model = TextEncoder(config.text_config)
        self.fusion_model = FusionEncoder(config.text_config, self.vision_model.width, num_images)
        self.image_projection = self.text_projection = self.temperature = None
        if add_projections:
            self.image_projection = Projection(self.vision_model.width, config.projection_dim)
            self.text_projection = Projection(config.text_config.hidden_size, config.projection_dim)
            self.temperature = nn.Parameter(torch.full((1,), float(config.initial_temperature)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.embeddings.word_embeddings = value

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Images (B, 3, size, size) to embeds (B, S, W) `[global; patches]` and unit vectors (B, P)."""
        image_embeds = self.vision_model(pixel_values)
        return BaseModelOutputWithPooling(
            image_embeds, unit_vectors(self.image_projection, image_embeds[:, 0])
        )

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Texts (R, L) to embeds (R, L, D) and unit vectors (R, P)."""
        text_embeds = self.text_model(
            input_ids, all_ones(input_ids) if attention_mask is None else attention_mask
        )
        return BaseModelOutputWithPooling(text_embeds, unit_vectors(self.text_projection, text_embeds[:, 0]))

    def project_image(self, image_embeds: Tensor) -> list[KeyValues]:
        """Keys and values of every fusion layer, once per image: (B, S, W) -> per layer two (B, H, S, d)."""
        return self.fusion_model.project_image(image_embeds)

    def image_concepts(self, image_embeds: Tensor) -> VisualConcepts:
        """Whole images (B, S, W) as what texts attend to."""
        return VisualConcepts(image_embeds[:, 0], self.project_image(image_embeds))

    def fuse(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        key_values: list[KeyValues],
        image_mask: Tensor | None = None,
        cls_only: bool = False,
        words_read: bool = False,
    ) -> Tensor:
        """Texts (R, L, D) fused with the image of each: (R, L, D), or only [CLS] (R, 1, D) with `cls_only`.

        `key_values` come from `project_image`, `image_mask` (B, S) marks the image tokens to see. R is B, or
        a multiple of it with the texts of each image next to one another.
        """
        return self.fusion_model(text_embeds, attention_mask, key_values, image_mask, cls_only, words_read)

    def compare(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Contrastive logits of unit vectors (B, P), (R, P): (B, R)."""
        return contrastive_logits(image_features, text_features, self.temperature)

    @torch.no_grad()
    def hold_temperature(self):
        """Keep the temperature in its range; in place, so before a forward uses it."""
        self.temperature.clamp_(self.config.min_temperature, self.config.max_temperature)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPModelOutput | tuple:
        """Encode images (B, 3, size, size), texts (R, L), or both and their fusion, text r with image r."""
        if pixel_values is None and input_ids is None:
            raise ValueError("pixel_values and input_ids are both None; give images, texts, or both")
        output = VLPModelOutput()
        if input_ids is not None:
            attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
            text = self.get_text_features(input_ids, attention_mask)
            output.text_embeds, output.text_features = text.last_hidden_state, text.pooler_output
        if pixel_values is not None:
            image = self.get_image_features(pixel_values)
            output.image_embeds, output.image_features = image.last_hidden_state, image.pooler_output
        if pixel_values is not None and input_ids is not None:
            check_pairs(len(pixel_values), input_ids)
            key_values = self.project_image(output.image_embeds)
            output.last_hidden_state = self.fuse(output.text_embeds, attention_mask, key_values)
        return output if return_dict else output.to_tuple()


class ImageTextHead(ImageTextPreTrainedModel):
    """A task head on an `ImageTextModel`, whose methods it passes on."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """See `ImageTextModel.get_image_features`."""
        return self.model.get_image_features(pixel_values)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """See `ImageTextModel.get_text_features`."""
        return self.model.get_text_features(input_ids, attention_mask)

    def project_image(self, image_embeds: Tensor) -> list[KeyValues]:
        """See `ImageTextModel.project_image`."""
        return self.model.project_image(image_embeds)


class LabelledHead(ImageTextHead):
    """A head that learns labels by cross-entropy.

    What it predicts is a function of a `part`: the model, or where the paper has one its teacher.
    """

    def learn(self, predict: Callable[[nn.Module], Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, C) that `predict` makes of the model, and the loss (M,) of each at `labels` (M,)."""
        logits = predict(self)
        return logits, F.cross_entropy(logits.float(), labels, reduction="none")


class MatchingHead(ImageTextHead):
    """A head that matches texts with visual concepts (ITM).

    `negative_smoothing` is added to the probability of each hard negative.
    """

    negative_smoothing = 0.0

    def read_words(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """What `match` makes of texts (R, L, D) before it sees an image, for texts that meet many images."""
        return self.model.fusion_model.read_words(text_embeds, attention_mask)

    def match(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        key_values: list[KeyValues],
        words_read: bool = False,
    ) -> Tensor:
        """Matching logits (R, 2), index 1 for a match, of texts (R, L, D) with the images of `key_values`.

        R is the number of images or a multiple of it, with the texts of each image next to one another. With
        `words_read`, the texts come from `read_words`.
        """
        fused = self.model.fuse(text_embeds, attention_mask, key_values, cls_only=True, words_read=words_read)
        return self.itm_head(fused[:, 0])

    def draw_negatives(
        self, logits_per_image: Tensor, logits_per_text: Tensor, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A wrong image for each text and a wrong text for each image (R,); none for the only pair of a batch
        in evaluation, where the last batch is what is left.
        """
        if len(logits_per_image) == 1 and not self.training:
            return logits_per_image.new_zeros(2, 0, dtype=torch.long).unbind()
        return hard_negatives(logits_per_image, logits_per_text, ids, self.negative_smoothing)

    def match_hard(
        self,
        concepts: VisualConcepts,
        text_embeds: Tensor,
        mask: Tensor,
        wrong_image: Tensor,
        wrong_text: Tensor,
    ) -> Tensor:
        """Matching logits (3R, 2): each pair, each text with a wrong image, each image with a wrong text."""
        right = torch.arange(len(text_embeds), device=text_embeds.device)
        texts = torch.cat([right, right[: len(wrong_image)], wrong_text])
        concepts = concepts.select(torch.cat([right, wrong_image, right[: len(wrong_text)]]))
        fused = self.model.fuse(
            text_embeds[texts], mask[texts], concepts.key_values, concepts.mask, cls_only=True
        )
        return self.itm_head(fused[:, 0])


def images_of_texts(
    model: ImageTextModel, pixel_values: Tensor, input_ids: Tensor, image_index: Tensor | None
) -> VisualConcepts:
    """The image of each text (R,): image r of text r, or that of `image_index` (R,), encoded once.

    Raises:
        ValueError: the texts do not fit the images.
    """
    images = model.image_concepts(model.vision_model(pixel_values))
    if image_index is not None:
        check_index(image_index, len(pixel_values))
        images = images.select(image_index)
    check_pairs(len(images.embeds), input_ids)
    return images


def all_ones(input_ids: Tensor) -> Tensor:
    """The mask of texts without padding."""
    return torch.ones_like(input_ids)
