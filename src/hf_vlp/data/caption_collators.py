"""Rows → batches of captions to be written, as X-VLM trains on them (arXiv 2111.08276). What all collators
share is in `collators.py`.

Shape letters: B rows, L text length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .collators import Row, WholeImageCollator, row_name
from .transforms import as_texts


@dataclass(kw_only=True)
class CaptioningCollator(WholeImageCollator):
    """Image-text rows → pixel_values (B, 3, H, W); input_ids, attention_mask and labels (B, L) of `[CLS]
    prompt words [SEP]`, with labels of words and [SEP] only.

    The prompt is the processor's. Of several captions of an image one is drawn.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, images = self.load_images(rows)
        texts = [self.choose_text(row["caption"], rng, row_name(row)) for row in rows]
        images = [self.augment_image(image, [text], rng) for image, text in zip(images, texts, strict=True)]
        return {
            **self.processor(images=images, return_tensors="pt"),
            **self.processor.encode_captions(texts),
        }


@dataclass(kw_only=True)
class SelfCriticalCollator(WholeImageCollator):
    """Image-text rows → pixel_values (B, 3, H, W); input_ids (B, L) of `[CLS] prompt`; references, B lists of
    cleaned captions, what `SelfCriticalTrainer` compares its own captions with.

    max_references: captions of an image that count; of more as many are drawn.
    """

    max_references: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.max_references < 1:
            raise ValueError(f"max_references is {self.max_references}; give at least 1")

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        rng = self.batch_rng(rows)
        rows, images = self.load_images(rows)
        references = []
        for row in rows:
            texts = as_texts(row["caption"])
            if len(texts) > self.max_references:
                texts = rng.sample(texts, self.max_references) if self.train else texts[: self.max_references]
            where = row_name(row)
            references.append([self.choose_text(text, rng, where) for text in texts or [[]]])
        images = [
            self.augment_image(image, texts, rng) for image, texts in zip(images, references, strict=True)
        ]
        prompt = self.processor.encode_prompt()["input_ids"]
        return {
            **self.processor(images=images, return_tensors="pt"),
            "input_ids": prompt.repeat(len(rows), 1),
            "references": references,
        }
