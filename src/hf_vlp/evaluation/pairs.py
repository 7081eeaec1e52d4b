"""Heads without features to compare, LXMERT's and SOHO's: every pair of an image and a text passes the
transformer.

B: images, T: texts, L: text length.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..models.modeling_soho_tasks import SOHOForRetrieval


def scores_pairs(model: PreTrainedModel) -> bool:
    """Whether this is such a head."""
    return hasattr(model, "score_pairs")


def read_texts(model: PreTrainedModel, tokens: dict[str, Tensor]) -> Tensor:
    """What `match` and `score_pairs` take of texts before their mask: states of words (T, L, D), or their ids
    (T, L), which SOHO reads only beside an image."""
    if isinstance(model, SOHOForRetrieval):
        return tokens["input_ids"]
    return model.get_text_features(**tokens).last_hidden_state


def read_images(
    model: PreTrainedModel, inputs: dict[str, Tensor], index: Tensor | slice = slice(None)
) -> tuple[Any, ...]:
    """What `match` and `score_pairs` take of B images after the mask, in the order of `index`."""
    output = model.get_image_features(**inputs)
    if isinstance(model, SOHOForRetrieval):
        return (output.select(index),)
    return output.last_hidden_state[index], inputs["visual_attention_mask"][index]
