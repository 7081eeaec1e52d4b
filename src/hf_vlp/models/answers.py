"""Answers as LXMERT compares them, and heads that choose among a list of answers (LXMERT, SOHO)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .outputs import RankedAnswers

NUMBERS = {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
_SPELLINGS = NUMBERS | {"grey": "gray"}
_ARTICLES = ("a ", "an ", "the ")


def simplify_answer(answer: str) -> str:
    """An answer in the form of LXMERT's answer table.

    Lower case, without a period at the end and an article at the front, numbers up to ten as digits, and
    "gray": "Two." is "2", "The woman" is "woman", "A." is "a".
    """
    answer = answer.lower()
    if answer.endswith("."):
        answer = answer[:-1].strip()
    for article in _ARTICLES:
        if answer.startswith(article):
            answer = answer.removeprefix(article).strip()
    return _SPELLINGS.get(answer, answer)


class AnswerCoverage(NamedTuple):
    """Which answers of a new list an answer table holds: `found`, and `missing` ones."""

    found: list[str]
    missing: list[str]

    def __str__(self) -> str:
        missing = f", without {', '.join(map(repr, self.missing[:5]))}" if self.missing else ""
        more = ", ..." if len(self.missing) > 5 else ""
        return f"{len(self.found)} of {len(self.found) + len(self.missing)} answers{missing}{more}"


def match_answers(answers: Sequence[str], table: Sequence[str]) -> tuple[list[int | None], AnswerCoverage]:
    """For each of `answers` its place in `table`, None where it is not there, and the coverage.

    Both are compared as `simplify_answer` makes them; of equal entries of the table the first is taken.

    Raises:
        ValueError: `answers` is empty, or holds an answer twice.
    """
    if not answers or len(set(answers)) != len(answers):
        raise ValueError(
            f"answers holds {len(answers)} strings, {len(set(answers))} different ones; give each answer once"
        )
    places = {}
    for place, answer in enumerate(table):
        places.setdefault(simplify_answer(answer), place)
    found = [places.get(simplify_answer(answer)) for answer in answers]
    pairs = list(zip(answers, found, strict=True))
    coverage = AnswerCoverage(
        [answer for answer, place in pairs if place is not None],
        [answer for answer, place in pairs if place is None],
    )
    return found, coverage


class ChoosesAnswers:
    """A head for question answering that chooses among the answers of `config.answers`.

    It has `answer_classes`, the linear layer whose outputs are the classes, and `num_answers_field`, the name
    of the config's field of their number.
    """

    num_answers_field: str
    answer_classes: nn.Linear

    @torch.no_grad()
    def load_answers(self, answers: Sequence[str], table: Sequence[str] | None = None) -> AnswerCoverage:
        """Choose among `answers` from now on, which start as what the head knows of them.

        The class of an answer is taken over by its string, as `simplify_answer` makes it; that of an answer
        the head does not know starts at zero. Thus a pre-trained model is fine-tuned to a data set's answers.

        Args:
            answers: the new classes, each once.
            table: the strings of the present classes, where `config.answers` does not hold them.

        Returns:
            Which of the answers were known.

        Raises:
            ValueError: the strings of the present classes are not known, or not as many as classes; an empty
                list, or an answer given twice.
        """
        table, layer = self.config.answers if table is None else table, self.answer_classes
        if table is None or len(table) != layer.out_features:
            got = "not known" if table is None else f"{len(table)}"
            raise ValueError(
                f"the answers of the head's {layer.out_features} classes are {got}; give them as table"
            )
        places, coverage = match_answers(answers, table)
        known = torch.tensor([place is not None for place in places], device=layer.weight.device)
        rows = torch.tensor([place or 0 for place in places], device=layer.weight.device)
        layer.weight = nn.Parameter(layer.weight[rows] * known[:, None])
        layer.bias = nn.Parameter(layer.bias[rows] * known)
        layer.out_features = len(answers)
        self.config.answers = list(answers)
        setattr(self.config, self.num_answers_field, len(answers))
        return coverage

    @torch.no_grad()
    def rank_answers(self, top_k: int = 5, **inputs) -> RankedAnswers:
        """The `top_k` best answers to each question, best first; `inputs` are those of `forward`.

        `indices` point into `config.answers`; each probability is that answer's own, as they are learnt.

        Raises:
            ValueError: `top_k` below 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; use a number of answers of at least 1")
        probabilities = self(**inputs).logits.float().sigmoid()
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        return RankedAnswers(indices=best.indices, probabilities=best.values)
