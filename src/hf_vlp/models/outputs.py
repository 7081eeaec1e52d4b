"""What the models return.

B: images, R: texts or regions, S: image tokens (the global one first), L: text length, D: text width, W:
image width, P: projection width, M: positions with a masked-language-modelling label, V: vocabulary. Each
loss term is a scalar, or None where the batch does not call for it; `loss` is their weighted sum.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class VLPModelOutput(ModelOutput):
    """Embeds and features of both sides, and their fusion where both are given.

    `last_hidden_state` (R, L, D) is the fused text, `image_embeds` (B, S, W), `text_embeds` (R, L, D),
    `image_features` (B or R, P) and `text_features` (R, P) are unit vectors.
    """

    last_hidden_state: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None


@dataclass
class VLPForPreTrainingOutput(ModelOutput):
    """Loss terms of pretraining, the features they compare, and the predictions.

    `logits_per_image` (R, R) are contrastive logits of the pairs of this process, `itm_logits` (3R, 2) those
    of the positives, then of each text with a wrong image, then of each image with a wrong text (index 1:
    match), `mlm_logits` (M, V), `pred_boxes` (R, 4) `cxcywh` in 0..1.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_bbox: Tensor | None = None
    loss_giou: Tensor | None = None
    logits_per_image: Tensor | None = None
    itm_logits: Tensor | None = None
    mlm_logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None


@dataclass
class VLPForRetrievalOutput(ModelOutput):
    """Loss terms of retrieval, `logits_per_image` (B, R), and unit vectors (B, P) and (R, P).

    `itm_logits` (3B, 2) as in pretraining where the loss is computed.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    logits_per_image: Tensor | None = None
    itm_logits: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None


@dataclass
class VLPForGroundingOutput(ModelOutput):
    """Box losses, and one box per text: `pred_boxes` (R, 4) `cxcywh` in 0..1.

    Where boxes come from a heat map, also that of each text, `heatmap` (R, grid, grid), and `itm_logits`
    (R, 2) of the pair.
    """

    loss: Tensor | None = None
    loss_bbox: Tensor | None = None
    loss_giou: Tensor | None = None
    pred_boxes: Tensor | None = None
    heatmap: Tensor | None = None
    itm_logits: Tensor | None = None


@dataclass
class RankedAnswers(ModelOutput):
    """The best of a list of answers for each question, best first: `indices` into the list (B, k), and
    `probabilities` (B, k) among these k."""

    indices: Tensor | None = None
    probabilities: Tensor | None = None


@dataclass
class VLPForQuestionAnsweringOutput(ModelOutput):
    """The weighed loss of given answers, and `answer_losses` (A,), of each: its negative log-probability,
    mixed with the teacher's opinion where it has weight."""

    loss: Tensor | None = None
    answer_losses: Tensor | None = None


@dataclass
class VLPForCaptioningOutput(ModelOutput):
    """The loss of captions, their `lm_logits` (M, V) at the M labels, and `caption_losses` (R,): the mean
    negative log-probability of the labelled words of each. Without labels only `lm_logits` (R, L, V).
    """

    loss: Tensor | None = None
    lm_logits: Tensor | None = None
    caption_losses: Tensor | None = None
