"""Rows → batches of LXMERT (arXiv 1908.07490): pre-training, questions, pairs of images, entailment,
retrieval, grounding.

Rows have their regions in the column `regions`, a region row of `hf_vlp.models.regions` (for pairs of images
a list of two), or an `image` (`images`), in which the processor's extractor finds them. Images are never
augmented. Every batch has visual_feats (B, R, F), visual_pos (B, R, 4) x1, y1, x2, y2 in 0..1 and
visual_attention_mask (B, R) int64; with `on_bad_image="skip"` rows are left out as in `collators.py`, where
it also says where random numbers come from.

Shape letters: B rows, R regions, F width of a feature, L text length, A answers to choose from.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..images import load_image
from ..models.regions import Regions, stack_regions
from .collators import Collator, Row, image_ids, row_box, row_name, text_ids
from .masking import Masking, TokenMasking, mask_regions
from .soft_answers import SoftAnswerCollator, number_answers, soft_scores
from .task_collators import check_two, row_labels, sentence_name


@dataclass(kw_only=True)
class LXMERTCollator(Collator):
    """What LXMERT's collators share: regions where rows have them, else images.

    processor: an `LXMERTProcessor`, with an extractor if rows have images only.
    """

    def load_row(self, row: Row) -> dict[str, Any] | Image.Image:
        column = visual_column(row, "image")
        return row["regions"] if column == "regions" else load_image(row["image"])

    def encode(self, visuals: Sequence[Any], **inputs: Any) -> dict[str, Tensor]:
        """Region rows or images, and what else the processor takes, as it encodes them."""
        name = "images" if are_images(visuals) else "regions"
        return dict(self.processor(**{name: visuals}, **inputs, return_tensors="pt"))

    def encode_pairs(
        self, rows: Sequence[Row], column: str, rng: random.Random
    ) -> tuple[list[Row], dict[str, Tensor]]:
        """The rows that stay; visual inputs, input_ids and attention_mask of each with a text of `column`."""
        rows, visuals = self.load_images(rows)
        texts = [self.choose_text(row[column], rng, row_name(row)) for row in rows]
        return rows, self.encode(visuals, text=texts)


def visual_column(row: Row, image_column: str) -> str:
    """ "regions", or where a row has none `image_column`."""
    for column in ("regions", image_column):
        if row.get(column) is not None:
            return column
    raise ValueError(
        f"{row_name(row)} has neither regions nor {image_column}; add the column regions "
        f"(`hf_vlp.data.features.with_regions`) or {image_column}"
    )


def are_images(visuals: Sequence[Any]) -> bool:
    """Whether these are images and no region rows; ValueError if they are of both kinds."""
    kinds = {isinstance(visual, Image.Image) for visual in visuals}
    if len(kinds) > 1:
        raise ValueError(
            "a batch has rows with regions and rows with images only; give regions to all or none"
        )
    return kinds.pop()


@dataclass(kw_only=True)
class LXMERTPretrainingCollator(LXMERTCollator):
    """Rows of an image, a `caption` and `image_id` → batch of pre-training (section 3.1): mlm_input_ids,
    attention_mask and mlm_labels (B, L); visual inputs whose visual_feats are masked; region_mask (B, R) bool
    and target_feats (B, R, F), the masked regions and the features before; object_ids, object_scores,
    attribute_ids, attribute_scores (B, R) as far as rows or extractor give them; itm_labels (B,) int64, 1
    where the text belongs to the image; answer_labels (B,) int64, -100 without an answer.

    With `mismatch_probability` a row gets the text of another row of the batch whose `image_id` differs;
    where the whole batch has one image, texts stay. answers: the answers that the model knows, as
    `read_answer_table` gives them. A row that keeps its text and has some of them in its `answers` gets one,
    drawn by `answer_scores`, or by their scores as votes (`soft_scores`). masking: default
    `TokenMasking(processor.tokenizer)`.
    """

    answers: Sequence[str] = ()
    mismatch_probability: float = 0.5
    region_mask_probability: float = 0.15
    masking: Masking | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("mismatch_probability", "region_mask_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        self.answer_ids = number_answers(self.answers)
        self.masking = self.masking or TokenMasking(self.processor.tokenizer)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, visuals = self.load_images(rows)
        texts = [self.choose_text(row["caption"], rng, row_name(row)) for row in rows]
        sources = self._text_sources(rows, rng)
        matched = [source == index for index, source in enumerate(sources)]
        answers = [
            self._draw_answer(row, rng) if keeps_text else -100
            for row, keeps_text in zip(rows, matched, strict=True)
        ]
        regions = self.processor.extract(visuals) if are_images(visuals) else stack_regions(visuals)
        batch = dict(self.processor(regions=regions, text=[texts[source] for source in sources]))
        batch |= self.masking(batch.pop("input_ids"), batch["attention_mask"], rng)
        batch |= self._mask_regions(batch["visual_feats"], regions, rng)
        return batch | {
            "itm_labels": torch.tensor(matched, dtype=torch.int64),
            "answer_labels": torch.tensor(answers, dtype=torch.int64),
        }

    def _text_sources(self, rows: Sequence[Row], rng: random.Random) -> list[int]:
        """For each row the row whose text it gets."""
        images, sources = image_ids(rows).tolist(), list(range(len(rows)))
        for row, image in enumerate(images):
            if rng.random() < self.mismatch_probability:
                others = [other for other, its_image in enumerate(images) if its_image != image]
                sources[row] = rng.choice(others or [row])
        return sources

    def _draw_answer(self, row: Row, rng: random.Random) -> int:
        scores = {
            self.answer_ids[answer]: score
            for answer, score in soft_scores(row).items()
            if answer in self.answer_ids and score > 0
        }
        return rng.choices(list(scores), list(scores.values()))[0] if scores else -100

    def _mask_regions(self, features: Tensor, regions: Regions, rng: random.Random) -> dict[str, Tensor]:
        masked, chosen = mask_regions(features, regions.mask, rng, self.region_mask_probability)
        names = ("object_ids", "object_scores", "attribute_ids", "attribute_scores")
        return {
            "visual_feats": masked,
            "target_feats": features,
            "region_mask": chosen,
            **{name: regions[name] for name in names if name in regions},
        }


@dataclass(kw_only=True)
class LXMERTQuestionCollator(SoftAnswerCollator, LXMERTCollator):
    """Question rows → visual inputs, input_ids and attention_mask (B, L) of the questions, labels (B, A)
    float in 0..1, how right each answer is (`SoftAnswerCollator`).
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rows, visuals = self.load_images(rows)
        questions = self.processor.encode_questions([row["question"] for row in rows])
        return {**self.encode(visuals), **questions, **self.soft_labels(rows)}


@dataclass(kw_only=True)
class LXMERTPairCollator(LXMERTCollator):
    """Pair rows → visual_feats (B, 2, R, F), visual_pos (B, 2, R, 4), visual_attention_mask (B, 2, R);
    input_ids and attention_mask (B, L), labels (B,) int64, 1 for true.
    """

    def load_row(self, row: Row) -> list[dict[str, Any]] | list[Image.Image]:
        pair = check_two(row, visual_column(row, "images"))
        return pair if row.get("regions") is not None else [load_image(image) for image in pair]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, pairs = self.load_images(rows)
        sentences = [self.choose_text(row["sentence"], rng, sentence_name(row)) for row in rows]
        visuals = self.encode([visual for pair in pairs for visual in pair])
        return {
            **{name: value.unflatten(0, (len(rows), 2)) for name, value in visuals.items()},  # (B, 2, R, ..)
            **self.processor(text=sentences, return_tensors="pt"),
            "labels": row_labels(rows),
        }


@dataclass(kw_only=True)
class LXMERTEntailmentCollator(LXMERTCollator):
    """Entailment rows → visual inputs, input_ids and attention_mask (B, L), labels (B,) int64."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rows, batch = self.encode_pairs(rows, "sentence", self.batch_rng(rows))
        return batch | {"labels": row_labels(rows)}


@dataclass(kw_only=True)
class LXMERTRetrievalCollator(LXMERTCollator):
    """Retrieval rows → visual inputs, input_ids and attention_mask (B, L), image_ids (B,) int64, as those of
    `RetrievalCollator`, also with `group_equal_texts`.
    """

    group_equal_texts: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rows, batch = self.encode_pairs(rows, "caption", self.batch_rng(rows))
        return batch | {"image_ids": text_ids(batch) if self.group_equal_texts else image_ids(rows)}


@dataclass(kw_only=True)
class LXMERTGroundingCollator(LXMERTCollator):
    """Grounding rows → visual inputs, input_ids and attention_mask (B, L), target_boxes (B, 4) as cx, cy, w,
    h in 0..1.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, visuals = self.load_images(rows)
        texts = [self.choose_text(row["text"], rng, row_name(row)) for row in rows]
        sizes = [_image_size(visual) for visual in visuals]
        boxes = [row_box(row, width, height) for row, (height, width) in zip(rows, sizes, strict=True)]
        target_boxes = self.processor.encode_regions(boxes, sizes)["target_boxes"]
        return self.encode(visuals, text=texts) | {"target_boxes": target_boxes}


def _image_size(visual: dict[str, Any] | Image.Image) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(visual, Image.Image):
        return visual.height, visual.width
    height, width = visual["image_size"]
    return int(height), int(width)
