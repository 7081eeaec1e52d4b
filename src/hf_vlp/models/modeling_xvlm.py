"""X-VLM: multi-grained vision-language pre-training, aligning texts with visual concepts (arXiv 2111.08276).

One image pass gives a visual concept for the whole image and for each of its regions; texts are compared with
concepts (ITC), matched to them (ITM), completed from them (MLM), and located in the image (box).

B: images, R: texts and their visual concepts, N: patches, S = 1 + N image tokens, L: text length, D: text
width, W: image width, P: projection width, H: heads, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbones import RegionTokens
from .base import Projection
from .boxes import box_losses
from .checks import check_ids, check_pairs
from .configuration_xvlm import XVLMConfig
from .distributed import gather_rows
from .image_text import (
    ImageTextHead,
    ImageTextModel,
    ImageTextPreTrainedModel,
    MatchingHead,
    VisualConcepts,
    all_ones,
    images_of_texts,
    unit_vectors,
)
from .layers_bert import MaskedLMHead
from .objectives import contrastive_loss, masked_lm_loss, matching_loss
from .outputs import VLPForGroundingOutput, VLPForPreTrainingOutput, VLPForRetrievalOutput, VLPModelOutput


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


class XVLMPreTrainedModel(ImageTextPreTrainedModel):
    """Common parent of the X-VLM classes."""

    config: XVLMConfig
    config_class = XVLMConfig
    _keys_to_ignore_on_load_unexpected = [
        *ImageTextPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^decoder\.",
    ]


class XVLMModel(XVLMPreTrainedModel, ImageTextModel):
    """The image trunk, the text encoder, their fusion, and the projections to what ITC compares.

    Heads that compare nothing leave the projections out (`add_projections=False`).
    """

    def get_region_features(
        self, pixel_values: Tensor, region_image_index: Tensor, region_patch_mask: Tensor
    ) -> BaseModelOutputWithPooling:
        """Regions to embeds (R, S, W) `[global; patches]` and unit vectors (R, P).

        The images (B, 3, size, size) are encoded once; `region_image_index` (R,) tells the image of each
        region and `region_patch_mask` (R, N) the patches it covers. The global token is their mean and the
        patches are those of the image; with `local_attn_depth`, global token and covered patches come from
        attention within the region. X-VLM section 3.

        Raises:
            ValueError: the masks do not fit the patches, or the regions name more images than there are.
        """
        image_embeds, regions = self.encode(pixel_values, region_image_index, region_patch_mask)
        patches = region_patch_mask.bool() & (regions.patch_mask is None)
        own = F.pad(patches, (1, 0), value=True)  # (R, S)
        embeds = image_embeds[region_image_index].masked_scatter(own[..., None], regions.tokens[regions.mask])
        return BaseModelOutputWithPooling(embeds, unit_vectors(self.image_projection, embeds[:, 0]))

    def encode(
        self,
        pixel_values: Tensor,
        region_image_index: Tensor | None = None,
        region_patch_mask: Tensor | None = None,
    ) -> tuple[Tensor, RegionTokens | None]:
        """Images (B, 3, size, size) to embeds (B, S, W), and their regions (R,), if there are any."""
        if region_image_index is None:
            return self.vision_model(pixel_values), None
        return self.vision_model.encode_regions(
            pixel_values, region_image_index, region_patch_mask, self.config.local_attn_depth
        )

    def concepts(
        self, image_embeds: Tensor, regions: RegionTokens | None = None
    ) -> tuple[VisualConcepts, VisualConcepts]:
        """The visual concept of each text, and the whole image that it comes from; the same without regions.

        Image keys and values are projected once per image; a region adds those of its own tokens.
        """
        images = self.image_concepts(image_embeds)
        if regions is None:
            return images, images
        images = images.select(regions.image_index)
        key_values, mask = self.project_image(regions.tokens), regions.mask  # (R, H, M, d), (R, M)
        if regions.patch_mask is not None:
            key_values = [
                tuple(torch.cat([mine, whole[:, :, 1:]], dim=2) for mine, whole in zip(*pair, strict=True))
                for pair in zip(key_values, images.key_values, strict=True)
            ]
            mask = torch.cat([mask, regions.patch_mask.bool()], dim=1)  # (R, S)
        return VisualConcepts(regions.tokens[:, 0], key_values, mask), images

    def image_text_contrast(
        self, image_features: Tensor, text_features: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """ITC over the pairs of all processes, and the logits (R, R) of the pairs of this one.

        While training, the temperature is held in its range, as in the official pretraining.
        """
        if self.training:
            self.hold_temperature()
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
            attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
            text = self.get_text_features(input_ids, attention_mask)
            output.text_embeds, output.text_features = text.last_hidden_state, text.pooler_output
        if pixel_values is not None:
            output.image_embeds, regions = self.encode(pixel_values, region_image_index, region_patch_mask)
            concepts, _ = self.concepts(output.image_embeds, regions)
            output.image_features = unit_vectors(self.image_projection, concepts.embeds)
        if pixel_values is not None and input_ids is not None:
            check_pairs(len(concepts.embeds), input_ids)
            output.last_hidden_state = self.fuse(
                output.text_embeds, attention_mask, concepts.key_values, concepts.mask
            )
        return output if return_dict else output.to_tuple()


class XVLMHead(XVLMPreTrainedModel, ImageTextHead):
    """A task head on `XVLMModel`."""

    def get_region_features(
        self, pixel_values: Tensor, region_image_index: Tensor, region_patch_mask: Tensor
    ) -> BaseModelOutputWithPooling:
        """See `XVLMModel.get_region_features`."""
        return self.model.get_region_features(pixel_values, region_image_index, region_patch_mask)


class XVLMMatchingHead(XVLMHead, MatchingHead):
    """A head that matches texts with visual concepts (ITM)."""

    negative_smoothing = 1e-5  # as in the official code


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
        image_embeds, regions = self.model.encode(pixel_values, region_image_index, region_patch_mask)
        concepts, images = self.model.concepts(image_embeds, regions)
        check_pairs(len(concepts.embeds), input_ids)
        text_embeds, masked_embeds = self.model.text_model(
            torch.cat([input_ids, mlm_input_ids]), torch.cat([attention_mask, attention_mask])
        ).chunk(2)

        image_features = unit_vectors(self.model.image_projection, concepts.embeds)
        text_features = unit_vectors(self.model.text_projection, text_embeds[:, 0])
        loss_itc, logits = self.model.image_text_contrast(image_features, text_features, image_ids)

        if negative_image_index is None:
            negative_image_index, negative_text_index = self.draw_negatives(logits, logits.T, image_ids)
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
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
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
            negative_image_index, negative_text_index = self.draw_negatives(logits, logits.T, image_ids)
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
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        images = images_of_texts(self.model, pixel_values, input_ids, region_image_index)
        text_embeds = self.model.text_model(input_ids, attention_mask)
        fused = self.model.fuse(text_embeds, attention_mask, images.key_values, cls_only=True)
        output = VLPForGroundingOutput(pred_boxes=self.bbox_head(fused[:, 0]).sigmoid())
        if target_boxes is not None:
            output.loss_bbox, output.loss_giou = _box_losses(output.pred_boxes, target_boxes)
            output.loss = (
                self.config.bbox_weight * output.loss_bbox + self.config.giou_weight * output.loss_giou
            )
        return output if return_dict else output.to_tuple()


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
