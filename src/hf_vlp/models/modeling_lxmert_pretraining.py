"""LXMERT's pretraining: masked words and regions, matching, and answers (arXiv 1908.07490, section 3.1).

B: images and their texts, R: regions of an image, L: text length, D: hidden width, F: width of a region's
feature, V: vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_lxmert import LXMERTConfig
from .modeling_lxmert import ClassificationHead, LXMERTModel, LXMERTPreTrainedModel, PredictionTransform
from .objectives import classification_loss, masked_lm_loss, region_class_loss, region_feature_loss


class WordPrediction(nn.Module):
    """Vocabulary logits of words (M, D) -> (M, V)."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states)) + self.bias


class RegionPrediction(nn.Module):
    """Object and attribute logits and the feature of regions, from (M, D)."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.transform = PredictionTransform(config)
        outputs = {
            "obj": config.num_object_labels,
            "attr": config.num_attr_labels,
            "feat": config.visual_feat_dim,
        }
        self.decoder_dict = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, width) for name, width in outputs.items()}
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.transform(hidden_states)
        return tuple(self.decoder_dict[name](states) for name in ("obj", "attr", "feat"))


@dataclass
class LXMERTForPreTrainingOutput(ModelOutput):
    """Loss terms of pretraining, each None where the batch has no labels for it, and the predictions.

    - mlm_logits (M, V) of the M words with a label, or (B, L, V) without labels
    - itm_logits (B, 2), index 1: the text belongs to the image
    - object_logits, attribute_logits (N, classes) of the N regions that count for these losses, and
      pred_feats (S, F) of the S masked ones; without labels of all regions (B, R, .)
    - answer_logits (B, answers)
    """

    loss: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_object: Tensor | None = None
    loss_attribute: Tensor | None = None
    loss_feature: Tensor | None = None
    loss_answer: Tensor | None = None
    mlm_logits: Tensor | None = None
    itm_logits: Tensor | None = None
    object_logits: Tensor | None = None
    attribute_logits: Tensor | None = None
    pred_feats: Tensor | None = None
    answer_logits: Tensor | None = None


class LXMERTForPreTraining(LXMERTPreTrainedModel):
    """LXMERT with the objectives of pretraining: masked words, matching, objects, attributes and features of
    regions, and answers. LXMERT section 3.1.

    `answer_weight` is the weight of the answers, which a schedule may change; it starts as that of the
    config.
    """

    auto_class = "AutoModelForPreTraining"
    _tied_weights_keys = {"cls.predictions.decoder.weight": "lxmert.embeddings.word_embeddings.weight"}

    def __init__(self, config: LXMERTConfig):
        super().__init__(config)
        self.lxmert = LXMERTModel(config)
        self.cls = nn.ModuleDict(
            {"predictions": WordPrediction(config), "seq_relationship": nn.Linear(config.hidden_size, 2)}
        )
        self.obj_predict_head = RegionPrediction(config)
        self.answer_head = ClassificationHead(config, config.hidden_size, config.num_qa_labels)
        self.answer_weight = config.answer_weight
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, WordPrediction):
            init.zeros_(module.bias)

    def get_output_embeddings(self) -> nn.Module:
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, value: nn.Module):
        words = self.cls["predictions"]
        bias = words.bias.new_zeros(value.out_features)
        kept = min(len(bias), len(words.bias))
        bias[:kept] = words.bias.detach()[:kept]
        words.decoder, words.bias = value, nn.Parameter(bias)

    def forward(
        self,
        visual_feats: Tensor,
        visual_pos: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        itm_labels: Tensor | None = None,
        region_mask: Tensor | None = None,
        target_feats: Tensor | None = None,
        object_ids: Tensor | None = None,
        object_scores: Tensor | None = None,
        attribute_ids: Tensor | None = None,
        attribute_scores: Tensor | None = None,
        answer_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> LXMERTForPreTrainingOutput | tuple:
        """One step on texts and the regions of their images, both masked; without labels, the predictions.

        Args:
            visual_feats, visual_pos, visual_attention_mask: regions, see `LXMERTModel`; features of masked
                regions as they are to be read.
            input_ids, attention_mask: texts (B, L).
            mlm_input_ids: the texts with masked words, which are read in place of `input_ids`.
            mlm_labels: (B, L) the words there, -100 elsewhere.
            itm_labels: (B,) 1 where the text belongs to the image, 0 where not.
            region_mask: (B, R) True for masked regions.
            target_feats: (B, R, F) features before masking.
            object_ids, attribute_ids: (B, R) what the detector saw, and `object_scores`, `attribute_scores`
                how sure it was, which weighs the loss; 1 without.
            answer_labels: (B,) the answer's class, -100 for texts that are no question with a known answer.

        Raises:
            ValueError: no texts, shapes that do not fit, or region targets without `region_mask`.
        """
        input_ids = input_ids if mlm_input_ids is None else mlm_input_ids
        if input_ids is None:
            raise ValueError("input_ids and mlm_input_ids are both None; give texts")
        states = self.lxmert(
            input_ids,
            visual_feats,
            visual_pos,
            attention_mask,
            visual_attention_mask,
            keep_padding=mlm_labels is None,
        )
        output = LXMERTForPreTrainingOutput(
            itm_logits=self.cls["seq_relationship"](states.pooler_output),
            answer_logits=self.answer_head(states.pooler_output),
        )
        self._predict_words(output, states.last_hidden_state, mlm_labels)
        if itm_labels is not None:
            output.loss_itm = classification_loss(output.itm_logits, itm_labels)
        targets = {"obj": (object_ids, object_scores), "attr": (attribute_ids, attribute_scores)}
        self._predict_regions(
            output, states.region_hidden_state, visual_attention_mask, region_mask, targets, target_feats
        )
        if answer_labels is not None:
            output.loss_answer = classification_loss(output.answer_logits, answer_labels)
        output.loss = self._weighted_sum(output)
        return output if return_dict else output.to_tuple()

    def _predict_words(self, output: LXMERTForPreTrainingOutput, words: Tensor, labels: Tensor | None):
        if labels is None:
            output.mlm_logits = self.cls["predictions"](words)
            return
        labelled = labels != -100
        output.mlm_logits = self.cls["predictions"](words[labelled])  # only where a label asks
        output.loss_mlm = masked_lm_loss(output.mlm_logits, labels[labelled])

    def _predict_regions(
        self,
        output: LXMERTForPreTrainingOutput,
        regions: Tensor,
        mask: Tensor | None,
        region_mask: Tensor | None,
        targets: dict[str, tuple[Tensor | None, Tensor | None]],
        target_feats: Tensor | None,
    ):
        """Region losses are means over all regions, of which some count nothing."""
        names = {"obj": "object", "attr": "attribute"}
        head = self.obj_predict_head
        if target_feats is None and all(ids is None for ids, _ in targets.values()):
            output.object_logits, output.attribute_logits, output.pred_feats = head(regions)
            return
        if region_mask is None:
            raise ValueError("region_mask is None; mark the masked regions whose targets are given")
        there = torch.ones_like(region_mask).bool() if mask is None else mask.bool()
        counted = there & region_mask.bool() if self.config.mask_region_labels else there
        transformed, total = head.transform(regions[counted]), there.sum()  # (N, D)
        for name, (ids, scores) in targets.items():
            if ids is not None:
                logits = head.decoder_dict[name](transformed)
                scores = torch.ones_like(logits[:, 0]) if scores is None else scores[counted]
                loss = region_class_loss(logits, ids[counted], scores, total)
                output[f"{names[name]}_logits"], output[f"loss_{names[name]}"] = logits, self._normalize(loss)
        if target_feats is not None:
            masked = region_mask[counted].bool()
            output.pred_feats = head.decoder_dict["feat"](transformed[masked])  # (S, F)
            loss = region_feature_loss(output.pred_feats, target_feats[counted][masked], total)
            output.loss_feature = self._normalize(loss)

    def _normalize(self, loss: Tensor) -> Tensor:
        return loss * self.config.visual_loss_normalizer

    def _weighted_sum(self, output: LXMERTForPreTrainingOutput) -> Tensor | None:
        names = ("mlm", "itm", "object", "attribute", "feature")
        weights = {name: getattr(self.config, f"{name}_weight") for name in names}
        terms = [
            weight * output[f"loss_{name}"]
            for name, weight in {**weights, "answer": self.answer_weight}.items()
            if output.get(f"loss_{name}") is not None
        ]
        return sum(terms) if terms else None
