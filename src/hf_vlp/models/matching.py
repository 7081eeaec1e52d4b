"""Scores of every image with every text, for heads without features to compare (LXMERT, SOHO)."""

from collections.abc import Callable

import torch
from torch import Tensor


def match_all_pairs(
    match: Callable[[Tensor, Tensor], Tensor], images: Tensor, texts: Tensor, pairs_per_call: int
) -> Tensor:
    """Log-odds of a match (B, T) of images (B, ...) with texts (T, ...), `pairs_per_call` pairs at a time.

    `match` takes the places (M,) of images and of texts, and gives logits (M, 2), index 1 for a match.

    Raises:
        ValueError: `pairs_per_call` below 1.
    """
    if pairs_per_call < 1:
        raise ValueError(f"pairs_per_call is {pairs_per_call}; use a number of at least 1")
    pairs = torch.arange(len(images) * len(texts), device=texts.device)
    scores = []
    for chunk in pairs.split(pairs_per_call):
        logits = match(chunk // len(texts), chunk % len(texts)).float()
        scores.append(logits[:, 1] - logits[:, 0])
    return torch.cat(scores).view(len(images), len(texts))
