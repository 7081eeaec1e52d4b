"""Captions of images, scored by what people wrote about them. X-VLM section 4.

Rows hold `image` and, where known, `caption`: a string, or a list of them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .caption_metrics import caption_metrics
from .inference import batched, evaluating, number_of, visual_inputs, visual_of


@dataclass
class CaptioningResult:
    """The `captions` of the rows in their order, and their `metrics` (`caption_metrics`), None for rows
    without captions."""

    captions: list[str]
    metrics: dict[str, float] | None


def evaluate_captioning(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    num_beams: int = 3,
    max_length: int = 20,
    min_length: int = 5,
    batch_size: int = 32,
    progress: bool = False,
) -> CaptioningResult:
    """Write a caption of each row's image, and compare it with the row's own.

    Args:
        num_beams: beams among which the official rule chooses; 1 for the most probable word each time.
        max_length: tokens of a caption, [CLS] and prompt included.
        min_length: tokens, likewise, before which no caption ends.
        batch_size: images at a time.
        progress: show a bar.

    Raises:
        ValueError: no rows, captions of some rows only, or a number below 1.
    """
    captions, references = [], []
    with evaluating(model), tqdm(total=number_of(rows), desc="captions", disable=not progress) as bar:
        for batch in batched(rows, batch_size):
            images = [visual_of(row, processor) for row in batch]
            captions += write_captions(model, processor, images, num_beams, max_length, min_length)
            references += [row_captions(row) for row in batch]
            bar.update(len(batch))
    if not captions:
        raise ValueError("rows is empty; give at least one row with `image`")
    if not any(references):
        return CaptioningResult(captions, None)
    if not all(references):
        raise ValueError(
            f"{sum(not texts for texts in references)} of {len(references)} rows have no caption; give "
            "captions to all rows or to none"
        )
    return CaptioningResult(captions, caption_metrics(captions, references))


def write_captions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    num_beams: int = 3,
    max_length: int = 20,
    min_length: int = 5,
    prompt: str | None = None,
) -> list[str]:
    """A caption of each image, equal ones read once, as the official code decodes; `prompt` in place of the
    processor's.

    Raises:
        ValueError: `num_beams` below 1.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams is {num_beams}; use a number of beams of at least 1")
    visual = visual_inputs(model, processor, images)
    ids = model.generate(
        **visual.inputs,
        input_ids=processor.encode_prompt(prompt)["input_ids"].to(model.device),
        num_beams=num_beams,
        max_length=max_length,
        min_length=min_length,
        official_length=num_beams > 1,
    )
    return processor.decode_captions(ids[visual.index], prompt)


def row_captions(row: dict) -> list[str]:
    """The captions of a row, none if it has none."""
    captions = row.get("caption")
    return [captions] if isinstance(captions, str) else list(captions or [])


def majority_caption_metrics(rows: Iterable[dict]) -> dict[str, float]:
    """Metrics of who writes one caption under all images: the most frequent of these rows."""
    references = [row_captions(row) for row in rows]
    (caption, _), *_ = Counter(text for texts in references for text in texts).most_common(1)
    return caption_metrics([caption] * len(references), references)
