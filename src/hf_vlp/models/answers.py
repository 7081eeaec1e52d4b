"""Answers as LXMERT compares them, and moving the classes of an answer head to another list of answers."""

from collections.abc import Sequence
from typing import NamedTuple

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
