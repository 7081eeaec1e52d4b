"""Rows → batches of question answering, of sentences on two images (NLVR2), and of visual entailment, as
ALBEF trains on them (arXiv 2107.07651). What all collators share is in `collators.py`.

Shape letters: B rows, L text length, A answers of all rows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..images import load_image
from .collators import Row, WholeImageCollator, row_name
from .transforms import as_texts


@dataclass(kw_only=True)
class QuestionAnsweringCollator(WholeImageCollator):
    """Question rows → pixel_values (B, 3, H, W), input_ids and attention_mask (B, L) of the questions;
    answer_input_ids and answer_attention_mask (A, L'), answer_question_index (A,) int64, the row of each
    answer, and answer_weights (A,).

    The answers of a row are its different ones; an answer weighs its share of the annotators times the row's
    `answer_weight` (1 if there is none). Rows without answers are for evaluation: if no row has any, the
    batch has no answers.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, images = self.load_images(rows)
        answers = [Counter(as_texts(row.get("answers"))) for row in rows]
        questions = [row["question"] for row in rows]
        images = [
            self.augment_image(image, [question, *votes], rng)
            for image, question, votes in zip(images, questions, answers, strict=True)
        ]
        batch = dict(self.processor(images=images, return_tensors="pt"))
        batch |= self.processor.encode_questions(questions)
        if self.train or any(answers):
            batch |= self._encode_answers(rows, answers)
        return batch

    def _encode_answers(self, rows: Sequence[Row], answers: Sequence[Counter]) -> dict[str, Tensor]:
        weights = []
        for row, votes in zip(rows, answers, strict=True):
            if not votes:
                raise ValueError(f"{row_name(row)} has no answers; give a list with at least one string")
            weight = row.get("answer_weight", 1.0) / votes.total()
            weights += [weight * count for count in votes.values()]
        counts = torch.tensor([len(votes) for votes in answers])
        return {
            **self.processor.encode_answers([answer for votes in answers for answer in votes]),
            "answer_question_index": torch.repeat_interleave(torch.arange(len(rows)), counts),  # (A,)
            "answer_weights": torch.tensor(weights, dtype=torch.float),  # (A,)
        }


@dataclass(kw_only=True)
class PairCollator(WholeImageCollator):
    """Pair rows → pixel_values (B, 2, 3, H, W), input_ids and attention_mask (B, L), labels (B,) int64, 1 for
    true.

    A processor's pixel_mask becomes (B, 2, H, W). The two images are augmented independently of each other.
    With `on_bad_image="skip"` a row is left out if either cannot be read.
    """

    def load_row(self, row: Row) -> list[Image.Image]:
        return [load_image(image) for image in check_two(row, "images")]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, pairs = self.load_images(rows)
        sentences = [self.choose_text(row["sentence"], rng, sentence_name(row)) for row in rows]
        images = [
            self.augment_image(image, [sentence], rng)
            for pair, sentence in zip(pairs, sentences, strict=True)
            for image in pair
        ]
        pixels = self.processor(images=images, return_tensors="pt")
        return {
            **{name: value.unflatten(0, (len(rows), 2)) for name, value in pixels.items()},  # (B, 2, ...)
            **self.processor(text=sentences, return_tensors="pt"),
            "labels": row_labels(rows),
        }


@dataclass(kw_only=True)
class EntailmentCollator(WholeImageCollator):
    """Entailment rows → pixel_values (B, 3, H, W), input_ids and attention_mask (B, L), labels (B,) int64."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rows, batch = self.encode_pairs(rows, "sentence", self.batch_rng(rows))
        return batch | {"labels": row_labels(rows)}


def sentence_name(row: Row) -> str:
    return f"the row of {row['sentence']!r}"


def check_two(row: Row, column: str) -> Sequence:
    """What a pair row holds in `column`, of each image."""
    if len(row[column]) != 2:
        raise ValueError(f"{sentence_name(row)} has {len(row[column])} {column}; give two")
    return row[column]


def row_labels(rows: Sequence[Row]) -> Tensor:
    """(B,) int64."""
    for row in rows:
        if "label" not in row:
            raise ValueError(f"{sentence_name(row)} has no label; add the column, integers from 0")
    return torch.tensor([int(row["label"]) for row in rows])  # (B,)
