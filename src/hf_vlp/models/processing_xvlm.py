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
        prompt: what captions begin with, "" for nothing, as in the domain pretraining.
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
        prompt: str = "a picture of",
        clean: bool = True,
    ):
        self.patch_size = patch_size
        self.prompt = prompt
        super().__init__(image_processor, tokenizer, max_words, max_tokens, clean)

    @classmethod
    def from_config(cls, config, tokenizer, **kwargs) -> "XVLMProcessor":
        """The processor that fits a model of `config` (an `XVLMConfig`) and its `tokenizer`.

        Raises:
            ValueError: the trunk tells no image size or stride, as timm's do not: build the processor by
            hand.
        """
        return super().from_config(config, tokenizer, patch_size=trunk_stride(config.vision_config), **kwargs)

    def encode_prompt(self, prompt: str | None = None) -> dict[str, Tensor]:
        """What `generate` of a captioning model goes on from: `input_ids` (1, L), `[CLS] prompt`."""
        prompt = self.prompt if prompt is None else prompt
        return {"input_ids": self.tokenizer([prompt], return_tensors="pt").input_ids}

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions, uncleaned, to what a captioning model learns from.

        Returns:
            `input_ids` and `attention_mask` (R, L), `[CLS] prompt words [SEP]`, and `labels` (R, L), the ids
            of words and [SEP], -100 for [CLS], prompt and padding.

        Raises:
            ValueError: a caption without a word, or no caption.
        """
        empty = [caption for caption in captions if not str(caption).strip()]
        if empty or not len(captions):
            raise ValueError(
                f"captions holds {empty[0]!r}" if empty else "captions is empty; give at least one"
            )
        texts = [f"{self.prompt} {caption}".strip() for caption in captions]
        words = self.tokenizer(texts, truncation=True, max_length=self.max_tokens - 1)["input_ids"]
        ended = [{"input_ids": [*ids, self.tokenizer.sep_token_id]} for ids in words]
        batch = self.tokenizer.pad(ended, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : self.encode_prompt()["input_ids"].shape[1]] = -100
        return {**batch, "labels": labels}

    def decode_captions(self, ids: Tensor, prompt: str | None = None) -> list[str]:
        """Captions (R, L) back to text, up to the first [SEP], without the prompt."""
        prompt = self.tokenizer.decode(self.encode_prompt(prompt)["input_ids"][0, 1:])
        return [text.removeprefix(prompt).strip() for text in self.decode_answers(ids)]

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
