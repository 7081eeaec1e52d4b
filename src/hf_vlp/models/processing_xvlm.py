"""Images, texts and boxes for X-VLM, and its boxes back in pixels.

R: regions or texts, N: patches, L: text length. Boxes in pixels are x, y, w, h (left, top, width, height).
"""

import copy
import re
from collections.abc import Sequence

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .backbones import trunk_image_size, trunk_stride
from .boxes import patch_mask
from .image_processing_xvlm import XVLMImageProcessor

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


class XVLMProcessor(ProcessorMixin):
    """Image processor and tokenizer of X-VLM.

    Texts are cleaned and read as `[CLS] words`, without [SEP], as the released weights were trained.

    Args:
        image_processor: an `XVLMImageProcessor`.
        tokenizer: a fast BERT-like tokenizer; a copy of it is kept.
        max_words: words of a text that are read.
        max_tokens: tokens of a text that are read, [CLS] included.
        patch_size: side in pixels of the square that one image token stands for (32 for Swin at stride 32, 16
            for ViT-B/16).
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_words: int = 40,
        max_tokens: int = 40,
        patch_size: int = 32,
    ):
        self.max_words = max_words
        self.max_tokens = max_tokens
        self.patch_size = patch_size
        super().__init__(image_processor, _cls_only(tokenizer))

    @classmethod
    def from_config(cls, config, tokenizer, **kwargs) -> "XVLMProcessor":
        """The processor that fits a model of `config` (an `XVLMConfig`) and its `tokenizer`.

        Raises:
            ValueError: the trunk tells no image size or stride, as timm's do not: build the processor by
            hand.
        """
        size = trunk_image_size(config.vision_config)
        if size is None:
            raise ValueError(
                f"vision_config of type {config.vision_config.model_type} tells no image size; use "
                f"XVLMProcessor(...)"
            )
        image_processor = XVLMImageProcessor(size={"height": size, "width": size})
        return cls(image_processor, tokenizer, patch_size=trunk_stride(config.vision_config), **kwargs)

    @classmethod
    def from_pretrained(cls, *args, image_size: int | None = None, **kwargs) -> "XVLMProcessor":
        """Load as in transformers; `image_size` (pixels) as in `from_pretrained` of the models."""
        if image_size is not None:
            kwargs["size"] = {"height": image_size, "width": image_size}
        return super().from_pretrained(*args, **kwargs)

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
            `pixel_values` (B, 3, size, size), `input_ids` and `attention_mask` (R, L), padded to the longest
            text.

        Raises:
            ValueError: neither images nor text, or a text with nothing left after cleaning.
        """
        if images is None and text is None:
            raise ValueError("images and text are both None; give images, texts, or both")
        batch = BatchFeature()
        if images is not None:
            batch.update(self.image_processor(images, return_tensors=return_tensors))
        if text is not None:
            texts = [self.clean_text(one) for one in ([text] if isinstance(text, str) else text)]
            settings = {"padding": True, "truncation": True, "max_length": self.max_tokens, **kwargs}
            settings.update(return_token_type_ids=False, return_tensors=return_tensors)
            batch.update(self.tokenizer(texts, **settings))
        return batch

    def clean_text(self, text: str) -> str:
        """Lower case, without punctuation, dashes and slashes as spaces, at most `max_words` words.

        Raises:
            ValueError: nothing is left.
        """
        cleaned = (
            _DELETED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
        )
        cleaned = _SPACES.sub(" ", cleaned).strip()
        if not cleaned:
            raise ValueError(f"text={text!r} has no word left after cleaning; give a text with words")
        return " ".join(cleaned.split(" ")[: self.max_words])

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
        if len(boxes) != len(image_sizes):
            raise ValueError(
                f"boxes are given for {len(boxes)} images and image_sizes for {len(image_sizes)}; give both"
            )
        relative = [
            _relative_boxes(some, size, i)
            for i, (some, size) in enumerate(zip(boxes, image_sizes, strict=True))
        ]
        counts = torch.tensor([len(some) for some in relative])
        corners = torch.cat(relative) if relative else torch.zeros(0, 4)
        return {
            "region_image_index": torch.repeat_interleave(torch.arange(len(counts)), counts),
            "region_patch_mask": patch_mask(corners, self.image_processor.size["height"] // self.patch_size),
            "target_boxes": box_convert(corners, "xyxy", "cxcywh"),
        }

    def post_process_boxes(self, pred_boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Boxes (R, 4) cx, cy, w, h in 0..1 to left, top, right, bottom in pixels of the original images.

        `image_sizes` holds (height, width) of the image of each box; boxes are clipped to it.
        """
        if len(pred_boxes) != len(image_sizes):
            raise ValueError(
                f"pred_boxes has {len(pred_boxes)} boxes and image_sizes {len(image_sizes)}; give one each"
            )
        corners = box_convert(pred_boxes.detach().float().cpu(), "cxcywh", "xyxy")
        return torch.stack(
            [
                clip_boxes_to_image(box * torch.tensor([width, height, width, height]), (height, width))
                for box, (height, width) in zip(corners, image_sizes, strict=True)
            ]
        )


def _cls_only(tokenizer):
    if tokenizer is None:
        return None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.cls_token} $A", special_tokens=[(tokenizer.cls_token, tokenizer.cls_token_id)]
    )
    return tokenizer


def _relative_boxes(boxes: Tensor | Sequence, image_size: tuple[int, int], image: int) -> Tensor:
    """Pixels x, y, w, h (r, 4) to corners relative to the image."""
    height, width = image_size
    boxes = torch.as_tensor(boxes, dtype=torch.float).reshape(-1, 4)
    corners = box_convert(boxes, "xywh", "xyxy")
    size = torch.tensor([width, height, width, height], dtype=torch.float)
    bad = (boxes[:, 2:] <= 0).any(dim=1) | (corners < -1).any(dim=1) | (corners > size + 1).any(dim=1)
    if bad.any():
        raise ValueError(
            f"boxes of image {image} hold {boxes[bad][0].tolist()}, which does not lie in its {width} x "
            f"{height} pixels; give x, y, w, h in pixels with w, h > 0, clipped to the image"
        )
    return (corners / size).clamp(0, 1)
