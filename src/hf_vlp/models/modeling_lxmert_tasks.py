"""LXMERT's heads: question answering and pair reasoning (arXiv 1908.07490, section 4), and, built from its
parts, entailment, retrieval and grounding.

B: images, T: texts, R: regions of an image, L: text length, D: hidden width, A: answers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .answers import ChoosesAnswers
from .boxes import box_losses
from .checks import check_ids, check_pairs
from .configuration_lxmert import LXMERTConfig
from .matching import match_all_pairs
from .modeling_lxmert import (
    ClassificationHead,
    LXMERTModel,
    LXMERTPreTrainedModel,
    PredictionTransform,
    select,
)
from .negatives import hard_negatives
from .objectives import classification_loss, matching_loss
from .outputs import VLPForGroundingOutput, VLPForRetrievalOutput

PAIRS_PER_CALL = 256  # that `score_pairs` reads at a time


class LXMERTHead(LXMERTPreTrainedModel):
    """A task head on `LXMERTModel`, whose encoders it passes on."""

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """See `LXMERTModel.get_text_features`."""
        return self.lxmert.get_text_features(input_ids, attention_mask)

    def get_image_features(
        self, visual_feats: Tensor, visual_pos: Tensor, visual_attention_mask: Tensor | None = None
    ) -> BaseModelOutput:
        """See `LXMERTModel.get_image_features`."""
        return self.lxmert.get_image_features(visual_feats, visual_pos, visual_attention_mask)


class LXMERTForQuestionAnswering(ChoosesAnswers, LXMERTHead):
    """LXMERT that chooses among the answers of `config.answers`. LXMERT section 4."""

    auto_class = "AutoModelForVisualQuestionAnswering"
    num_answers_field = "num_qa_labels"

    def __init__(self, config: LXMERTConfig):
        super().__init__(config)
        self.lxmert = LXMERTModel(config, pooled_only=True)
        self.answer_head = ClassificationHead(config, config.hidden_size, config.num_qa_labels)
        self.post_init()

    @property
    def answer_classes(self) -> nn.Linear:
        return self.answer_head.logit_fc[-1]

    def forward(
        self,
        visual_feats: Tensor,
        visual_pos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (T, A) of answers to questions (T, L) on regions as `LXMERTModel` takes them; a loss with
        labels.

        `labels` are soft, (T, A) in 0..1, how good each answer is, or classes (T,), -100 for none.

        Raises:
            ValueError: labels or regions that do not fit.
        """
        states = self.lxmert(
            input_ids, visual_feats, visual_pos, attention_mask, visual_attention_mask, image_index
        )
        logits, loss = self.answer_head(states.pooler_output), None
        if labels is not None:
            if labels.ndim > 2 or labels.shape not in (logits.shape, logits.shape[:1]):
                raise ValueError(
                    f"labels is {tuple(labels.shape)} for logits {tuple(logits.shape)}; give soft labels of "
                    "that shape, or one class for each question"
                )
            loss = classification_loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict else output.to_tuple()


class LXMERTForVisualEntailment(LXMERTHead):
    """LXMERT that tells whether an image entails a sentence, by the classes of `config.id2label`; not in the
    paper, the head is that of answers."""

    auto_class = "AutoModelForVisualEntailment"

    def __init__(self, config: LXMERTConfig):
        super().__init__(config)
        self.lxmert = LXMERTModel(config, pooled_only=True)
        self.cls_head = ClassificationHead(config, config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        visual_feats: Tensor,
        visual_pos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (T, classes) of sentences (T, L) on regions as `LXMERTModel` takes them; with `labels` (T,)
        a loss."""
        states = self.lxmert(
            input_ids, visual_feats, visual_pos, attention_mask, visual_attention_mask, image_index
        )
        logits = self.cls_head(states.pooler_output)
        output = SequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels), logits=logits
        )
        return output if return_dict else output.to_tuple()


class LXMERTForVisualReasoning(LXMERTHead):
    """LXMERT that tells whether a sentence is true of two images (NLVR2). Class 1 is true. LXMERT section
    4."""

    auto_class = "AutoModelForVisualReasoning"

    def __init__(self, config: LXMERTConfig):
        super().__init__(config)
        self.lxmert = LXMERTModel(config, pooled_only=True)
        self.cls_head = ClassificationHead(config, 2 * config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        visual_feats: Tensor,
        visual_pos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (T, 2) of sentences (T, L) on the regions of two images each; with `labels` (T,) a loss.

        `visual_feats` (T, 2, R, F), `visual_pos` (T, 2, R, 4), `visual_attention_mask` (T, 2, R). A sentence
        is encoded once and meets both images.

        Raises:
            ValueError: shapes that do not fit.
        """
        if visual_feats.ndim != 4 or visual_feats.shape[1] != 2:
            raise ValueError(
                f"visual_feats is {tuple(visual_feats.shape)}; give two images for each sentence, (texts, 2, "
                "regions, features)"
            )
        check_pairs(len(visual_feats), input_ids)
        words = self.get_text_features(input_ids, attention_mask).last_hidden_state
        mask = None if visual_attention_mask is None else visual_attention_mask.flatten(0, 1)
        regions = self.get_image_features(visual_feats.flatten(0, 1), visual_pos.flatten(0, 1), mask)
        texts = torch.arange(len(words), device=words.device).repeat_interleave(2)  # (2T,)
        pairs = self.lxmert.fuse(words[texts], select(attention_mask, texts), regions.last_hidden_state, mask)
        logits = self.cls_head(pairs.pooler_output.unflatten(0, (-1, 2)).flatten(1))  # (T, 2D)
        output = SequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels), logits=logits
        )
        return output if return_dict else output.to_tuple()


class LXMERTForRetrieval(LXMERTHead):
    """LXMERT that matches texts with images by the head of pretraining; not in the paper.

    There are no features to compare: every pair passes the cross-modality encoder, both encoders below it run
    once for each text and each image.
    """

    auto_class = "AutoModelForRetrieval"

    def __init__(self, config: LXMERTConfig):
        super().__init__(config)
        self.lxmert = LXMERTModel(config, pooled_only=True)
        self.cls = nn.ModuleDict({"seq_relationship": nn.Linear(config.hidden_size, 2)})
        self.post_init()

    def match(
        self,
        words: Tensor,
        attention_mask: Tensor | None,
        regions: Tensor,
        visual_attention_mask: Tensor | None,
    ) -> Tensor:
        """Matching logits (T, 2), index 1 for a match, of encoded texts (T, L, D) with the encoded regions
        (T, R, D) of one image each."""
        pairs = self.lxmert.fuse(words, attention_mask, regions, visual_attention_mask)
        return self.cls["seq_relationship"](pairs.pooler_output)

    @torch.no_grad()
    def score_pairs(
        self,
        words: Tensor,
        attention_mask: Tensor,
        regions: Tensor,
        visual_attention_mask: Tensor,
        pairs_per_call: int = PAIRS_PER_CALL,
    ) -> Tensor:
        """Log-odds of a match (B, T) of every image with every text, `pairs_per_call` pairs at a time.

        Texts (T, L, D) are those of `get_text_features`, images (B, R, D) those of `get_image_features`.

        Raises:
            ValueError: `pairs_per_call` below 1.
        """

        def match(image: Tensor, text: Tensor) -> Tensor:
            return self.match(words[text], attention_mask[text], regions[image], visual_attention_mask[image])

        return match_all_pairs(match, regions, words, pairs_per_call)

    def forward(
        self,
        visual_feats: Tensor,
        visual_pos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        negative_text_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForRetrievalOutput | tuple:
        """The matching loss of pairs, each text (B, L) with its image's regions, a wrong image and a wrong
        text.

        Args:
            visual_feats, visual_pos, visual_attention_mask: regions, see `LXMERTModel`.
            input_ids, attention_mask: texts (B, L).
            image_ids: (B,) pairs with equal ids are no negatives of one another.
            negative_image_index, negative_text_index: (B,) wrong images and texts in place of drawn ones.

        Raises:
            ValueError: shapes that do not fit, or a batch without negatives.
        """
        check_pairs(len(visual_feats), input_ids)
        check_ids(image_ids, input_ids)
        words = self.get_text_features(input_ids, attention_mask).last_hidden_state
        regions = self.get_image_features(visual_feats, visual_pos, visual_attention_mask).last_hidden_state
        if negative_image_index is None:
            flat = words.new_zeros(len(words), len(words))  # nothing says which are hard
            negative_image_index, negative_text_index = hard_negatives(flat, flat, image_ids)
        own = torch.arange(len(words), device=words.device)
        texts = torch.cat([own, own, negative_text_index])
        images = torch.cat([own, negative_image_index, own])
        itm_logits = self.match(
            words[texts],
            select(attention_mask, texts),
            regions[images],
            select(visual_attention_mask, images),
        )
        loss = matching_loss(itm_logits, num_positive=len(own))
        output = VLPForRetrievalOutput(loss=loss, loss_itm=loss, itm_logits=itm_logits)
        return output if return_dict else output.to_tuple()


@dataclass
class LXMERTForGroundingOutput(VLPForGroundingOutput):
    """As `VLPForGroundingOutput`, with the loss of choosing a region, and `region_logits` (T, R), the
    lowest number where there is no region."""

    loss_region: Tensor | None = None
    region_logits: Tensor | None = None


class RegionHead(nn.Module):
    """The score of each region for a text, and how its box is to change; from the region's state beside the
    pooled one (T, R, 2D)."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.mix = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.transform = PredictionTransform(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.shift = nn.Linear(config.hidden_size, 4)

    def forward(self, regions: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        pooled = pooled[:, None].expand_as(regions)
        states = self.transform(F.gelu(self.mix(torch.cat([regions, pooled], dim=-1))))
        return self.score(states)[..., 0], self.shift(states)  # (T, R), (T, R, 4)


class LXMERTForGrounding(LXMERTHead):
    """LXMERT that points at the region a phrase refers to, and refines its box; not in the paper."""

    auto_class = "AutoModelForGrounding"

    def __init__(self, config: LXMERTConfig):
        super().__init__(config)
        self.lxmert = LXMERTModel(config)
        self.region_head = RegionHead(config)
        self.post_init()

    def forward(
        self,
        visual_feats: Tensor,
        visual_pos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        target_boxes: Tensor | None = None,
        region_image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> LXMERTForGroundingOutput | tuple:
        """The box of what each text (T, L) refers to: that of the region with the highest score, refined.

        Args:
            visual_feats, visual_pos, visual_attention_mask: regions, see `LXMERTModel`.
            input_ids, attention_mask: texts (T, L).
            target_boxes: (T, 4) cx, cy, w, h in 0..1. Regions are to be chosen that overlap it by an IoU of
                0.5 or more, or the one that does most; that one's refined box has the box losses.
            region_image_index: (T,) the image of each text; text t refers to image t without it.

        Raises:
            ValueError: shapes that do not fit.
        """
        states = self.lxmert(
            input_ids,
            visual_feats,
            visual_pos,
            attention_mask,
            visual_attention_mask,
            region_image_index,
            keep_padding=False,
        )
        boxes, mask = visual_pos, visual_attention_mask
        if region_image_index is not None:
            boxes, mask = boxes[region_image_index], select(mask, region_image_index)
        logits, shifts = self.region_head(states.region_hidden_state, states.pooler_output)
        if mask is not None:
            logits = logits.masked_fill(~mask.bool(), torch.finfo(logits.dtype).min)
        refined = _refine(boxes, shifts)
        output = LXMERTForGroundingOutput(
            pred_boxes=_pick(refined, logits.argmax(dim=1)), region_logits=logits
        )
        if target_boxes is not None:
            shares, best = _targets(boxes, mask, target_boxes)
            output.loss_region = F.cross_entropy(logits.float(), shares)
            output.loss_bbox, output.loss_giou = box_losses(_pick(refined, best).float(), target_boxes)
            output.loss = output.loss_region + output.loss_bbox + output.loss_giou
        return output if return_dict else output.to_tuple()


def _refine(boxes: Tensor, shifts: Tensor) -> Tensor:
    """`xyxy` boxes (T, R, 4) moved by parts of their sides, which grow or shrink by a factor: `cxcywh`."""
    centres, sides = box_convert(boxes, "xyxy", "cxcywh").split(2, dim=-1)
    moves, growth = shifts.split(2, dim=-1)
    return torch.cat([centres + moves * sides, sides * growth.clamp(-4, 4).exp()], dim=-1)


def _pick(boxes: Tensor, index: Tensor) -> Tensor:
    return boxes[torch.arange(len(boxes), device=boxes.device), index]  # (T, R, 4), (T,) -> (T, 4)


def _targets(boxes: Tensor, mask: Tensor | None, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Of each text the share (T, R) of the regions that are right, and the region (T,) that is most."""
    targets = box_convert(target_boxes, "cxcywh", "xyxy").float()
    pairs = zip(boxes.float(), targets[:, None], strict=True)
    overlaps = torch.stack([box_iou(own, target)[:, 0] for own, target in pairs])  # (T, R)
    if mask is not None:
        overlaps = overlaps.masked_fill(~mask.bool(), -1.0)
    best = overlaps.argmax(dim=1)
    right = (overlaps >= 0.5) | F.one_hot(best, overlaps.shape[1]).bool()
    return right / right.sum(dim=1, keepdim=True), best
