"""`hf-vlp evaluate`: the protocols of `hf_vlp.evaluation` on rows, beside their honest baselines."""

from pathlib import Path
from typing import Any

import torch

from ..evaluation import (
    evaluate_captioning,
    evaluate_entailment,
    evaluate_foils,
    evaluate_grounding,
    evaluate_proposals,
    evaluate_question_answering,
    evaluate_reasoning,
    evaluate_retrieval,
    majority_answer_accuracy,
    majority_caption_metrics,
    majority_label_accuracy,
    random_object_accuracy,
    retrieval_recall,
)
from ..evaluation.question_answering import answer_classes
from ..loading import load_trained, place_extractor
from ..models.image_text_heatmaps import HeatmapHead
from .predict import read_answers
from .rows import read_model_rows, without_images

# task: the head that does it, and the columns that its rows have, images first
TASKS = {
    "retrieval": ("retrieval", ("image", "caption")),
    "grounding": ("grounding", ("image", "text", "box")),
    "vqa": ("vqa", ("image", "question", "answers")),
    "reasoning": ("reasoning", ("images", "sentence", "label")),
    "entailment": ("entailment", ("image", "sentence", "label")),
    "foils": ("retrieval", ("image", "caption", "foil")),
    "captioning": ("captioning", ("image", "caption")),
}


def run(
    task: str,
    name: str,
    data: str,
    split: str = "test",
    answers: Path | None = None,
    features: Path | None = None,
    extractor: str | None = None,
    top_k: int = 128,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Score the model in `name` on the rows `data`.

    Args:
        split: which of several.
        answers: file of the answers that question answering ranks; LXMERT and SOHO know their own.
        features: folder of LXMERT's regions, for rows that have none.
        extractor: what finds LXMERT's regions in images, in place of the model's own.
        top_k: candidates that retrieval re-ranks, answers that are ranked whole.
        batch_size: rows at a time.

    Returns:
        Number of `rows`, `metrics`, the `baseline`'s values of them (where there is one), and
        `baseline_name`.

    Raises:
        ValueError: as `load_trained`, `read_model_rows` and the protocols, or question answering without
            `answers`.
    """
    head, columns = TASKS[task]
    model, processor = load_trained(head, name, extractor)
    if task == "vqa" and answers is None and answer_classes(model) is None:
        raise ValueError("answers is None; give the file of the answers that the model chooses from")
    rows = read_model_rows(model, data, split, columns, features)
    if "regions" not in rows.column_names:
        place_extractor(processor, model.device)
    inputs, settings = (model, processor, rows), {"batch_size": batch_size, "progress": True}

    if task == "retrieval":
        metrics, baseline = _retrieval(*inputs, top_k=top_k, **settings)
        baseline_name = "a random order"
    elif task == "foils":
        metrics = {"accuracy": evaluate_foils(*inputs, **settings).accuracy}
        baseline, baseline_name = {"accuracy": 0.5}, "a coin"
    elif task == "grounding":
        metrics, baseline, baseline_name = _grounding(*inputs, **settings)
    elif task == "captioning":
        metrics = evaluate_captioning(*inputs, **settings).metrics
        baseline = majority_caption_metrics(without_images(rows))
        baseline_name = "the most frequent caption of these rows under all images"
    elif task == "vqa":
        answer_list = answers and read_answers(answers)
        result = evaluate_question_answering(*inputs, answer_list, top_k=top_k, **settings)
        metrics = {"accuracy": result.accuracy}
        metrics |= {f"accuracy of {kind}": value for kind, value in result.accuracy_per_type.items()}
        labels = without_images(rows)
        baseline = {"accuracy": majority_answer_accuracy(labels, labels)}
        baseline_name = "the most frequent answer of these rows, by type of question"
    else:
        protocol = evaluate_reasoning if task == "reasoning" else evaluate_entailment
        result = protocol(*inputs, **settings)
        names = ("accuracy", "consistency") if task == "reasoning" else ("accuracy",)
        metrics = {metric: vars(result)[metric] for metric in names}
        baseline = {"accuracy": majority_label_accuracy(without_images(rows))}
        baseline_name = "the most frequent label"
    return {"rows": len(rows), "metrics": metrics, "baseline": baseline, "baseline_name": baseline_name}


def _retrieval(model, processor, rows, **settings) -> tuple[dict, dict]:
    """Re-ranked and, with names that begin with `itc_`, by features alone, where there are any."""
    result = evaluate_retrieval(model, processor, rows, **settings)
    by_features = {f"itc_{name}": value for name, value in (result.itc_metrics or {}).items()}
    ties = torch.zeros_like(result.image_to_text)  # count as if in random order
    return result.metrics | by_features, retrieval_recall(ties, ties.T, result.text_image)


def _grounding(model, processor, rows, **settings) -> tuple[dict, dict, str | None]:
    """By boxes; where heads give heat maps and rows candidates, by choosing among these."""
    has_candidates = "candidates" in rows.column_names
    chooses = has_candidates and isinstance(model, HeatmapHead)
    protocol = evaluate_proposals if chooses else evaluate_grounding
    metrics = {"accuracy": protocol(model, processor, rows, **settings).accuracy}
    if not has_candidates:
        return metrics, {}, None
    return metrics, {"accuracy": random_object_accuracy(without_images(rows))}, "the box of a random object"
