"""Hard negatives for image-text matching, drawn by contrastive similarity. B: pairs."""

import torch
from torch import Tensor


@torch.no_grad()
def hard_negatives(
    logits: Tensor, ids: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """For each text one image and for each image one text that do not belong to it. X-VLM section 3.

    `logits` (B, B) are contrastive logits, images in rows. Pairs with equal `ids` (B,) are never negatives of
    one another. Returns the index of the image for each text and of the text for each image, both (B,).

    Raises:
        ValueError: there are fewer than two pairs, or all ids are equal, so that no negative exists.
    """
    if ids is None:
        ids = torch.arange(len(logits), device=logits.device)
    if len(logits) < 2 or bool((ids == ids[0]).all()):
        raise ValueError(
            f"image-text matching got a batch of {len(logits)} pair(s) of one and the same image and has no "
            "negatives; use batches with at least two different images (dataloader_drop_last=True drops a "
            "last batch of one)"
        )
    same = ids[:, None] == ids[None, :]
    text_for_image = _draw(logits, same, generator)
    image_for_text = _draw(logits.T, same, generator)
    return image_for_text, text_for_image


def _draw(logits: Tensor, forbidden: Tensor, generator: torch.Generator | None) -> Tensor:
    weights = (logits.float().softmax(dim=1) + 1e-5).masked_fill(forbidden, 0.0)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)  # (B,)
