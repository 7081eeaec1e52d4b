"""ALBEF: align image and text before fusing them, and learn from a momentum teacher (arXiv 2107.07651).

A ViT reads the image, the lower half of a BERT the text; both are aligned (ITC), then fused in the upper half
of the BERT, which tells whether they match (ITM) and completes masked words (MLM). A teacher, the moving
average of the model, gives soft targets and fills the queues of features that ITC contrasts with.

B: images, R: texts, N: patches, L: text length, P: projection width, K: length of the queues, M: positions
with a label, V: vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from .base import Projection
from .checks import check_ids, check_pairs
from .configuration_albef import ALBEFConfig
from .gradcam import gradcam
from .image_text import (
    ImageTextHead,
    ImageTextModel,
    ImageTextPreTrainedModel,
    MatchingHead,
    all_ones,
    unit_vectors,
)
from .image_text_heatmaps import HeatmapHead
from .layers_bert import MaskedLMHead
from .momentum import UNKNOWN_ID, LearnsFromTeacher
from .objectives import distilled_cross_entropy, masked_lm_loss, matching_loss, positives
from .outputs import VLPForPreTrainingOutput, VLPForRetrievalOutput


class ALBEFPreTrainedModel(ImageTextPreTrainedModel):
    """Common parent of the ALBEF classes."""

    config: ALBEFConfig
    config_class = ALBEFConfig
    _keys_to_ignore_on_load_unexpected = [
        *ImageTextPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(teacher|queue|decoder)\.",
    ]


class ALBEFModel(ALBEFPreTrainedModel, ImageTextModel):
    """The image encoder, the text encoder, the multimodal encoder, and the projections to what ITC compares.

    Heads that compare nothing leave the projections out (`add_projections=False`), those that read two images
    for each text have `num_images=2`.
    """


class ALBEFHead(ALBEFPreTrainedModel, ImageTextHead, LearnsFromTeacher):
    """A task head on `ALBEFModel` that learns from a momentum teacher."""


class ALBEFContrastiveHead(ALBEFHead, MatchingHead):
    """A head that aligns (ITC) and matches (ITM) images and texts."""

    def image_text_contrast(
        self,
        image_features: Tensor,
        text_features: Tensor,
        teacher_features: tuple[Tensor, Tensor] | None,
        image_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC with what the teacher makes of the batch and has made of earlier ones; then these are queued.

        Returns the loss and the logits (B, B) of images with texts, and of texts with images, of the batch.
        Without a teacher the batch is contrasted with itself. ALBEF equations 1, 2 and 6.
        """
        alpha, soft_per_image, soft_per_text = self.distillation_weight, None, None
        if teacher_features is None:
            per_image = self.model.compare(image_features, text_features)
            per_text = per_image.T
        else:
            per_image, per_text = self._compare_with_queue(image_features, text_features, *teacher_features)
        if teacher_features is not None and alpha:
            with torch.no_grad():
                soft_per_image, soft_per_text = self._compare_with_queue(*teacher_features, *teacher_features)
        target = self._contrastive_target(len(per_image), image_ids)
        loss = distilled_cross_entropy(per_image, target, soft_per_image, alpha).mean()
        loss = (loss + distilled_cross_entropy(per_text, target, soft_per_text, alpha).mean()) / 2
        if teacher_features is not None and self.training:
            self._enqueue(*teacher_features, image_ids)
        pairs = len(per_image)
        return loss, per_image[:, :pairs], per_text[:, :pairs]

    def _compare_with_queue(
        self, image_features: Tensor, text_features: Tensor, image_keys: Tensor, text_keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, B + K) of images with texts and of texts with images."""
        compare, queue = self.model.compare, self.queue
        return (
            torch.cat([compare(image_features, text_keys), compare(image_features, queue.text_features)], 1),
            torch.cat([compare(text_features, image_keys), compare(text_features, queue.image_features)], 1),
        )

    def _contrastive_target(self, pairs: int, image_ids: Tensor | None) -> Tensor:
        """Pair i in row i (B,), or all pairs that show the same image (B, B + K)."""
        if image_ids is None:
            return torch.arange(pairs, device=self.device)
        others = image_ids if self.queue is None else torch.cat([image_ids, self.queue.image_ids])
        return positives(image_ids, others)

    def _enqueue(self, image_features: Tensor, text_features: Tensor, image_ids: Tensor | None):
        rows = {"image_features": image_features, "text_features": text_features}
        if hasattr(self.queue, "image_ids"):
            unknown = torch.full((len(image_features),), UNKNOWN_ID, device=self.device)
            rows["image_ids"] = unknown if image_ids is None else image_ids
        self.queue.push(**rows)


class ALBEFForPreTraining(ALBEFContrastiveHead):
    """ALBEF with the objectives of pretraining: ITC, ITM and MLM. ALBEF section 3."""

    auto_class = "AutoModelForPreTraining"
    _tied_weights_keys = {"lm_head.decoder.weight": "model.text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config)
        self.itm_head = Projection(config.text_config.hidden_size, 2)
        self.lm_head = MaskedLMHead(config.text_config)
        self.add_teacher("model", "lm_head", holds_ids=False)

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
        negative_image_index: Tensor | None = None,
        negative_text_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForPreTrainingOutput | tuple:
        """One step on images and their texts; while training, the teacher and the queues take theirs.

        Args:
            pixel_values: images (B, 3, size, size).
            input_ids, attention_mask: texts (B, L), text b belonging to image b.
            mlm_input_ids, mlm_labels: the same texts with masked words (B, L), and the words there, -100
                elsewhere.
            negative_image_index, negative_text_index: hard negatives (B,) instead of drawn ones.

        Raises:
            ValueError: shapes that do not fit, or a training batch without negatives.
        """
        check_pairs(len(pixel_values), input_ids)
        if self.training:
            self.model.hold_temperature()
        labelled = mlm_labels != -100
        image = self.model.get_image_features(pixel_values)
        text_embeds, masked_embeds = self.model.text_model(
            torch.cat([input_ids, mlm_input_ids]), torch.cat([attention_mask, attention_mask])
        ).chunk(2)
        text_features = unit_vectors(self.model.text_projection, text_embeds[:, 0])

        teacher_features = teacher_mlm_logits = None
        if self.lead_teacher() is not None:
            teacher_features, teacher_mlm_logits = self._ask_teacher(
                pixel_values, input_ids, attention_mask, mlm_input_ids, labelled
            )

        loss_itc, per_image, per_text = self.image_text_contrast(
            image.pooler_output, text_features, teacher_features
        )

        concepts = self.model.image_concepts(image.last_hidden_state)
        if negative_image_index is None:
            negative_image_index, negative_text_index = self.draw_negatives(per_image, per_text)
        itm_logits = self.match_hard(
            concepts, text_embeds, attention_mask, negative_image_index, negative_text_index
        )
        loss_itm = matching_loss(itm_logits, num_positive=len(input_ids))

        masked_words = self.model.fuse(masked_embeds, attention_mask, concepts.key_values)
        mlm_logits = self.lm_head(masked_words[labelled])  # vocabulary logits only where a label asks
        loss_mlm = masked_lm_loss(
            mlm_logits, mlm_labels[labelled], teacher_mlm_logits, self.distillation_weight
        )

        config = self.config
        output = VLPForPreTrainingOutput(
            loss=config.itc_weight * loss_itc + config.itm_weight * loss_itm + config.mlm_weight * loss_mlm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_mlm=loss_mlm,
            logits_per_image=per_image,
            itm_logits=itm_logits,
            mlm_logits=mlm_logits,
            image_features=image.pooler_output,
            text_features=text_features,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def _ask_teacher(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        mlm_input_ids: Tensor,
        labelled: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """The teacher's unit vectors of images and texts (B, P), and its logits (M, V) of masked words."""
        model = self.teacher.model
        image = model.get_image_features(pixel_values)
        features = image.pooler_output, model.get_text_features(input_ids, attention_mask).pooler_output
        if not self.distillation_weight:
            return features, None
        masked_embeds = model.text_model(mlm_input_ids, attention_mask)
        words = model.fuse(masked_embeds, attention_mask, model.project_image(image.last_hidden_state))
        return features, self.teacher.lm_head(words[labelled])


class ALBEFForRetrieval(ALBEFContrastiveHead):
    """ALBEF for image-text retrieval: ITC to find candidates, ITM to rank them. ALBEF section 5."""

    auto_class = "AutoModelForRetrieval"

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config)
        self.itm_head = Projection(config.text_config.hidden_size, 2)
        self.add_teacher("model", holds_ids=True)

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
        """Compare images (B, 3, size, size) with texts (R, L); a loss needs R = B, text r belonging to image
        r. While training, the teacher and the queues take their step.

        Args:
            image_ids: (B,) pairs with equal ids show the same image, in the batch and in the queue: positives
                of one another, never negatives.
            negative_image_index, negative_text_index: hard negatives (B,) instead of drawn ones.

        Raises:
            ValueError: `image_ids` or the texts do not fit the images, or a training batch has no negatives.
        """
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        if self.training:
            self.model.hold_temperature()
        image = self.model.get_image_features(pixel_values)
        text = self.model.get_text_features(input_ids, attention_mask)
        features = {"image_features": image.pooler_output, "text_features": text.pooler_output}
        if not return_loss:
            output = VLPForRetrievalOutput(logits_per_image=self.model.compare(**features), **features)
            return output if return_dict else output.to_tuple()

        check_pairs(len(pixel_values), input_ids)
        check_ids(image_ids, input_ids)
        teacher_features = None
        if self.lead_teacher() is not None:
            teacher_features = self._ask_teacher(pixel_values, input_ids, attention_mask)
        loss_itc, per_image, per_text = self.image_text_contrast(
            **features, teacher_features=teacher_features, image_ids=image_ids
        )
        if negative_image_index is None:
            negative_image_index, negative_text_index = self.draw_negatives(per_image, per_text, image_ids)
        itm_logits = self.match_hard(
            self.model.image_concepts(image.last_hidden_state),
            text.last_hidden_state,
            attention_mask,
            negative_image_index,
            negative_text_index,
        )
        loss_itm = matching_loss(itm_logits, num_positive=len(input_ids))
        output = VLPForRetrievalOutput(
            loss=self.config.itc_weight * loss_itc + self.config.itm_weight * loss_itm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            logits_per_image=per_image,
            itm_logits=itm_logits,
            **features,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def _ask_teacher(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The teacher's unit vectors of images and texts (B, P)."""
        image = self.teacher.model.get_image_features(pixel_values)
        return image.pooler_output, self.teacher.model.get_text_features(
            input_ids, attention_mask
        ).pooler_output


class ALBEFForGrounding(HeatmapHead, ALBEFForRetrieval):
    """ALBEF for weakly supervised grounding: trained as for retrieval on texts of single objects, it points
    with the Grad-CAM of their match. ALBEF section 6."""

    def contrastive_heatmaps(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int = -1
    ) -> Tensor:
        """Grad-CAM (B, grid, grid) of the contrastive score of text b with image b, where the image's [CLS]
        looks in a layer of a ViT, by default the last."""
        trunk = self.model.vision_model.trunk

        def score() -> Tensor:
            image = self.model.get_image_features(pixel_values.clone()).pooler_output
            text = self.model.get_text_features(input_ids.clone(), attention_mask.clone()).pooler_output
            return (image * text).sum(dim=1) / self.model.temperature

        maps, _ = gradcam(self, trunk.layers[layer].attention, trunk.config, score)
        maps = maps[:, :, 0, 1:].mean(dim=1)
        grid = math.isqrt(maps.shape[-1])
        return maps.unflatten(-1, (grid, grid))
