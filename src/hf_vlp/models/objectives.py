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
        target = positives(ids, ids).to(logits.dtype)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def matching_loss(logits: Tensor, num_positive: int) -> Tensor:
    """Matching loss (ITM) of logits (M, 2) whose first `num_positive` rows match. X-VLM section 3."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[:num_positive] = 1
    return F.cross_entropy(logits.float(), labels)


def masked_lm_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """Masked language modelling loss of logits (M, V) at M labels, with soft labels of a teacher as in
    `distilled_cross_entropy`; 0 without any. ALBEF, X-VLM section 3."""
    losses = distilled_cross_entropy(logits, labels, teacher_logits, alpha)
    return losses.sum() / max(len(labels), 1)


def distilled_cross_entropy(
    logits: Tensor, target: Tensor, teacher_logits: Tensor | None, alpha: float
) -> Tensor:
    """Cross-entropy (M,) of logits (M, C) with the target and a teacher's softmax, weighed (1 - alpha) to
    alpha. ALBEF equations 6 and 7.

    `target` is (M,) classes, or (M, C) shares of them; without `teacher_logits` (M, C) it stands alone.
    """
    if teacher_logits is None or not alpha:
        return F.cross_entropy(logits.float(), target, reduction="none")
    mixed = alpha * teacher_logits.float().softmax(dim=1)
    if target.ndim == 1:
        share = mixed.new_full((len(target), 1), 1 - alpha)
        mixed = mixed.scatter_add(1, target[:, None], share)
    else:
        mixed = mixed + (1 - alpha) * target
    return F.cross_entropy(logits.float(), mixed, reduction="none")


def smoothed_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy (M,) of logits (M, V) with labels (M,) and with these smoothed, as the official X-VLM
    smooths: 1 - smoothing for the label, smoothing / V for each other word, a little less than 1 in all.
    """
    log_probabilities = logits.float().log_softmax(dim=1)
    plain = F.nll_loss(log_probabilities, labels, reduction="none")
    if not smoothing:
        return plain, plain
    share = smoothing / logits.shape[1]
    return plain, (1 - smoothing - share) * plain - share * log_probabilities.sum(dim=1)


def positives(ids: Tensor, other_ids: Tensor) -> Tensor:
    """For each of `ids` (B,) equal shares of those of `other_ids` (C,) that are the same: (B, C)."""
    same = (ids[:, None] == other_ids[None, :]).float()
    return same / same.sum(dim=1, keepdim=True)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of choosing among A classes, logits (B, A).

    Soft labels (B, A) in 0..1 are learnt each by itself: binary cross-entropy, summed over classes, the mean
    over rows, as the official VQA models of LXMERT and their like. Class ids (B,) give the cross-entropy, the
    mean over rows whose id is not -100; 0 without any.
    """
    if labels.ndim == 2:
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        return losses.sum(dim=1).mean()
    losses = F.cross_entropy(logits.float(), labels, reduction="sum")  # 0 at -100
    return losses / (labels != -100).sum().clamp(min=1)


def region_class_loss(logits: Tensor, labels: Tensor, scores: Tensor, total: Tensor) -> Tensor:
    """Cross-entropy of N regions (N, C) at labels (N,), each weighed by its score (N,), over `total` regions.
    LXMERT section 3.1."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * scores).sum() / total


def region_feature_loss(predicted: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """Smooth L1 loss of M features (M, F), the mean over F, over `total` regions. LXMERT section 3.1."""
    losses = F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(dim=1)
    return losses.sum() / total
