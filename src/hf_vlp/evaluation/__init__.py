"""Metrics, and the protocols that compute them with a model.

Retrieval in two stages, foils, grounding by boxes or proposals, questions, entailment, reasoning, captions.
"""

from .caption_metrics import (
    bleu_scores,
    caption_metrics,
    cider_d_reward,
    cider_d_scores,
    ngram_frequencies,
    rouge_l_scores,
    tokenize_caption,
)
from .captioning import CaptioningResult, evaluate_captioning, majority_caption_metrics
from .classification import (
    EntailmentResult,
    ReasoningResult,
    evaluate_entailment,
    evaluate_reasoning,
    majority_label_accuracy,
)
from .foils import FoilResult, evaluate_foils
from .grounding import GroundingResult, evaluate_grounding, evaluate_proposals, random_object_accuracy
from .metrics import (
    foil_accuracy,
    grounding_accuracy,
    label_accuracy,
    paired_box_iou,
    recall_at,
    retrieval_recall,
    sentence_consistency,
)
from .modules import (
    CaptionScores,
    EntailmentAccuracy,
    FoilAccuracy,
    GroundingAccuracy,
    ReasoningAccuracy,
    RetrievalRecall,
    VQAAccuracy,
)
from .question_answering import (
    QuestionAnsweringResult,
    evaluate_question_answering,
    majority_answer_accuracy,
)
from .retrieval import RetrievalResult, evaluate_retrieval
from .vqa import mean_per_type, normalize_answer, vqa_accuracy, vqa_scores, write_evalai

__all__ = [
    "CaptionScores",
    "CaptioningResult",
    "EntailmentAccuracy",
    "EntailmentResult",
    "FoilAccuracy",
    "FoilResult",
    "GroundingAccuracy",
    "GroundingResult",
    "QuestionAnsweringResult",
    "ReasoningAccuracy",
    "ReasoningResult",
    "RetrievalRecall",
    "RetrievalResult",
    "VQAAccuracy",
    "bleu_scores",
    "caption_metrics",
    "cider_d_reward",
    "cider_d_scores",
    "evaluate_captioning",
    "evaluate_entailment",
    "evaluate_foils",
    "evaluate_grounding",
    "evaluate_proposals",
    "evaluate_question_answering",
    "evaluate_reasoning",
    "evaluate_retrieval",
    "foil_accuracy",
    "grounding_accuracy",
    "label_accuracy",
    "majority_answer_accuracy",
    "majority_caption_metrics",
    "majority_label_accuracy",
    "mean_per_type",
    "ngram_frequencies",
    "normalize_answer",
    "paired_box_iou",
    "random_object_accuracy",
    "recall_at",
    "retrieval_recall",
    "rouge_l_scores",
    "sentence_consistency",
    "tokenize_caption",
    "vqa_accuracy",
    "vqa_scores",
    "write_evalai",
]
