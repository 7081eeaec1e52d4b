"""Training objectives as functions of tensors. B: image-text pairs, P: projection width, V: vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_logits(image_features: Tensor, text_features: Tensor, temperature: Tensor) -> Tensor:
    """Cosines of unit vectors over the temperature: (B, P), (C, P) -> (B, C), in float32 under autocast."""
    with torch.autocast(image_features.device.type, enabled=False):
        return image_features.float() @ text_features.float().T / temperature.float()


def contrastive_loss(logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """Image-text contrastive loss (ITC) of logits (B, B), the mean of both directions. X-VLM section 3.

    Pair i is the positive of row i; where `ids` (B,) are given, all pairs with the same id share the target
    equally.
    """
    if ids is None:
        target = torch.arange(len(logits), device=logits.device)
    else:
        target = (ids[:, None] == ids[None, :]).to(logits.dtype)
        target = target / target.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def matching_loss(logits: Tensor, num_positive: int) -> Tensor:
    """Matching loss (ITM) of logits (M, 2) whose first `num_positive` rows match. X-VLM section 3."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[:num_positive] = 1
    return F.cross_entropy(logits.float(), labels)


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Masked language modelling loss of logits (M, V) at M labels; 0 without any. X-VLM section 3."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)
