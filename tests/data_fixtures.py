"""A tiny processor and rows for the tests of `hf_vlp.data`."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_vlp import XVLMImageProcessor, XVLMProcessor

WORDS = "a the red blue cat dog sit ##ting ##s left right of on mat box one two three leftover bright".split()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_processor(side: int = 64, patch_size: int = 16) -> XVLMProcessor:
    image_processor = XVLMImageProcessor(size={"height": side, "width": side})
    return XVLMProcessor(image_processor, tiny_tokenizer(), patch_size=patch_size)


def picture(seed: int = 0, width: int = 80, height: int = 60, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_text_rows(count: int) -> list[dict]:
    return [{"image": picture(i), "caption": ["a red cat", f"the dog {WORDS[i % 16]}"]} for i in range(count)]


def region_rows(count: int, regions: int = 3) -> list[dict]:
    boxes = [[5 + 10 * i, 6, 12, 20] for i in range(regions)]
    phrases = [[f"{WORDS[2 + i % 4]} cat", "the dog"] for i in range(regions)]
    return [
        {"image": picture(i), "phrases": phrases, "boxes": boxes, "caption": ["one mat"]}
        for i in range(count)
    ]
