"""Rows → batches of SOHO (arXiv 2104.03135): pre-training with several captions of each image, and questions.

Images stay as they are; the processor scales and pads them. Pairs of images, entailment and retrieval are
batched by `PairCollator`, `EntailmentCollator` and `RetrievalCollator` with `augment=False`. Every batch has
pixel_values (B, 3, H, W) and pixel_mask (B, H, W), True on the image; with `on_bad_image="skip"` rows are
left out as in `collators.py`, where it also says where random numbers come from.

Shape letters: B images, S captions of each, R = B * S texts, those of an image next to one another, L text
length, A answers to choose from.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .collators import Collator, Row, image_ids, row_name
from .masking import Masking, TokenMasking
from .soft_answers import SoftAnswerCollator
from .transforms import as_texts


@dataclass(kw_only=True)
class SOHOPretrainingCollator(Collator):
    """Rows of an image, its `caption` (str or list) and `image_id` → batch of pre-training (section 3):
    pixel_values, pixel_mask; mlm_input_ids, attention_mask and mlm_labels (R, L); itm_labels (R,) int64, 1
    where the text belongs to the image.

    captions_per_image: S. Of more captions S are drawn, fewer are repeated; `read_soho_pretraining` gives S.
    mismatch_probability: chance that a text is replaced by a caption of a row of the batch with another
    `image_id`, as in the official code; with `balanced` that share of each image's texts is, rounded, so that
    the paper's 2 of 4 are. Where the whole batch has one image, texts stay. predict_mismatched: words
    of texts of other images are to be predicted too, as in the official code; they are masked either way, so
    that no mask tells which texts belong. masking: default
    `TokenMasking(processor.tokenizer)`.
    """

    captions_per_image: int = 4
    mismatch_probability: float = 0.5
    balanced: bool = False
    predict_mismatched: bool = True
    masking: Masking | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.captions_per_image < 1:
            raise ValueError(f"captions_per_image is {self.captions_per_image}; give 1 or more")
        if not 0 <= self.mismatch_probability <= 1:
            raise ValueError(
                f"mismatch_probability is {self.mismatch_probability}; give a number from 0 to 1"
            )
        if self.balanced and self.mismatch_probability and not self.num_replaced:
            raise ValueError(
                f"mismatch_probability is {self.mismatch_probability} of {self.captions_per_image} captions, "
                "which is rounded to none; give a larger share, more captions, or balanced=False"
            )
        self.masking = self.masking or TokenMasking(self.processor.tokenizer)

    @property
    def num_replaced(self) -> int:
        """Texts of an image that are replaced with `balanced`."""
        return round(self.mismatch_probability * self.captions_per_image)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, images = self.load_images(rows)
        own = [self._captions(row, rng) for row in rows]
        texts, matched = self._replace(own, image_ids(rows).tolist(), rng)
        batch = dict(self.processor(images=images, text=texts, return_tensors="pt"))
        input_ids, itm_labels = batch.pop("input_ids"), torch.tensor(matched, dtype=torch.int64)
        batch |= self.masking(input_ids, batch["attention_mask"], rng)
        if not self.predict_mismatched:
            batch["mlm_labels"] = batch["mlm_labels"].masked_fill(itm_labels[:, None] == 0, -100)
        return batch | {"itm_labels": itm_labels}

    def _captions(self, row: Row, rng: random.Random) -> list[str]:
        """S captions of a row: in training any, else the first."""
        captions, count = as_texts(row["caption"]), self.captions_per_image
        if not captions:
            raise ValueError(f"{row_name(row)} has no caption; give a string or a list with at least one")
        if self.train and len(captions) != count:
            captions = rng.sample(captions, len(captions))
        return [
            self.choose_text(captions[number % len(captions)], rng, row_name(row)) for number in range(count)
        ]

    def _replace(
        self, own: list[list[str]], images: list[int], rng: random.Random
    ) -> tuple[list[str], list[bool]]:
        """The texts (R,), some of them of other images, and which belong to their image."""
        texts, matched = [], []
        for captions, image in zip(own, images, strict=True):
            others = [row for row, its_image in enumerate(images) if its_image != image]
            for caption, replaced in zip(captions, self._draw_replaced(rng), strict=True):
                replaced = replaced and bool(others)
                texts.append(rng.choice(own[rng.choice(others)]) if replaced else caption)
                matched.append(not replaced)
        return texts, matched

    def _draw_replaced(self, rng: random.Random) -> list[bool]:
        """Which of the S texts of an image are to be replaced."""
        count = self.captions_per_image
        if not self.balanced:
            return [rng.random() < self.mismatch_probability for _ in range(count)]
        chosen = rng.sample(range(count), self.num_replaced)
        return [number in chosen for number in range(count)]


@dataclass(kw_only=True)
class SOHOQuestionCollator(SoftAnswerCollator):
    """Question rows → pixel_values, pixel_mask; input_ids and attention_mask (B, L) of the questions, labels
    (B, A) float in 0..1, how right each answer is (`SoftAnswerCollator`).

    shortest_edges: smallest and largest length in pixels of the shorter sides of images, which is drawn for
    each batch in training, the longer side being at most `longest_edge`; None leaves the size to the
    processor. The official code draws from (400, 800), for each image.
    """

    shortest_edges: tuple[int, int] | None = None
    longest_edge: int = 1333

    def __post_init__(self):
        super().__post_init__()
        edges = self.shortest_edges
        if edges is not None and not 0 < edges[0] <= edges[1] <= self.longest_edge:
            raise ValueError(
                f"shortest_edges is {edges}; give two lengths in pixels, ascending, up to longest_edge "
                f"{self.longest_edge}"
            )

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, images = self.load_images(rows)
        size = {}
        if self.train and self.shortest_edges is not None:
            shortest = rng.randint(*self.shortest_edges)
            size = {"size": {"shortest_edge": shortest, "longest_edge": self.longest_edge}}
        questions = self.processor.encode_questions([row["question"] for row in rows])
        pixels = self.processor.image_processor(images, return_tensors="pt", **size)
        return {**pixels, **questions, **self.soft_labels(rows)}
