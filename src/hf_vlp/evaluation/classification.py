"""Choosing a label: visual entailment (SNLI-VE), reasoning over two images (NLVR2), the honest baseline.

ALBEF section 5. R: rows, C: classes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .inference import batched, evaluating, number_of, to_model, visual_inputs, visual_of
from .metrics import label_accuracy, require_no_nan, sentence_consistency


@dataclass
class EntailmentResult:
    """`logits` (R, C) in float32 on the CPU, and the share of rows whose label has the highest."""

    logits: Tensor
    accuracy: float


@dataclass
class ReasoningResult:
    """`logits` (R, 2) in float32 on the CPU, the share of right rows, and of sentences right in all rows."""

    logits: Tensor
    accuracy: float
    consistency: float


def evaluate_entailment(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    batch_size: int = 32,
    progress: bool = False,
) -> EntailmentResult:
    """Label rows with `image` and `sentence`, and compare with `label` (0..C-1, in the model's order).

    Rows of a batch that show the same image share its pass.

    Raises:
        ValueError: no rows, a label outside the classes, or `batch_size` below 1.
    """
    logits, labels = [], []
    with evaluating(model), tqdm(total=number_of(rows), desc="entailment", disable=not progress) as bar:
        for batch in batched(rows, batch_size):
            visual = visual_inputs(model, processor, [visual_of(row, processor) for row in batch])
            texts = to_model(processor(text=[row["sentence"] for row in batch], return_tensors="pt"), model)
            logits.append(model(**visual.inputs, **texts, image_index=visual.index).logits.float().cpu())
            labels += [int(row["label"]) for row in batch]
            bar.update(len(batch))
    if not labels:
        raise ValueError("rows is empty; give at least one row with `image`, `sentence` and `label`")
    logits = torch.cat(logits)
    return EntailmentResult(logits, _accuracy(logits, labels))


def evaluate_reasoning(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    batch_size: int = 32,
    progress: bool = False,
) -> ReasoningResult:
    """Is the row's `sentence` true of its two `images`? Compared with `label`, 1 or True where it is.

    A sentence of NLVR2 is asked of up to four pairs. Consistency is the share of sentences that are judged
    right on all their pairs; `identifier` ("dev-850-0-1": split, set, pair, sentence) without its pair says
    which rows belong together, in rows that lack one the sentence itself.

    Raises:
        ValueError: no rows, a row without two images, a label that is not 0 or 1, an identifier that does not
        have four parts, or `batch_size` below 1.
    """
    logits, labels, sentences = [], [], []
    with evaluating(model), tqdm(total=number_of(rows), desc="reasoning", disable=not progress) as bar:
        for batch in batched(rows, batch_size):
            pairs = [_pair(row, processor, len(labels) + i) for i, row in enumerate(batch)]
            sentences += [_sentence_of(row, len(labels) + i) for i, row in enumerate(batch)]
            inputs = pair_inputs(model, processor, pairs, [row["sentence"] for row in batch])
            logits.append(model(**inputs).logits.float().cpu())
            labels += [int(row["label"]) for row in batch]
            bar.update(len(batch))
    if not labels:
        raise ValueError("rows is empty; give at least one row with `images`, `sentence` and `label`")
    logits = torch.cat(logits)
    accuracy = _accuracy(logits, labels)
    return ReasoningResult(logits, accuracy, sentence_consistency(logits.argmax(dim=1), labels, sentences))


def pair_inputs(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: Sequence[Sequence], texts: Sequence[str]
) -> dict[str, Tensor]:
    """B texts and two images, or region rows, for each, as heads for reasoning take them: (B, 2, ...)."""
    visual = visual_inputs(model, processor, [image for pair in pairs for image in pair])
    images = {name: value.unflatten(0, (len(pairs), 2)) for name, value in visual.repeated().items()}
    return images | to_model(processor(text=list(texts), return_tensors="pt"), model)


def majority_label_accuracy(rows: Iterable[dict]) -> float:
    """Accuracy of always the same label, the most frequent of `rows`; compare every accuracy with it.

    Raises:
        ValueError: no rows.
    """
    counts = Counter(int(row["label"]) for row in rows)
    if not counts:
        raise ValueError("rows is empty; give at least one row with `label`")
    return max(counts.values()) / counts.total()


def _accuracy(logits: Tensor, labels: list[int]) -> float:
    require_no_nan("logits", logits)
    for row, label in enumerate(labels):
        if not 0 <= label < logits.shape[1]:
            raise ValueError(
                f"rows[{row}] has label {label}; give 0..{logits.shape[1] - 1}, and leave out unlabelled rows"
            )
    return label_accuracy(logits.argmax(dim=1), labels)


def _pair(row: dict, processor: ProcessorMixin, index: int) -> Sequence:
    """The two images of a row, or their regions."""
    pair = visual_of(row, processor, "images")
    if len(pair) != 2:
        name = "images" if pair is row.get("images") else "regions"
        raise ValueError(
            f"rows[{index}] has {len(pair)} `{name}`; give those of the left and the right image"
        )
    return pair


def _sentence_of(row: dict, index: int) -> str | tuple[str, ...]:
    """What rows of one sentence have in common."""
    if not row.get("identifier"):
        return row["sentence"]
    parts = row["identifier"].split("-")
    if len(parts) != 4:
        raise ValueError(
            f"rows[{index}] has identifier {row['identifier']!r}; give split-set-pair-sentence as NLVR2 "
            "does, or none"
        )
    split, image_set, _, sentence = parts
    return split, image_set, sentence
