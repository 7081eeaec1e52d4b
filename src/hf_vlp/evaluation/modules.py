"""The metrics as `evaluate` modules: plain classes, which need no download.

metric = GroundingAccuracy()
metric.add_batch(predictions=boxes, references=targets)
metric.compute()
"""

import datasets
import evaluate
import torch

from .caption_metrics import caption_metrics
from .metrics import (
    foil_accuracy,
    grounding_accuracy,
    label_accuracy,
    retrieval_recall,
    sentence_consistency,
)
from .vqa import mean_per_type, vqa_scores

_BOX = datasets.Sequence(datasets.Value("float32"), length=4)
_LABEL = datasets.Value("int64")


class RetrievalRecall(evaluate.Metric):
    """Recall at 1, 5 and 10 both ways; one row per text.

    `predictions`: the scores of all images for the text; `references`: the index of the image it belongs to.
    `compute` also takes `image_to_text` (I, T), where the ranking of texts comes from scores of its own.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Value("int64"),
        }
        return _info(self, features)

    def _compute(self, predictions, references, image_to_text=None) -> dict[str, float]:
        text_to_image = torch.tensor(predictions)
        return retrieval_recall(
            text_to_image.T if image_to_text is None else image_to_text, text_to_image, references
        )


class GroundingAccuracy(evaluate.Metric):
    """Share of boxes x1, y1, x2, y2 with an IoU of at least `iou_threshold` (0.5) with the target."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, {"predictions": _BOX, "references": _BOX})

    def _compute(self, predictions, references, iou_threshold: float = 0.5) -> dict[str, float]:
        accuracy = grounding_accuracy(predictions, references, iou_threshold)
        return {"grounding_accuracy": accuracy}


class FoilAccuracy(evaluate.Metric):
    """Share of captions that score above their foil, ties half.

    `predictions` are the scores of the captions, `references` those of the foils.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            self, {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"foil_accuracy": foil_accuracy(predictions, references)}


class VQAAccuracy(evaluate.Metric):
    """Official VQA accuracy of the answers in `predictions`; `references` lists the annotators' of each.

    `compute` also takes `question_types`, one per question, and then adds "vqa_accuracy_TYPE" of each.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return _info(self, {"predictions": text, "references": datasets.Sequence(text)})

    def _compute(self, predictions, references, question_types=None) -> dict[str, float]:
        scores = vqa_scores(predictions, references)
        per_type = {} if question_types is None else mean_per_type(scores, question_types)
        return {
            "vqa_accuracy": scores.mean().item(),
            **{f"vqa_accuracy_{kind}": accuracy for kind, accuracy in per_type.items()},
        }


class EntailmentAccuracy(evaluate.Metric):
    """Share of labels that are right."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, {"predictions": _LABEL, "references": _LABEL})

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"entailment_accuracy": label_accuracy(predictions, references)}


class ReasoningAccuracy(evaluate.Metric):
    """Share of labels that are right, and share of sentences all of whose labels are.

    `sentences` names the sentence of each row: its text, or NLVR2's identifier without the pair.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": _LABEL, "references": _LABEL, "sentences": datasets.Value("string")}
        return _info(self, features)

    def _compute(self, predictions, references, sentences) -> dict[str, float]:
        return {
            "reasoning_accuracy": label_accuracy(predictions, references),
            "reasoning_consistency": sentence_consistency(predictions, references, sentences),
        }


class CaptionScores(evaluate.Metric):
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of the captions in `predictions` (`caption_metrics`);
    `references` lists those that people wrote of each image."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return _info(self, {"predictions": text, "references": datasets.Sequence(text)})

    def _compute(self, predictions, references) -> dict[str, float]:
        return caption_metrics(predictions, references)


def _info(metric: evaluate.Metric, features: dict) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=type(metric).__doc__,
        citation="",
        inputs_description="",
        features=datasets.Features(features),
    )
