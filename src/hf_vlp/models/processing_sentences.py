"""Texts read as they are written, and boxes to and from pixels, for processors of images or regions.

T: texts, L: text length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .boxes import boxes_in_pixels, relative_corners
from .hub import SharedOnHub


class SentenceProcessor(SharedOnHub, ProcessorMixin):
    """What LXMERT's and SOHO's processors share: texts are read as `[CLS] words [SEP]`.

    A class that derives from it sets `max_tokens`, and gives it a tokenizer that puts these around a text.
    """

    _auto_class = "AutoProcessor"

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def clean_text(self, text: str) -> str:
        """A text without spaces around it.

        Raises:
            ValueError: nothing is left.
        """
        if not text.strip():
            raise ValueError(f"text={text!r} has no word; give a text with words")
        return text.strip()

    def encode_questions(self, questions: Sequence[str], **kwargs) -> BatchFeature:
        """Questions to `input_ids` and `attention_mask` (T, L); `kwargs` go to the tokenizer."""
        return self._encode(questions, **kwargs)

    def encode_regions(
        self, boxes: Sequence[Tensor | Sequence], image_sizes: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Boxes of each image, (r, 4) x, y, w, h in pixels, to `target_boxes` (T, 4) cx, cy, w, h in 0..1.

        `image_sizes` holds (height, width) of each image.

        Raises:
            ValueError: a box that is empty, inverted, or reaches more than a pixel out of its image.
        """
        corners = torch.cat(relative_corners(boxes, image_sizes))
        return {"target_boxes": box_convert(corners, "xyxy", "cxcywh")}

    def post_process_boxes(self, pred_boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Boxes (T, 4) cx, cy, w, h in 0..1 to left, top, right, bottom in pixels of the original images.

        `image_sizes` holds (height, width) of the image of each box; boxes are clipped to it.
        """
        return boxes_in_pixels(pred_boxes, image_sizes)

    def _encode(self, texts: Sequence[str], return_tensors: str = "pt", **kwargs) -> BatchFeature:
        settings = {"padding": True, "truncation": True, "max_length": self.max_tokens, **kwargs}
        settings.update(return_token_type_ids=False, return_tensors=return_tensors)
        return self.tokenizer([self.clean_text(text) for text in texts], **settings)
