"""Images and texts for SOHO, and boxes back in pixels.

B: images, T: texts, L: text length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import BatchFeature, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin

from .boxes import boxes_in_pixels, relative_corners
from .image_processing_soho import SOHOImageProcessor
from .tokens import with_special_tokens


class SOHOProcessor(ProcessorMixin):
    """Image processor and tokenizer.

    Texts are read as `[CLS] words [SEP]`, at most `max_tokens` in all, 16 in the paper.

    Args:
        image_processor: a `SOHOImageProcessor`.
        tokenizer: a fast BERT-like tokenizer; a copy of it is kept.
        max_tokens: tokens of a text that are read, [CLS] and [SEP] included.
    """

    _auto_class = "AutoProcessor"

    def __init__(self, image_processor=None, tokenizer=None, max_tokens: int = 16):
        self.max_tokens = max_tokens
        super().__init__(image_processor, with_special_tokens(tokenizer, ends_in_sep=True))

    @classmethod
    def from_config(cls, config: PreTrainedConfig, tokenizer, **kwargs) -> "SOHOProcessor":
        """The paper's images and a `tokenizer`; nothing of it depends on the model."""
        return cls(SOHOImageProcessor(), tokenizer, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def __call__(
        self, images=None, text: str | Sequence[str] | None = None, return_tensors: str = "pt", **kwargs
    ) -> BatchFeature:
        """Prepare images, texts, or both.

        Args:
            images: a PIL image or array, or a list of them, of any size.
            text: a text or a list of texts.
            return_tensors: as in transformers.
            kwargs: passed to the tokenizer (`padding`, `pad_to_multiple_of`, ...).

        Returns:
            `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W), `input_ids` and `attention_mask` (T, L),
            padded to the largest image and to the longest text.

        Raises:
            ValueError: neither images nor text, or an empty text.
        """
        if images is None and text is None:
            raise ValueError("images and text are both None; give images, texts, or both")
        batch = BatchFeature()
        if images is not None:
            batch.update(self.image_processor(images, return_tensors=return_tensors))
        if text is not None:
            batch.update(self._encode([text] if isinstance(text, str) else text, return_tensors, **kwargs))
        return batch

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
