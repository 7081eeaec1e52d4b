"""Answering questions by ranking a list of answers: accuracy, and the honest baseline. ALBEF section 5.

Rows hold `image`, or `regions` for LXMERT, `question` and, where known, `answers`: one per annotator or,
beside `answer_scores`, each once; some have a `question_type`. Q: questions, k: answers kept of each.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .inference import batched, evaluating, number_of, to_model, visual_inputs, visual_of
from .metrics import require_no_nan
from .vqa import mean_per_type, vqa_scores

KEPT = 10  # best answers of each question in a result
Reference = list[str] | dict[str, float] | None  # answers of annotators, or scores of answers


@dataclass
class QuestionAnsweringResult:
    """Predicted `answers`, and what else was likely.

    `indices` (Q, k) are the up to 10 best of the answer list, best first, `probabilities` (Q, k) theirs among
    the `top_k` that were ranked, of LXMERT and SOHO each answer's own. `accuracy` is the official VQA
    accuracy, or the mean of the predicted answers' `answer_scores`, None for rows without answers;
    `accuracy_per_type` is that of each `question_type`, empty where rows have none.
    """

    answers: list[str]
    indices: Tensor
    probabilities: Tensor
    accuracy: float | None
    accuracy_per_type: dict[str, float]


def evaluate_question_answering(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    answer_list: Sequence[str] | None = None,
    top_k: int = 128,
    batch_size: int = 32,
    progress: bool = False,
) -> QuestionAnsweringResult:
    """Answer each row's question with the best of `answer_list`, and score the answers: by the row's
    `answer_scores`, where it has them (0 for other answers), or by its annotators (`vqa_scores`).

    The `top_k` answers with the likeliest first token are ranked in full (official: 128 of 3,128). LXMERT
    and SOHO choose among all classes of their head, `config.answers`, and need no list. Rows of a batch that
    show the same image share its pass.

    Raises:
        ValueError: no rows, no answers to rank or others than those of such a head, answers of some rows
            only, `top_k` or `batch_size` below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; use a number of answers of at least 1")
    indices, probabilities, references, types = [], [], [], []
    with evaluating(model), tqdm(total=number_of(rows), desc="answers", disable=not progress) as bar:
        answer_list, candidates = answer_candidates(model, processor, answer_list)
        for batch in batched(rows, batch_size):
            visual = visual_inputs(model, processor, [visual_of(row, processor) for row in batch])
            questions = to_model(processor.encode_questions([row["question"] for row in batch]), model)
            ranked = model.rank_answers(
                **visual.inputs,
                **questions,
                **candidates,
                top_k=min(top_k, len(answer_list)),
                image_index=visual.index,
            )
            indices.append(ranked.indices[:, :KEPT].cpu())
            probabilities.append(ranked.probabilities[:, :KEPT].float().cpu())
            references += [_reference(row) for row in batch]
            types += [row.get("question_type") for row in batch]
            bar.update(len(batch))
    if not indices:
        raise ValueError("rows is empty; give at least one row with `image` and `question`")
    indices, probabilities = torch.cat(indices), torch.cat(probabilities)
    require_no_nan("probabilities", probabilities)
    answers = [answer_list[best] for best in indices[:, 0].tolist()]
    accuracy, accuracy_per_type = _accuracies(answers, references, types)
    return QuestionAnsweringResult(answers, indices, probabilities, accuracy, accuracy_per_type)


def answer_classes(model: PreTrainedModel) -> int | None:
    """How many answers LXMERT's or SOHO's head chooses from; None of a head that ranks any list."""
    config = getattr(model, "config", None)
    return getattr(config, "num_qa_labels", getattr(config, "num_answers", None))


def answer_candidates(
    model: PreTrainedModel, processor: ProcessorMixin, answers: Sequence[str] | None
) -> tuple[list[str], dict[str, Tensor]]:
    """The answers that a model chooses from, and what its `rank_answers` takes of them.

    Those of LXMERT and SOHO are the classes of their head: `answers` may be None, and name them where the
    config does not.

    Raises:
        ValueError: no answers to choose from, or others than those of the config.
    """
    classes = answer_classes(model)
    if classes is None:
        if not answers:
            raise ValueError("answer_list is empty; give the answers that the model chooses from")
        return list(answers), to_model(processor.encode_answers(list(answers)), model)
    known = model.config.answers
    answers = known if answers is None else list(answers)
    if answers is None or len(answers) != classes or known not in (None, answers):
        given = "None" if answers is None else f"a list of {len(answers)}"
        raise ValueError(
            f"answer_list is {given}, but the model chooses among the {classes} answers of its head; "
            + ("give their strings in the order of the classes" if known is None else "leave it at None")
        )
    return answers, {}


def majority_answer_accuracy(train_rows: Iterable[dict], rows: Iterable[dict]) -> float:
    """Accuracy on `rows` of who answers without looking: the most frequent answer of the question's type.

    Votes are those of `train_rows`; a type that they lack gets the most frequent answer of all their
    questions. Compare every accuracy with it.

    Raises:
        ValueError: no training answers, no rows, or a row without answers.
    """
    votes = defaultdict(Counter)
    for row in train_rows:
        votes[row.get("question_type")].update(_reference(row) or ())
    overall = sum(votes.values(), Counter())
    if not overall:
        raise ValueError("train_rows holds no answers; give at least one row with `answers`")
    predictions, references = [], []
    for row in rows:
        counts = votes.get(row.get("question_type")) or overall
        predictions.append(counts.most_common(1)[0][0])
        references.append(_reference(row))
    return _scores(predictions, references).mean().item()


def _reference(row: dict) -> Reference:
    """What a row's answer is compared with; None without answers, {} where no answer is right."""
    answers, scores = row.get("answers"), row.get("answer_scores")
    return (answers or None) if scores is None else dict(zip(answers, scores, strict=True))


def _accuracies(
    answers: list[str], references: list[Reference], types: list
) -> tuple[float | None, dict[str, float]]:
    if not any(references):
        return None, {}
    if None in references:
        row = references.index(None)
        raise ValueError(f"rows[{row}] has no `answers` and others do; give those of all rows, or of none")
    scores = _scores(answers, references)
    return scores.mean().item(), mean_per_type(scores, types)


def _scores(answers: list[str], references: list[Reference]) -> Tensor:
    is_soft = [isinstance(reference, dict) for reference in references]
    if not any(is_soft):
        return vqa_scores(answers, references)
    if not all(is_soft):
        row = is_soft.index(False)
        raise ValueError(
            f"rows[{row}] has no `answer_scores` and others do; give those of all rows, or of none"
        )
    scores = [reference.get(answer, 0.0) for answer, reference in zip(answers, references, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)
