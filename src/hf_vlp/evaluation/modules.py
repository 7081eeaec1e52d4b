"""The metrics as `evaluate` modules: plain classes, which need no download.

metric = GroundingAccuracy()
metric.add_batch(predictions=boxes, references=targets)
metric.compute()
"""

import datasets
import evaluate
import torch

from .metrics import foil_accuracy, grounding_accuracy, retrieval_recall

_BOX = datasets.Sequence(datasets.Value("float32"), length=4)


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


def _info(metric: evaluate.Metric, features: dict) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=type(metric).__doc__,
        citation="",
        inputs_description="",
        features=datasets.Features(features),
    )
