"""Telling classes of sentences with an image or two: visual entailment, pair reasoning (NLVR2), and the text
assignment that prepares for pairs (ALBEF section 5; X-VLM section 4).

B: images, R: texts, L: text length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .checks import check_pairs
from .image_text import ImageTextHead, LabelledHead, all_ones, images_of_texts
from .layers_bert import KeyValues
from .negatives import draw_by_softmax

SECOND_LAYERS = {r"\.second_layer\.": ".layer."}  # one fusion layer becomes two, one for each image


class ClassifierHead(LabelledHead):
    """A head (`cls_head`) that tells the class of a text with its image or images.

    Each has `classify(part, *inputs)`, the logits (R, classes) by `part`: the model, or its teacher.
    """

    def classify_and_learn(self, labels: Tensor | None, *inputs) -> SequenceClassifierOutput:
        """Logits, and with labels (R,) the loss."""
        if labels is None:
            return SequenceClassifierOutput(logits=self.classify(self, *inputs))
        logits, losses = self.learn(lambda part: self.classify(part, *inputs), labels)
        return SequenceClassifierOutput(loss=losses.mean(), logits=logits)


class EntailmentHead(ClassifierHead):
    """Whether an image entails a sentence, by the classes of `config.id2label`."""

    auto_class = "AutoModelForVisualEntailment"

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (R, classes) of sentences (R, L) with images (B, 3, size, size); with `labels` (R,) a loss.

        Sentence r goes with image r, or with `image_index` (R,) with that image, which is encoded once.

        Raises:
            ValueError: the sentences do not fit the images.
        """
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        output = self.classify_and_learn(labels, pixel_values, input_ids, attention_mask, image_index)
        return output if return_dict else output.to_tuple()

    def classify(self, part: nn.Module, pixel_values, input_ids, attention_mask, image_index) -> Tensor:
        images = images_of_texts(part.model, pixel_values, input_ids, image_index)
        text_embeds = part.model.text_model(input_ids, attention_mask)
        fused = part.model.fuse(text_embeds, attention_mask, images.key_values, cls_only=True)
        return part.cls_head(fused[:, 0])


class ReasoningHead(ClassifierHead):
    """Whether a sentence is true of two images. Class 1 is true."""

    auto_class = "AutoModelForVisualReasoning"
    _twins = SECOND_LAYERS

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (B, 2) of sentences (B, L) with pairs of images (B, 2, 3, size, size); with `labels` (B,)
        the loss.

        Raises:
            ValueError: no pairs of images, or not one for each sentence.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}; give two images per sentence, "
                "(B, 2, 3, size, size)"
            )
        check_pairs(len(pixel_values), input_ids)
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        labels = None if labels is None else labels.long()
        output = self.classify_and_learn(labels, pixel_values, input_ids, attention_mask)
        return output if return_dict else output.to_tuple()

    def classify(self, part: nn.Module, pixel_values, input_ids, attention_mask) -> Tensor:
        images = pixel_values.transpose(0, 1).flatten(0, 1)  # all first images, then all second ones
        key_values = part.model.project_image(part.model.vision_model(images))
        first, second = torch.arange(len(images), device=images.device).chunk(2)
        text_embeds = part.model.text_model(input_ids, attention_mask)
        fused = part.model.fuse(
            text_embeds, attention_mask, pair_key_values(key_values, first, second), cls_only=True
        )
        return part.cls_head(fused[:, 0])


class AssignmentHead(ImageTextHead):
    """Which of two images a text belongs to (`ta_head`).

    Class 0 is the first image, 1 the second, 2 neither.
    """

    auto_class = "AutoModelForTextAssignment"
    _twins = SECOND_LAYERS

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """The loss of images (B, 3, size, size) and their texts (B, L), of which pairs of images are made.

        Each text meets its own image and one like it, in either order, or two others like it, all equally
        often: drawn, unless `labels` (B,) and `negative_image_index` (B, 2) tell.

        Raises:
            ValueError: the texts do not fit the images, or there are fewer than three to draw from.
        """
        check_pairs(len(pixel_values), input_ids)
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        image = self.model.get_image_features(pixel_values)
        if negative_image_index is None:
            negative_image_index = self._draw_two_negatives(image.pooler_output)
        own = torch.arange(len(input_ids), device=input_ids.device)
        if labels is None:
            labels = torch.randint(3, own.shape, device=own.device)
        other, third = negative_image_index.unbind(dim=1)
        first, second = own.where(labels == 0, other), own.where(labels == 1, other.where(labels == 0, third))

        key_values = pair_key_values(self.model.project_image(image.last_hidden_state), first, second)
        text_embeds = self.model.text_model(input_ids, attention_mask)
        fused = self.model.fuse(text_embeds, attention_mask, key_values, cls_only=True)
        logits = self.ta_head(fused[:, 0])
        output = SequenceClassifierOutput(loss=F.cross_entropy(logits.float(), labels), logits=logits)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def _draw_two_negatives(self, image_features: Tensor) -> Tensor:
        """Two different images like each image (B, 2), by the similarity of their features (B, P)."""
        if len(image_features) < 3:
            raise ValueError(
                f"pixel_values has {len(image_features)} images; text assignment needs at least three in a "
                "batch, two of which are wrong"
            )
        logits = image_features @ image_features.T / self.config.initial_temperature
        taken = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        first = draw_by_softmax(logits, taken)
        second = draw_by_softmax(logits, taken.scatter(1, first[:, None], True))
        return torch.stack([first, second], dim=1)


def pair_key_values(key_values: list[KeyValues], first: Tensor, second: Tensor) -> list[KeyValues]:
    """Of each projection what its two layers see: the images at `first` (R,), then those at `second` (R,)."""
    return [(keys[index], values[index]) for keys, values in key_values for index in (first, second)]
