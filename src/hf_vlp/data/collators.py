"""Rows → batches: one callable class for each kind of batch that ALBEF and X-VLM train on (arXiv 2107.07651,
2111.08276). Those of questions, pairs of images and entailment are in `task_collators.py`, LXMERT's in
`lxmert_collators.py`.

Rows are those of `hf_vlp.data.readers`; an image may be a PIL image, a path, or the {"bytes", "path"} of an
undecoded column. With `train=True` images are augmented (unless `augment=False`), and of several captions or
phrases one is drawn; with `train=False` images stay whole, the first text is taken, and a batch is the same
each time.

Randomness: a batch has one `random.Random`. Its seed is the rows' "sample_seed" where they carry one, as
those of `MixedDataset` and `MixedStream` do (see `hf_vlp.data.mixing`): then a batch depends on seed and
position only, and a run resumed in the middle of an epoch repeats what the undisturbed run would have seen.
Without it the seed is drawn from torch's global generator, which a DataLoader gives another state in each
worker; such batches differ after a resume, because the Trainer restores that generator only after it has
fetched the first batches, and because skipped batches draw nothing.

Shape letters: B rows, n images, R region texts, N image patches, L text length.
"""

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedTokenizerBase

from ..images import BadImageError, image_name, load_image
from .masking import Masking, WholeWordMasking
from .transforms import (
    COLOUR_OPERATIONS,
    SHAPE_OPERATIONS,
    as_texts,
    box_keeping_crop,
    boxes_in_crop,
    check_boxes,
    flip_boxes,
    names_a_side,
    random_augment,
    random_resized_crop,
)

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Processor(Protocol):
    """What the collators ask of a processor; `XVLMProcessor` fits, and `ALBEFProcessor` where there are no
    boxes and no captions to write.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(
        self, *, images: Any = None, text: Any = None, return_tensors: str = "pt"
    ) -> dict[str, Tensor]: ...

    def clean_text(self, text: str) -> str: ...

    def encode_regions(self, boxes: Any, image_sizes: Any) -> dict[str, Tensor]: ...

    def encode_questions(self, questions: Any) -> dict[str, Tensor]: ...

    def encode_answers(self, answers: Any) -> dict[str, Tensor]: ...

    def encode_captions(self, captions: Any) -> dict[str, Tensor]: ...

    def encode_prompt(self) -> dict[str, Tensor]: ...


@dataclass(kw_only=True)
class Collator:
    """What the collators share: reading images, choosing and cleaning texts, the random numbers of a batch.

    train: texts and masks are drawn anew in each batch. on_bad_image: "raise" stops at an image that cannot
    be read; "skip" leaves the row out and logs its name, so the batch gets smaller.
    """

    processor: Processor
    train: bool = True
    on_bad_image: str = "raise"

    def __post_init__(self):
        if self.on_bad_image not in ("raise", "skip"):
            raise ValueError(f'on_bad_image is {self.on_bad_image!r}; give "raise" or "skip"')

    def batch_rng(self, rows: Sequence[Row]) -> random.Random:
        if not self.train:
            return random.Random(0)
        if "sample_seed" in rows[0]:
            return random.Random(rows[0]["sample_seed"])
        return random.Random(int(torch.randint(2**62, ())))

    def load_images(self, rows: Sequence[Row]) -> tuple[list[Row], list[Any]]:
        """The rows whose image could be read, and what `load_row` reads of them."""
        kept, images = [], []
        for row in rows:
            try:
                images.append(self.load_row(row))
                kept.append(row)
            except BadImageError as error:
                if self.on_bad_image == "raise":
                    raise
                logger.warning("row left out: %s", error)
        if not kept:
            raise ValueError(
                "no row of the batch has an image that can be read; repair the files named above"
            )
        return kept, images

    def load_row(self, row: Row) -> Image.Image:
        """The image of a row in RGB."""
        return load_image(row["image"])

    def choose_text(self, texts: Any, rng: random.Random, where: str) -> str:
        """One cleaned text out of a string or a list of alternatives: any one in training, else the first."""
        texts = as_texts(texts)
        if not texts:
            raise ValueError(f"{where} has no text; give a string or a list with at least one")
        text = rng.choice(texts) if self.train else texts[0]
        try:
            return self.processor.clean_text(text)
        except ValueError as error:
            raise ValueError(
                f"{where} has the text {text!r}, of which cleaning leaves nothing; {error}"
            ) from error


def row_name(row: Row) -> str:
    """What to call a row in a message: by its image, or where it has only regions, by its id or text."""
    if row.get("image") is not None:
        return f"the row of {image_name(row['image'])}"
    keys = ("image_id", "question_id", "question", "sentence", "caption", "text")
    named = (f"{key} {row[key]!r}" for key in keys if row.get(key) is not None)
    return f"the row of {next(named, 'no image')}"


@dataclass(kw_only=True)
class AugmentingCollator(Collator):
    """What the collators share that change images.

    augment: in training, images are cropped, mirrored and changed in colour; augment_operations: how many of
    RandomAugment's operations, 0 for none; official_sharpness: with the overflow of the official code (see
    `random_augment`).
    """

    augment: bool = True
    flip_probability: float = 0.5
    augment_operations: int = 2
    official_sharpness: bool = False

    @property
    def augments(self) -> bool:
        return self.train and self.augment

    def flips(self, texts: Sequence[str], rng: random.Random) -> bool:
        """Whether to mirror an image: never one whose texts say left or right."""
        return rng.random() < self.flip_probability and not names_a_side(texts)

    def random_augment(
        self, image: Image.Image, operations: Sequence[str], rng: random.Random
    ) -> Image.Image:
        return random_augment(image, operations, rng, self.augment_operations, self.official_sharpness)


@dataclass(kw_only=True)
class WholeImageCollator(AugmentingCollator):
    """What the collators of rows without boxes share: any part of an image may be cropped away.

    crop_scale: share of the area that the random crop keeps, None for no crop.
    """

    crop_scale: tuple[float, float] | None = (0.5, 1.0)

    def augment_image(self, image: Image.Image, texts: Sequence[str], rng: random.Random) -> Image.Image:
        """The image of these texts cropped, mirrored and changed, if the collator augments."""
        if not self.augments:
            return image
        if self.crop_scale is not None:
            image = image.crop(random_resized_crop(*image.size, rng, self.crop_scale))
        if self.flips(texts, rng):
            image = F.hflip(image)
        return self.random_augment(image, COLOUR_OPERATIONS + SHAPE_OPERATIONS, rng)

    def encode_pairs(
        self, rows: Sequence[Row], column: str, rng: random.Random
    ) -> tuple[list[Row], dict[str, Tensor]]:
        """The rows that stay, and pixel_values, input_ids, attention_mask of one image and one text of
        `column` for each of them.
        """
        rows, images = self.load_images(rows)
        texts = [self.choose_text(row[column], rng, row_name(row)) for row in rows]
        images = [self.augment_image(image, [text], rng) for image, text in zip(images, texts, strict=True)]
        return rows, dict(self.processor(images=images, text=texts, return_tensors="pt"))


@dataclass(kw_only=True)
class CaptionCollator(WholeImageCollator):
    """Image-text rows → pixel_values (B, 3, H, W), input_ids and attention_mask (B, L)."""

    crop_scale: tuple[float, float] | None = (0.2, 1.0)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return self.encode_pairs(rows, "caption", self.batch_rng(rows))[1]


@dataclass(kw_only=True)
class ImageTextCollator(CaptionCollator):
    """Image-text rows → image batch of pre-training: as `CaptionCollator`, and mlm_input_ids, mlm_labels
    (B, L).

    masking: default that of X-VLM's 4M recipe; ALBEF's is `TokenMasking(processor.tokenizer)`.
    """

    masking: Masking | None = None

    def __post_init__(self):
        super().__post_init__()
        self.masking = self.masking or WholeWordMasking(self.processor.tokenizer)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        _, batch = self.encode_pairs(rows, "caption", rng)
        return batch | self.masking(batch["input_ids"], batch["attention_mask"], rng)


@dataclass(kw_only=True)
class RetrievalCollator(WholeImageCollator):
    """Retrieval rows → pixel_values (B, 3, H, W), input_ids and attention_mask (B, L), image_ids (B,) int64.

    Rows with equal `image_id`, a string or an integer, get equal ids, the same ones in every process and run.
    Weakly supervised grounding trains on such rows with `crop_scale=None`, so that no object is cut off.
    group_equal_texts: equal texts get equal ids instead, whatever the image; short texts that name an object
    are true of many images, none of which is a negative then.
    """

    group_equal_texts: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rows, batch = self.encode_pairs(rows, "caption", self.batch_rng(rows))
        return batch | {"image_ids": text_ids(batch) if self.group_equal_texts else image_ids(rows)}


def image_ids(rows: Sequence[Row]) -> Tensor:
    """(B,) int64, equal for rows with equal `image_id`."""
    for row in rows:
        if row.get("image_id") is None:
            raise ValueError(f"{row_name(row)} has no image_id; add the column, equal for equal images")
    return torch.tensor([stable_id(row["image_id"]) for row in rows], dtype=torch.int64)


def text_ids(batch: dict[str, Tensor]) -> Tensor:
    """(B,) int64, equal for equal texts of input_ids and attention_mask (B, L)."""
    words = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return torch.tensor([stable_id(str(ids[mask].tolist())) for ids, mask in words], dtype=torch.int64)


def stable_id(image_id: str | int) -> int:
    """An integer as it is, a string hashed to 63 bits."""
    if isinstance(image_id, (int, np.integer)):
        return int(image_id)
    return int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(kw_only=True)
class RegionCollator(AugmentingCollator):
    """Region rows → region batch of pre-training: pixel_values (n, 3, H, W); R rows of input_ids,
    attention_mask, mlm_input_ids, mlm_labels (R, L), region_image_index (R,), region_patch_mask (R, N),
    target_boxes (R, 4) as cx, cy, w, h in 0..1, is_full_image (R,); image_ids (R,) with `group_equal_texts`.

    An image gives up to `max_regions` pairs of text and box. A caption of the whole image takes one of them,
    with all patches, the box (.5, .5, 1, 1) and is_full_image True. The pairs of all images are pooled, and
    if there are more than `max_pairs`, that many are sampled; fewer stay fewer. Images left without a pair
    are not in pixel_values. In training the crop keeps one box of the row whole, and boxes stay that are seen
    to more than `min_visible`. group_equal_texts: rows with the same text are no negatives of one another.
    """

    max_pairs: int = 128
    max_regions: int = 5
    min_visible: float = 0.5
    group_equal_texts: bool = False
    masking: Masking | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.max_pairs < 1 or self.max_regions < 1:
            raise ValueError(
                f"max_pairs is {self.max_pairs}, max_regions {self.max_regions}; give at least 1"
            )
        self.masking = self.masking or WholeWordMasking(self.processor.tokenizer)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        images, pairs = [], []  # a pair: (image index, box, text, is_full_image)
        for row, image in zip(*self.load_images(rows), strict=True):
            image, regions = self._regions(row, image, rng)
            pairs += [(len(images), *region) for region in regions]
            images.append(image)
        if len(pairs) > self.max_pairs:
            chosen = (
                sorted(rng.sample(range(len(pairs)), self.max_pairs)) if self.train else range(self.max_pairs)
            )
            pairs = [pairs[i] for i in chosen]
        return self._encode(images, pairs, rng)

    def _regions(
        self, row: Row, image: Image.Image, rng: random.Random
    ) -> tuple[Image.Image, list[tuple[np.ndarray, str, bool]]]:
        """The augmented image and its (box, text, is_full_image)."""
        where, phrases = row_name(row), row["phrases"]
        if len(phrases) == 0 or len(phrases) != len(row["boxes"]):
            raise ValueError(
                f"{where} has {len(phrases)} phrases and {len(row['boxes'])} boxes; give as many, at least 1"
            )
        boxes = check_boxes(row["boxes"], *image.size, where)
        captions, kept = as_texts(row.get("caption")), np.arange(len(boxes))
        if self.augments:
            texts = captions + [text for phrase in phrases for text in as_texts(phrase)]
            anchor = rng.randrange(len(boxes))
            image, boxes, kept = augment_boxes(self, image, boxes, anchor, texts, rng, self.min_visible)
        order = rng.sample(range(len(kept)), len(kept)) if self.train else range(len(kept))
        regions = []
        if captions:
            whole = np.array([0, 0, *image.size], dtype=np.float64)
            regions.append((whole, self.choose_text(captions, rng, where), True))
        for i in list(order)[: self.max_regions - len(regions)]:
            regions.append((boxes[i], self.choose_text(phrases[kept[i]], rng, where), False))
        return image, regions

    def _encode(
        self, images: list[Image.Image], pairs: list[tuple[int, np.ndarray, str, bool]], rng: random.Random
    ) -> dict[str, Tensor]:
        used = sorted({index for index, *_ in pairs})
        images = [images[index] for index in used]
        boxes = [np.stack([box for i, box, *_ in pairs if i == index]) for index in used]
        texts = [text for _, _, text, _ in pairs]
        batch = dict(self.processor(images=images, text=texts, return_tensors="pt"))
        batch |= self.processor.encode_regions(boxes, [(image.height, image.width) for image in images])
        batch |= self.masking(batch["input_ids"], batch["attention_mask"], rng)
        batch["is_full_image"] = torch.tensor([is_full for *_, is_full in pairs])  # (R,)
        if self.group_equal_texts:
            number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            batch["image_ids"] = torch.tensor([number[text] for text in texts])  # (R,)
        return batch


@dataclass(kw_only=True)
class RegionGroundingCollator(RegionCollator):
    """Region rows → grounding batch of several texts per image, as in the domain pretraining before RefCOCO+:
    pixel_values (n, 3, H, W); input_ids, attention_mask (R, L), target_boxes (R, 4), region_image_index (R,).

    Captions of whole images are left out, regions chosen as by `RegionCollator`. The paper's step keeps 24 of
    9 images.
    """

    def _regions(
        self, row: Row, image: Image.Image, rng: random.Random
    ) -> tuple[Image.Image, list[tuple[np.ndarray, str, bool]]]:
        return super()._regions({**row, "caption": None}, image, rng)

    def _encode(
        self, images: list[Image.Image], pairs: list[tuple[int, np.ndarray, str, bool]], rng: random.Random
    ) -> dict[str, Tensor]:
        batch = super()._encode(images, pairs, rng)
        names = ("pixel_values", "input_ids", "attention_mask", "target_boxes", "region_image_index")
        return {name: batch[name] for name in names}


@dataclass(kw_only=True)
class GroundingCollator(AugmentingCollator):
    """Grounding rows → pixel_values (B, 3, H, W), input_ids and attention_mask (B, L), target_boxes (B, 4) as
    cx, cy, w, h in 0..1 of the image as it is in pixel_values.

    In training the crop keeps the box whole, and no image is mirrored whose text says left or right.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rng = self.batch_rng(rows)
        rows, images = self.load_images(rows)
        texts, boxes = [], []
        for i, row in enumerate(rows):
            texts.append(self.choose_text(row["text"], rng, row_name(row)))
            box = row_box(row, *images[i].size)
            if self.augments:
                images[i], box, _ = augment_boxes(self, images[i], box, 0, [texts[i]], rng)
            boxes.append(box)
        batch = dict(self.processor(images=images, text=texts, return_tensors="pt"))
        sizes = [(image.height, image.width) for image in images]
        return batch | {"target_boxes": self.processor.encode_regions(boxes, sizes)["target_boxes"]}


def row_box(row: Row, width: int, height: int) -> np.ndarray:
    """The one box (1, 4) of a grounding row, x, y, w, h in pixels."""
    box = check_boxes(row["box"], width, height, row_name(row))
    if len(box) != 1:
        raise ValueError(f"{row_name(row)} has {len(box)} boxes; a grounding row has one box [x, y, w, h]")
    return box


def augment_boxes(
    collator: RegionCollator | GroundingCollator,
    image: Image.Image,
    boxes: np.ndarray,
    anchor: int,
    texts: Sequence[str],
    rng: random.Random,
    min_visible: float = 0.5,
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Crop around box `anchor`, mirror, change colours → (image, boxes that stay in its pixels, their
    indices).
    """
    crop = box_keeping_crop(*image.size, boxes[anchor], rng)
    kept, boxes = boxes_in_crop(boxes, crop, min_visible)
    image = image.crop(crop)
    if collator.flips(texts, rng):
        image, boxes = F.hflip(image), flip_boxes(boxes, image.width)
    return collator.random_augment(image, COLOUR_OPERATIONS, rng), boxes, kept
