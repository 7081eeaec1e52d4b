"""Does a model prefer a caption to a foil that differs from it in one word? Scored by the matching head."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .inference import batched, evaluating, number_of, to_model, visual_inputs, visual_of
from .metrics import foil_accuracy
from .pairs import read_images, read_texts, scores_pairs

DECIMALS = 5  # what float32 can tell apart; beyond it, equal texts differ by their place in the batch


@dataclass
class FoilResult:
    """Match logits (R,) of captions and foils, rounded to 5 decimals, and the share of captions that win."""

    caption_scores: Tensor
    foil_scores: Tensor
    accuracy: float


def evaluate_foils(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    batch_size: int = 32,
    progress: bool = False,
) -> FoilResult:
    """Score rows with `image`, `caption` and `foil`; both texts of an image share its keys and values.

    Raises:
        ValueError: no rows, or `batch_size` below 1.
    """
    scores = []
    with evaluating(model), tqdm(total=number_of(rows), desc="foils", disable=not progress) as bar:
        for batch in batched(rows, batch_size):
            images = visual_inputs(model, processor, [visual_of(row, processor) for row in batch]).repeated()
            texts = processor(
                text=[row[kind] for row in batch for kind in ("caption", "foil")], return_tensors="pt"
            )
            logits = _match(model, images, to_model(texts, model))
            scores.append(logits[:, 1].float().round(decimals=DECIMALS).view(len(batch), 2).cpu())
            bar.update(len(batch))
    if not scores:
        raise ValueError("rows is empty; give at least one row with `image`, `caption` and `foil`")
    caption_scores, foil_scores = torch.cat(scores).unbind(dim=1)
    return FoilResult(caption_scores, foil_scores, foil_accuracy(caption_scores, foil_scores))


def _match(model: PreTrainedModel, images: dict[str, Tensor], tokens: dict[str, Tensor]) -> Tensor:
    """Matching logits (2B, 2) of two texts for each of B images, next to one another."""
    mask = tokens["attention_mask"]
    if scores_pairs(model):
        image = torch.arange(len(mask), device=mask.device) // 2  # of each text
        return model.match(read_texts(model, tokens), mask, *read_images(model, images, image))
    image_embeds = model.get_image_features(**images).last_hidden_state
    text_embeds = model.get_text_features(**tokens).last_hidden_state  # (2B, L, D)
    return model.match(text_embeds, mask, model.project_image(image_embeds))
