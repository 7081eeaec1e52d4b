"""Features of images, texts and pairs, for other models and for search.

R: rows, P: projection width, D: text width.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .evaluation.inference import VisualInputs, batched, evaluating, to_model, visual_inputs
from .models.image_text import ImageTextModel
from .models.modeling_lxmert import LXMERTPreTrainedModel


def extract_features(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Iterable[Mapping[str, Any]], batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """Features of images, of texts, or of pairs; rows have all of them an image, all of them a text, or both.

    Yields:
        Of each row `image` and `text`, where it has them; from ALBEF and X-VLM `image_features` and
        `text_features`, the unit vectors (P,) that ITC compares; of pairs `features`, the state (D,) of the
        pair: [CLS] after the last layer, LXMERT's pooled.

    Raises:
        ValueError: an image or a text alone for LXMERT or SOHO, which have features of pairs only, rows
            without either, or `batch_size` below 1.
    """
    model = model.base_model
    for batch in batched(rows, batch_size):
        images = [row["image"] for row in batch if row["image"] is not None]
        texts = [row["text"] for row in batch if row["text"] is not None]
        alone = not (images and texts) and not isinstance(model, ImageTextModel)
        if alone or {len(images), len(texts)} - {0, len(batch)}:
            raise ValueError(
                f"{len(images)} images and {len(texts)} texts in {len(batch)} rows for "
                f"{type(model).__name__}; give every row both, or, for ALBEF and X-VLM, every row one of them"
            )
        with evaluating(model):
            visual = visual_inputs(model, processor, images) if images else None
            words = to_model(processor(text=texts, return_tensors="pt"), model) if texts else None
            read = _read_features if isinstance(model, ImageTextModel) else _read_pairs
            found = read(model, visual, words)
        found = {name: value.float().cpu().clone() for name, value in found.items()}
        for row, *values in zip(batch, *found.values(), strict=True):
            names = {"image": row["place"], "text": row["text"]}
            named = {name: value for name, value in names.items() if value is not None}
            yield named | dict(zip(found, values, strict=True))


def _read_features(model, visual: VisualInputs | None, words: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Unit vectors (R, P) of images and texts, states (R, D) of pairs."""
    found = {}
    if visual is not None:
        image = model.get_image_features(**visual.inputs)
        found["image_features"] = image.pooler_output[visual.index]
    if words is not None:
        text = model.get_text_features(**words)
        found["text_features"] = text.pooler_output
    if visual is not None and words is not None:
        key_values = model.image_concepts(image.last_hidden_state).select(visual.index).key_values
        mask = words["attention_mask"]
        found["features"] = model.fuse(text.last_hidden_state, mask, key_values, cls_only=True)[:, 0]
    return found


def _read_pairs(model, visual: VisualInputs, words: dict[str, Tensor]) -> dict[str, Tensor]:
    """States (R, D) of pairs."""
    output = model(**visual.inputs, **words, image_index=visual.index)
    pooled = output.pooler_output if isinstance(model, LXMERTPreTrainedModel) else None
    return {"features": output.last_hidden_state[:, 0] if pooled is None else pooled}
