"""Images, texts and boxes for X-VLM, and its boxes back in pixels.

R: regions or texts, N: patches. Boxes in pixels are x, y, w, h (left, top, width, height).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

from .backbones import trunk_stride
from .boxes import patch_mask, relative_corners
from .image_processing_xvlm import XVLMImageProcessor
from .processing_image_text import ImageTextProcessor


class XVLMProcessor(ImageTextProcessor):
    """`ImageTextProcessor` for X-VLM, and the boxes of its regions.

    Args:
        image_processor: an `XVLMImageProcessor`.
        tokenizer: a fast tokenizer with [CLS], [SEP] and [MASK], or RoBERTa's `<s>`, `</s>` and `<mask>`; a
            copy of it is kept.
        max_words: words of a text that are read.
        max_tokens: tokens of a text that are read, [CLS] included.
        patch_size: side in pixels of the square that one image token stands for (32 for Swin at stride 32, 16
            for ViT-B/16).
        clean: see `ImageTextProcessor`.
    """

    image_processor_type = XVLMImageProcessor

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_words: int = 40,
        max_tokens: int = 40,
        patch_size: int = 32,
        clean: bool = True,
    ):
        self.patch_size = patch_size
        super().__init__(image_processor, tokenizer, max_words, max_tokens, clean)

    @classmethod
    def from_config(cls, config, tokenizer, **kwargs) -> "XVLMProcessor":
        """The processor that fits a model of `config` (an `XVLMConfig`) and its `tokenizer`.

        Raises:
            ValueError: the trunk tells no image size or stride, as timm's do not: build the processor by
            hand.
        """
        return super().from_config(config, tokenizer, patch_size=trunk_stride(config.vision_config), **kwargs)

    def encode_regions(
        self, boxes: Sequence[Tensor | Sequence], image_sizes: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Boxes of each image to what the models read of regions.

        Args:
            boxes: for each image its boxes (r, 4), x, y, w, h in pixels.
            image_sizes: (height, width) of each image in pixels.

        Returns:
            `region_image_index` (R,), `region_patch_mask` (R, N) of the patches each box touches, and
            `target_boxes` (R, 4) as cx, cy, w, h in 0..1.

        Raises:
            ValueError: a box that is empty, inverted, or reaches more than a pixel out of its image.
        """
        relative = relative_corners(boxes, image_sizes)
        counts = torch.tensor([len(some) for some in relative])
        corners = torch.cat(relative) if relative else torch.zeros(0, 4)
        return {
            "region_image_index": torch.repeat_interleave(torch.arange(len(counts)), counts),
            "region_patch_mask": patch_mask(corners, self.image_processor.size["height"] // self.patch_size),
            "target_boxes": box_convert(corners, "xyxy", "cxcywh"),
        }
