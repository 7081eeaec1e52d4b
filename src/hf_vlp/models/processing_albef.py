"""Images and texts for ALBEF, and proposals ranked by its heat maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_processing_albef import ALBEFImageProcessor
from .processing_image_text import ImageTextProcessor


class ALBEFProcessor(ImageTextProcessor):
    """`ImageTextProcessor` for ALBEF. Pretraining read 25 tokens of each text, fine-tuning 30.

    Args:
        image_processor: an `ALBEFImageProcessor`.
        tokenizer: a fast BERT-like tokenizer; a copy of it is kept.
        max_words: words of a text that are read.
        max_tokens: tokens of a text that are read, [CLS] included.
        clean: see `ImageTextProcessor`.
    """

    image_processor_type = ALBEFImageProcessor

    def rank_proposals(
        self,
        heatmaps: Tensor,
        proposals: Sequence[Tensor | Sequence],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Score the proposals of each text by its heat map: what a box holds of it over the root of its area.

        Args:
            heatmaps: (R, grid, grid).
            proposals: for each text boxes (n, 4), x, y, w, h in pixels.
            image_sizes: (height, width) of the image of each text in pixels.

        Returns:
            Scores (n,) of each text, the best proposal highest.

        Raises:
            ValueError: the numbers of maps, lists and sizes differ, or a box has no area.
        """
        if not len(heatmaps) == len(proposals) == len(image_sizes):
            raise ValueError(
                f"heatmaps has {len(heatmaps)} maps, proposals {len(proposals)} lists and image_sizes "
                f"{len(image_sizes)}; give one of each per text"
            )
        return [
            _proposal_scores(*one) for one in zip(heatmaps.float().cpu(), proposals, image_sizes, strict=True)
        ]


def _proposal_scores(heatmap: Tensor, proposals: Tensor | Sequence, image_size: tuple[int, int]) -> Tensor:
    boxes = torch.as_tensor(proposals, dtype=torch.double).view(-1, 4)
    if bool((boxes[:, 2:] <= 0).any()):
        raise ValueError(
            f"proposals holds a box without area: {boxes.tolist()}; give x, y, w, h with w, h > 0"
        )
    height, width = image_size
    pixels = F.interpolate(heatmap[None, None], size=image_size, mode="bicubic", align_corners=False)[0, 0]
    sums = F.pad(pixels.double().cumsum(0).cumsum(1), (1, 0, 1, 0))  # of all pixels above and left
    # whole pixels, as the official code cuts them
    left, right = (edge.long().clamp(0, width) for edge in (boxes[:, 0], boxes[:, 0] + boxes[:, 2]))
    top, bottom = (edge.long().clamp(0, height) for edge in (boxes[:, 1], boxes[:, 1] + boxes[:, 3]))
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return (inside / boxes[:, 2:].prod(dim=1).sqrt()).float()
