"""Answers that are right in part: scores of a row's answers, and the targets of models that choose from a
list, as LXMERT and SOHO do (arXiv 1908.07490, 2104.03135).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .collators import Collator, Row, row_name
from .transforms import as_texts


def number_answers(answers: Sequence[str]) -> dict[str, int]:
    """Position of each answer; ValueError for one that comes twice."""
    numbers = {answer: number for number, answer in enumerate(answers)}
    if len(numbers) < len(answers):
        twice = next(answer for answer, count in Counter(answers).items() if count > 1)
        raise ValueError(f"answers holds {twice!r} more than once; give each answer once")
    return numbers


def soft_scores(row: Row) -> dict[str, float]:
    """How right each answer of a row is, 0..1: its `answer_scores`, or without these min(1, 0.3 x votes), as
    in the training files of LXMERT and BUTD. An answer that all annotators gave is right, also if they are
    fewer than four.
    """
    answers, scores = as_texts(row.get("answers")), row.get("answer_scores")
    if scores is None:
        votes = Counter(answers)
        return {
            answer: 1.0 if count == len(answers) else min(1.0, 0.3 * count) for answer, count in votes.items()
        }
    if len(scores) != len(answers):
        raise ValueError(f"{row_name(row)} has {len(answers)} answers and {len(scores)} answer_scores")
    return dict(zip(answers, map(float, scores), strict=True))


@dataclass(kw_only=True)
class SoftAnswerCollator(Collator):
    """What collators of questions share whose models choose from a list.

    answers: the model's answers; those of rows that are not among them are dropped. If no row has answers,
    which is for evaluation only, a batch has no labels.
    """

    answers: Sequence[str]

    def __post_init__(self):
        super().__post_init__()
        if not len(self.answers):
            raise ValueError("answers is empty; give the answers that the model chooses from")
        self.answer_ids = number_answers(self.answers)

    def soft_labels(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """labels (B, A) float in 0..1, how right each answer is (`soft_scores`)."""
        if self.train or any(as_texts(row.get("answers")) for row in rows):
            return {"labels": torch.stack([self._target(row) for row in rows])}
        return {}

    def _target(self, row: Row) -> Tensor:
        if row.get("answers") is None:
            raise ValueError(f"{row_name(row)} has no answers; add the column, a list of strings")
        target = torch.zeros(len(self.answers))
        for answer, score in soft_scores(row).items():
            if answer in self.answer_ids:
                target[self.answer_ids[answer]] = score
        return target
