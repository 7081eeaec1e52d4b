"""X-VLM: multi-grained vision-language pre-training, aligning texts with visual concepts (arXiv 2111.08276).

One image pass gives a visual concept for the whole image and for each of its regions; texts are compared with
concepts (ITC), matched to them (ITM), completed from them (MLM), and located in the image (box).

B: images, R: texts and their visual concepts, N: patches, S = 1 + N image tokens, L: text length, D: text
width, W: image width, P: projection width, H: heads, d = D / H.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbones import ImageTrunk
from .base import Projection, VLPPreTrainedModel
from .boxes import box_losses
from .checks import check_ids, check_index, check_pairs, check_regions
from .configuration_xvlm import XVLMConfig
from .distributed import gather_rows
from .layers_bert import FusionEncoder, KeyValues, MaskedLMHead, TextEncoder
from .negatives import hard_negatives
from .objectives import contrastive_logits, contrastive_loss, masked_lm_loss, matching_loss
from .outputs import VLPForGroundingOutput, VLPForPreTrainingOutput, VLPForRetrievalOutput, VLPModelOutput
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


class PredictionHead(nn.Module):
    """The two-layer head on the fused [CLS] state: (R, D) -> (R, outputs)."""

    def __init__(self, config: XVLMConfig, outputs: int):
        super().__init__()
        width = config.text_config.hidden_size
        self.fc1 = Projection(width, 2 * width)
        self.layer_norm = nn.LayerNorm(2 * width, eps=config.head_layer_norm_eps)
        self.fc2 = Projection(2 * width, outputs)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.layer_norm(self.fc1(hidden_states))))


def unit_vectors(projection: nn.Module | None, embeds: Tensor) -> Tensor | None:
    """What the contrastive loss compares: projected [CLS] states (R, W) of length 1, (R, P)."""
    return None if projection is None else F.normalize(projection(embeds), dim=-1)


class XVLMPreTrainedModel(VLPPreTrainedModel):
    """Common parent of the X-VLM classes."""

    config: XVLMConfig
    config_class = XVLMConfig
    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)(lm_head|itm_head|bbox_head|image_projection|text_projection)\.",
        r"(^|\.)temperature$",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, XVLMModel) and module.temperature is not None:
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
        """Start from a public vision model and a public BERT, as the paper does.

        BERT's lower half becomes the text layers, the upper half the fusion layers. Cross-attention,
        projections and heads are new (`new_parameters`).

        Args:
            vision: name or folder of a vision model.
            text: name or folder of a BERT.
            image_size: side of the images in pixels, where the vision model's position tables are to be
                resampled.
            num_fusion_layers: fusion layers, taken evenly from BERT's upper half.
            config_fields: further fields of `XVLMConfig`.

        Raises:
            ValueError: the upper half is no multiple of `num_fusion_layers`, or the image size does not fit.
        """
        trunk, bert = AutoModel.from_pretrained(vision), AutoModelForMaskedLM.from_pretrained(text)
        text_config = split_bert_config(bert.config, num_fusion_layers)
        model = cls(XVLMConfig(vision_config=trunk.config, text_config=text_config, **config_fields))
        state = {f"vision_model.trunk.{name}": value for name, value in trunk.state_dict().items()}
        state |= text_and_fusion_weights(bert.state_dict(), text_config, bert.config.num_hidden_layers)
        model.new_parameters = load_public_weights(model, state)
        if image_size is not None:
            model.set_image_size(image_size)
        return model.eval()


class XVLMModel(XVLMPreTrainedModel):
    """The image trunk, the text encoder, their fusion, and the projections to what ITC compares.

    Heads that compare nothing leave the projections out (`add_projections=False`).
    """

    def __init__(self, config: XVLMConfig, add_projections: bool = True):
        super().__init__(config)
        self.vision_model = ImageTrunk(config.vision_config)
        self.text_model = TextEncoder(config.text_config)
        self.fusion_model = FusionEncoder(config.text_config, self.vision_model.width)
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
            input_ids, _all_ones(input_ids) if attention_mask is None else attention_mask
        )
        return BaseModelOutputWithPooling(text_embeds, unit_vectors(self.text_projection, text_embeds[:, 0]))

    def get_region_features(
        self, pixel_values: Tensor, region_image_index: Tensor, region_patch_mask: Tensor
    ) -> BaseModelOutputWithPooling:
        """Regions to embeds (R, S, W) `[mean of covered patches; all patches]` and unit vectors (R, P).

        The images (B, 3, size, size) are encoded once; `region_image_index` (R,) tells the image of each
        region and `region_patch_mask` (R, N) the patches it covers. X-VLM section 3.

        Raises:
            ValueError: the masks do not fit the patches, or the regions name more images than there are.
        """
        image_embeds = self.vision_model(pixel_values)
        check_regions(image_embeds, region_image_index, region_patch_mask)
        region_embeds = _region_means(image_embeds, region_image_index, region_patch_mask)
        embeds = torch.cat([region_embeds[:, None], image_embeds[region_image_index, 1:]], dim=1)
        return BaseModelOutputWithPooling(embeds, unit_vectors(self.image_projection, region_embeds))

    def project_image(self, image_embeds: Tensor) -> list[KeyValues]:
        """Keys and values of every fusion layer, once per image: (B, S, W) -> per layer two (B, H, S, d)."""
        return self.fusion_model.project_image(image_embeds)

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

    def concepts(
        self,
        image_embeds: Tensor,
        region_image_index: Tensor | None = None,
        region_patch_mask: Tensor | None = None,
    ) -> tuple[VisualConcepts, VisualConcepts]:
        """The visual concept of each text, and the whole image that it comes from; the same without regions.

        Image keys and values are projected once per image; a region adds those of its own global token.
        """
        images = VisualConcepts(image_embeds[:, 0], self.project_image(image_embeds))
        if region_image_index is None:
            return images, images
        check_regions(image_embeds, region_image_index, region_patch_mask)
        images = images.select(region_image_index)
        region_embeds = _region_means(image_embeds, region_image_index, region_patch_mask)
        own = self.project_image(region_embeds[:, None])  # (R, H, 1, d)
        key_values = [
            tuple(torch.cat([mine, whole[:, :, 1:]], dim=2) for mine, whole in zip(*pair, strict=True))
            for pair in zip(own, images.key_values, strict=True)
        ]
        mask = F.pad(region_patch_mask.bool(), (1, 0), value=True)  # (R, S)
        return VisualConcepts(region_embeds, key_values, mask), images

    def compare(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Contrastive logits of unit vectors (B, P), (R, P): (B, R)."""
        return contrastive_logits(image_features, text_features, self.temperature)

    def image_text_contrast(
        self, image_features: Tensor, text_features: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """ITC over the pairs of all processes, and the logits (R, R) of the pairs of this one.

        While training, the temperature is held in its range, as in the official pretraining.
        """
        if self.training:
            with torch.no_grad():
                self.temperature.clamp_(self.config.min_temperature, self.config.max_temperature)
        logits = self.compare(image_features, text_features)
        official = self.config.official_gather_gradient
        gathered = self.compare(gather_rows(image_features, official), gather_rows(text_features, official))
        return contrastive_loss(gathered, None if ids is None else gather_rows(ids)), logits

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        region_image_index: Tensor | None = None,
        region_patch_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPModelOutput | tuple:
        """Encode images, texts, or both and their fusion.

        `pixel_values` (B, 3, size, size), `input_ids` and `attention_mask` (R, L). Text r belongs to image r,
        or with `region_image_index` (R,) and `region_patch_mask` (R, N) to a region of that image.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("pixel_values and input_ids are both None; give images, texts, or both")
        output = VLPModelOutput()
        if input_ids is not None:
            attention_mask = _all_ones(input_ids) if attention_mask is None else attention_mask
            text = self.get_text_features(input_ids, attention_mask)
            output.text_embeds, output.text_features = text.last_hidden_state, text.pooler_output
        if pixel_values is not None:
            output.image_embeds = self.vision_model(pixel_values)
            concepts, _ = self.concepts(output.image_embeds, region_image_index, region_patch_mask)
            output.image_features = unit_vectors(self.image_projection, concepts.embeds)
        if pixel_values is not None and input_ids is not None:
            check_pairs(len(concepts.embeds), input_ids)
            output.last_hidden_state = self.fuse(
                output.text_embeds, attention_mask, concepts.key_values, concepts.mask
            )
        return output if return_dict else output.to_tuple()


class XVLMHead(XVLMPreTrainedModel):
    """A task head on `XVLMModel`, whose methods it passes on."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """See `XVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values)

    def get_region_features(
        self, pixel_values: Tensor, region_image_index: Tensor, region_patch_mask: Tensor
    ) -> BaseModelOutputWithPooling:
        """See `XVLMModel.get_region_features`."""
        return self.model.get_region_features(pixel_values, region_image_index, region_patch_mask)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """See `XVLMModel.get_text_features`."""
        return self.model.get_text_features(input_ids, attention_mask)

    def project_image(self, image_embeds: Tensor) -> list[KeyValues]:
        """See `XVLMModel.project_image`."""
        return self.model.project_image(image_embeds)


class XVLMMatchingHead(XVLMHead):
    """A head that matches texts with visual concepts (ITM)."""

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

    def draw_negatives(self, logits: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """A wrong image for each text and a wrong text for each image (R,); none for the only pair of a batch
        in evaluation, where the last batch is what is left.
        """
        if len(logits) == 1 and not self.training:
            return logits.new_zeros(2, 0, dtype=torch.long).unbind()
        return hard_negatives(logits, ids)

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


class XVLMForPreTraining(XVLMMatchingHead):
    """X-VLM with the objectives of pretraining: ITC, ITM, MLM, and for regions the box. X-VLM section 3."""

    auto_class = "AutoModelForPreTraining"
    _tied_weights_keys = {"lm_head.decoder.weight": "model.text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        self.model = XVLMModel(config)
        self.itm_head = PredictionHead(config, 2)
        self.bbox_head = PredictionHead(config, 4)
        self.lm_head = MaskedLMHead(config.text_config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head.decoder = value

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        mlm_input_ids: Tensor,
        mlm_labels: Tensor,
        region_image_index: Tensor | None = None,
        region_patch_mask: Tensor | None = None,
        target_boxes: Tensor | None = None,
        is_full_image: Tensor | None = None,
        image_ids: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        negative_text_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForPreTrainingOutput | tuple:
        """One step on an image batch, or with the region arguments on a region batch.

        Args:
            pixel_values: images (B, 3, size, size).
            input_ids, attention_mask: texts (R, L); without regions R = B and text r belongs to image r.
            mlm_input_ids, mlm_labels: the same texts with masked words (R, L), and the words there, -100
                elsewhere.
            region_image_index, region_patch_mask: image of each region (R,), patches it covers (R, N).
            target_boxes: box of each region (R, 4) as cx, cy, w, h in 0..1.
            is_full_image: regions that are whole images (R,), left out of the box losses.
            image_ids: (R,) pairs with equal ids are positives of one another, never negatives.
            negative_image_index, negative_text_index: hard negatives (R,) instead of drawn ones.

        Raises:
            ValueError: shapes that do not fit, or a batch without negatives.
        """
        image_embeds = self.model.vision_model(pixel_values)
        concepts, images = self.model.concepts(image_embeds, region_image_index, region_patch_mask)
        check_pairs(len(concepts.embeds), input_ids)
        text_embeds, masked_embeds = self.model.text_model(
            torch.cat([input_ids, mlm_input_ids]), torch.cat([attention_mask, attention_mask])
        ).chunk(2)

        image_features = unit_vectors(self.model.image_projection, concepts.embeds)
        text_features = unit_vectors(self.model.text_projection, text_embeds[:, 0])
        loss_itc, logits = self.model.image_text_contrast(image_features, text_features, image_ids)

        if negative_image_index is None:
            negative_image_index, negative_text_index = self.draw_negatives(logits, image_ids)
        itm_logits = self.match_hard(
            concepts, text_embeds, attention_mask, negative_image_index, negative_text_index
        )
        loss_itm = matching_loss(itm_logits, num_positive=len(input_ids))

        masked_words = self.model.fuse(masked_embeds, attention_mask, concepts.key_values, concepts.mask)
        labelled = mlm_labels != -100
        mlm_logits = self.lm_head(masked_words[labelled])  # vocabulary logits only where a label asks
        loss_mlm = masked_lm_loss(mlm_logits, mlm_labels[labelled])

        config = self.config
        loss = config.itc_weight * loss_itc + config.itm_weight * loss_itm + config.mlm_weight * loss_mlm
        pred_boxes = loss_bbox = loss_giou = None
        if target_boxes is not None:
            located = self.model.fuse(text_embeds, attention_mask, images.key_values, cls_only=True)
            pred_boxes = self.bbox_head(located[:, 0]).sigmoid()
            loss_bbox, loss_giou = _box_losses(pred_boxes, target_boxes, is_full_image)
            loss = loss + config.bbox_weight * loss_bbox + config.giou_weight * loss_giou

        output = VLPForPreTrainingOutput(
            loss=loss,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_mlm=loss_mlm,
            loss_bbox=loss_bbox,
            loss_giou=loss_giou,
            logits_per_image=logits,
            itm_logits=itm_logits,
            mlm_logits=mlm_logits,
            pred_boxes=pred_boxes,
            image_features=image_features,
            text_features=text_features,
        )
        return output if return_dict else output.to_tuple()


class XVLMForRetrieval(XVLMMatchingHead):
    """X-VLM for image-text retrieval: ITC to find candidates, ITM to rank them. X-VLM section 4."""

    auto_class = "AutoModelForRetrieval"

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        self.model = XVLMModel(config)
        self.itm_head = PredictionHead(config, 2)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        negative_text_index: Tensor | None = None,
        return_loss: bool = True,
        return_dict: bool = True,
    ) -> VLPForRetrievalOutput | tuple:
        """Compare images (B, 3, size, size) with texts (R, L); a loss needs R = B, text r
        belonging to image r.

        Args:
            image_ids: (B,) pairs with equal ids show the same image: positives of one another, never
                negatives.
            negative_image_index, negative_text_index: hard negatives (B,) instead of drawn ones.

        Raises:
            ValueError: `image_ids` or the texts do not fit the images, or a training batch has no negatives.
        """
        attention_mask = _all_ones(input_ids) if attention_mask is None else attention_mask
        image = self.model.get_image_features(pixel_values)
        text = self.model.get_text_features(input_ids, attention_mask)
        features = {"image_features": image.pooler_output, "text_features": text.pooler_output}
        if not return_loss:
            output = VLPForRetrievalOutput(logits_per_image=self.model.compare(**features), **features)
            return output if return_dict else output.to_tuple()

        concepts, _ = self.model.concepts(image.last_hidden_state)
        check_pairs(len(concepts.embeds), input_ids)
        check_ids(image_ids, input_ids)
        loss_itc, logits = self.model.image_text_contrast(**features, ids=image_ids)
        if negative_image_index is None:
            negative_image_index, negative_text_index = self.draw_negatives(logits, image_ids)
        itm_logits = self.match_hard(
            concepts, text.last_hidden_state, attention_mask, negative_image_index, negative_text_index
        )
        loss_itm = matching_loss(itm_logits, num_positive=len(input_ids))
        output = VLPForRetrievalOutput(
            loss=self.config.itc_weight * loss_itc + self.config.itm_weight * loss_itm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            logits_per_image=logits,
            itm_logits=itm_logits,
            **features,
        )
        return output if return_dict else output.to_tuple()


class XVLMForGrounding(XVLMHead):
    """X-VLM for visual grounding: the box of what a text refers to. X-VLM section 4."""

    auto_class = "AutoModelForGrounding"

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        self.model = XVLMModel(config, add_projections=False)
        self.bbox_head = PredictionHead(config, 4)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        target_boxes: Tensor | None = None,
        region_image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForGroundingOutput | tuple:
        """Locate texts (R, L) in images (B, 3, size, size).

        Text r refers to image r, or with `region_image_index` (R,) to that image, which is encoded once.
        `target_boxes` (R, 4) as cx, cy, w, h in 0..1 ask for the losses.

        Raises:
            ValueError: the texts do not fit the images.
        """
        attention_mask = _all_ones(input_ids) if attention_mask is None else attention_mask
        images, _ = self.model.concepts(self.model.vision_model(pixel_values))
        if region_image_index is not None:
            check_index(region_image_index, len(pixel_values))
            images = images.select(region_image_index)
        check_pairs(len(images.embeds), input_ids)
        text_embeds = self.model.text_model(input_ids, attention_mask)
        fused = self.model.fuse(text_embeds, attention_mask, images.key_values, cls_only=True)
        output = VLPForGroundingOutput(pred_boxes=self.bbox_head(fused[:, 0]).sigmoid())
        if target_boxes is not None:
            output.loss_bbox, output.loss_giou = _box_losses(output.pred_boxes, target_boxes)
            output.loss = (
                self.config.bbox_weight * output.loss_bbox + self.config.giou_weight * output.loss_giou
            )
        return output if return_dict else output.to_tuple()


def _all_ones(input_ids: Tensor) -> Tensor:
    return torch.ones_like(input_ids)


def _region_means(image_embeds: Tensor, region_image_index: Tensor, region_patch_mask: Tensor) -> Tensor:
    """Mean of the patches that each region covers: (B, S, W) -> (R, W)."""
    weights = region_patch_mask.to(image_embeds.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("rn,rnw->rw", weights, image_embeds[region_image_index, 1:])


def _box_losses(
    pred_boxes: Tensor, target_boxes: Tensor, is_full_image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if target_boxes.shape != pred_boxes.shape:
        raise ValueError(
            f"target_boxes is {tuple(target_boxes.shape)} for {len(pred_boxes)} texts; give one box of cx, "
            "cy, w, h relative to the image per text"
        )
    counted = None if is_full_image is None else ~is_full_image.bool()
    return box_losses(pred_boxes.float(), target_boxes.float(), counted)
