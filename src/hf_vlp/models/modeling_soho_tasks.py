"""SOHO's heads for question answering, retrieval, pair reasoning and entailment (arXiv 2104.03135, section
4), and, built from its parts, grounding.

B: images, R: texts, L: text length, D: hidden width, A: answers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .answers import ChoosesAnswers
from .boxes import box_losses
from .checks import check_ids, check_pairs
from .configuration_soho import SOHOConfig
from .gradcam import gradcam
from .matching import match_all_pairs
from .modeling_soho import SOHOModel, SOHOPreTrainedModel, VisualTokens, images_of_texts
from .negatives import hard_negatives
from .objectives import classification_loss, matching_loss
from .outputs import VLPForGroundingOutput, VLPForRetrievalOutput

PAIRS_PER_CALL = 64  # that `score_pairs` reads at a time


class ClassificationHead(nn.Module):
    """Logits from the first word's state, or those of two images: (R, width) -> (R, classes)."""

    def __init__(self, config: SOHOConfig, width: int, inner: int, classes: int):
        super().__init__()
        self.dense = nn.Linear(width, inner)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(inner, classes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.dense(hidden_states).relu()))


class SOHOHead(SOHOPreTrainedModel):
    """A task head on `SOHOModel`, whose image tokens it passes on."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> VisualTokens:
        """See `SOHOModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_mask)

    def classify(
        self, head: Callable[[Tensor], Tensor], labels: Tensor | None, return_dict: bool, *inputs
    ) -> SequenceClassifierOutput | tuple:
        """Logits of `head` on the first word's state, and with labels a loss."""
        logits = head(self.model(*inputs).last_hidden_state[:, 0])
        loss = None if labels is None else classification_loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict else output.to_tuple()


class SOHOForQuestionAnswering(ChoosesAnswers, SOHOHead):
    """SOHO that chooses among the answers of `config.answers`.

    The official model has no dictionary (`visual_fusion="none"`), the paper's has.
    """

    auto_class = "AutoModelForVisualQuestionAnswering"
    num_answers_field = "num_answers"

    def __init__(self, config: SOHOConfig):
        super().__init__(config)
        self.model = SOHOModel(config)
        width = config.hidden_size
        self.answer_head = ClassificationHead(config, width, 4 * width, config.num_answers)
        self.post_init()

    @property
    def answer_classes(self) -> nn.Linear:
        return self.answer_head.out_proj

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (R, A) of answers to questions (R, L) about images as `SOHOModel` takes them; a loss with
        `labels`, soft ones (R, A) in 0..1 or classes (R,), -100 for none."""
        inputs = (pixel_values, input_ids, attention_mask, pixel_mask, image_index)
        return self.classify(self.answer_head, labels, return_dict, *inputs)


class SOHOForVisualEntailment(SOHOHead):
    """SOHO that tells whether an image entails a sentence, by the classes of `config.id2label`."""

    auto_class = "AutoModelForVisualEntailment"

    def __init__(self, config: SOHOConfig):
        super().__init__(config)
        self.model = SOHOModel(config)
        self.cls_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (R, classes) of sentences (R, L) with images as `SOHOModel` takes them; with `labels` (R,) a
        loss."""
        inputs = (pixel_values, input_ids, attention_mask, pixel_mask, image_index)
        return self.classify(self.cls_head, labels, return_dict, *inputs)


class SOHOForVisualReasoning(SOHOHead):
    """SOHO that tells whether a sentence is true of two images (NLVR2). Class 1 is true."""

    auto_class = "AutoModelForVisualReasoning"

    def __init__(self, config: SOHOConfig):
        super().__init__(config)
        self.model = SOHOModel(config)
        width = 2 * config.hidden_size
        self.cls_head = ClassificationHead(config, width, width, 2)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (R, 2) of sentences (R, L) with pairs of images (R, 2, 3, H, W), `pixel_mask` (R, 2, H, W);
        with `labels` (R,) a loss.

        Raises:
            ValueError: shapes that do not fit.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}; give two images for each sentence, (texts, "
                "2, 3, height, width)"
            )
        check_pairs(len(pixel_values), input_ids)
        masks = None if pixel_mask is None else pixel_mask.flatten(0, 1)
        texts = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(2)  # (2R,)
        words = None if attention_mask is None else attention_mask[texts]

        def judge(first: Tensor) -> Tensor:
            return self.cls_head(first.unflatten(0, (-1, 2)).flatten(1))

        return self.classify(
            judge, labels, return_dict, pixel_values.flatten(0, 1), input_ids[texts], words, masks
        )


class SOHOForRetrieval(SOHOHead):
    """SOHO that matches texts with images by the head of pretraining. Every pair passes the transformer."""

    auto_class = "AutoModelForRetrieval"

    def __init__(self, config: SOHOConfig):
        super().__init__(config)
        self.model = SOHOModel(config)
        self.itm_head = nn.Linear(config.hidden_size, 2, bias=False)
        self.post_init()

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, images: VisualTokens) -> Tensor:
        """Matching logits (R, 2), index 1 for a match, of texts (R, L) with the tokens of one image each."""
        return self.itm_head(self.model.fuse(input_ids, attention_mask, images).last_hidden_state[:, 0])

    @torch.no_grad()
    def score_pairs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: VisualTokens,
        pairs_per_call: int = PAIRS_PER_CALL,
    ) -> Tensor:
        """Log-odds of a match (B, R) of every image with every text (R, L), `pairs_per_call` pairs at a time.

        Raises:
            ValueError: `pairs_per_call` below 1.
        """

        def match(image: Tensor, text: Tensor) -> Tensor:
            return self.match(input_ids[text], attention_mask[text], images.select(image))

        return match_all_pairs(match, images.states, input_ids, pairs_per_call)

    def word_heatmaps(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_mask: Tensor | None = None,
        layer: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Grad-CAM of the match of text r with image r: maps of what each word attends to in `layer`, the
        last one without it, over the grid of cells (R, L, h, w), 0 for padding, and the matching logits (R,
        2). Not in the paper; see ALBEF section 6."""
        layer = self.model.layer[-1] if layer is None else layer
        index = images_of_texts(len(pixel_values), input_ids, None)
        found = []

        def score() -> Tensor:  # of clones, since what was made in inference mode has no gradient
            mask = None if pixel_mask is None else pixel_mask.clone()
            images = self.get_image_features(pixel_values.clone(), mask).select(index.clone())
            found[:] = images.mask, self.match(input_ids.clone(), attention_mask.clone(), images)
            return found[1][:, 1]

        maps, _ = gradcam(self, layer.attention.self, self.config, score)
        (cells, logits), length = found, input_ids.shape[1]
        of_words = maps[:, :, :length, length:].mean(dim=1) * attention_mask[..., None]  # (R, L, N)
        return of_words.unflatten(2, cells.shape[1:]), logits.detach()

    def heatmaps(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_mask: Tensor | None = None,
    ) -> Tensor:
        """The mean over the words (R, h, w) of `word_heatmaps`."""
        maps, _ = self.word_heatmaps(pixel_values, input_ids, attention_mask, pixel_mask)
        return maps.sum(dim=1) / attention_mask.sum(dim=1)[:, None, None]

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        negative_text_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForRetrievalOutput | tuple:
        """The matching loss of pairs, each text (B, L) with its image, a wrong image and a wrong text.

        Args:
            pixel_values, pixel_mask: images (B, 3, H, W), (B, H, W).
            input_ids, attention_mask: texts (B, L).
            image_ids: (B,) pairs with equal ids are no negatives of one another.
            negative_image_index, negative_text_index: (B,) wrong images and texts in place of drawn ones.

        Raises:
            ValueError: shapes that do not fit, or a batch without negatives.
        """
        check_pairs(len(pixel_values), input_ids)
        check_ids(image_ids, input_ids)
        images = self.get_image_features(pixel_values, pixel_mask)
        own = torch.arange(len(input_ids), device=input_ids.device)
        if negative_image_index is None:
            flat = images.states.new_zeros(len(own), len(own))  # nothing says which are hard
            negative_image_index, negative_text_index = hard_negatives(flat, flat, image_ids)
        texts = torch.cat([own, own, negative_text_index])
        chosen = images.select(torch.cat([own, negative_image_index, own]))
        words = None if attention_mask is None else attention_mask[texts]
        itm_logits = self.match(input_ids[texts], words, chosen)
        loss = matching_loss(itm_logits, num_positive=len(own))
        output = VLPForRetrievalOutput(loss=loss, loss_itm=loss, itm_logits=itm_logits)
        return output if return_dict else output.to_tuple()


class SOHOForGrounding(SOHOHead):
    """SOHO that predicts the box of what a text refers to, from the first word's state; not in the paper."""

    auto_class = "AutoModelForGrounding"

    def __init__(self, config: SOHOConfig):
        super().__init__(config)
        self.model = SOHOModel(config)
        width = config.hidden_size
        self.bbox_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 4)
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        target_boxes: Tensor | None = None,
        region_image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForGroundingOutput | tuple:
        """Boxes (R, 4) cx, cy, w, h in 0..1 of texts (R, L) in images as `SOHOModel` takes them; with
        `target_boxes` (R, 4) box losses. Boxes are relative to the image, not to its padding."""
        states = self.model(pixel_values, input_ids, attention_mask, pixel_mask, region_image_index)
        pred_boxes = self.bbox_head(states.last_hidden_state[:, 0]).sigmoid()
        output = VLPForGroundingOutput(pred_boxes=pred_boxes)
        if target_boxes is not None:
            output.loss_bbox, output.loss_giou = box_losses(pred_boxes.float(), target_boxes)
            output.loss = output.loss_bbox + output.loss_giou
        return output if return_dict else output.to_tuple()
