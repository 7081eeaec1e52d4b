"""Metrics, and the protocols that compute them with a model: retrieval in two stages, foils, grounding."""

from .foils import FoilResult, evaluate_foils
from .grounding import GroundingResult, evaluate_grounding, random_object_accuracy
from .metrics import foil_accuracy, grounding_accuracy, paired_box_iou, recall_at, retrieval_recall
from .modules import FoilAccuracy, GroundingAccuracy, RetrievalRecall
from .retrieval import RetrievalResult, evaluate_retrieval

__all__ = [
    "FoilAccuracy",
    "FoilResult",
    "GroundingAccuracy",
    "GroundingResult",
    "RetrievalRecall",
    "RetrievalResult",
    "evaluate_foils",
    "evaluate_grounding",
    "evaluate_retrieval",
    "foil_accuracy",
    "grounding_accuracy",
    "paired_box_iou",
    "random_object_accuracy",
    "recall_at",
    "retrieval_recall",
]
