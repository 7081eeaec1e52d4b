"""Texts for LXMERT and the regions of images, extracted or given, and boxes back in pixels.

B: images, T: texts, R: regions of an image, L: text length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig

from .processing_sentences import SentenceProcessor
from .region_extractors import load_extractor
from .regions import RegionExtractor, Regions, stack_regions
from .tokens import with_special_tokens


class LXMERTProcessor(SentenceProcessor):
    """Tokenizer, and the extractor that finds regions in images.

    Texts are read as `[CLS] words [SEP]`, at most `max_tokens` in all, 20 in the paper.

    Args:
        tokenizer: a fast BERT-like tokenizer; a copy of it is kept.
        extractor: what finds regions, or what `load_extractor` takes to load it: the name or folder of a
            detector, `grid:NAME`, `torchvision:NAME`. It is loaded when the first image comes; None if
            regions are always given.
        max_tokens: tokens of a text that are read, [CLS] and [SEP] included.
    """

    def __init__(self, tokenizer=None, extractor: str | RegionExtractor | None = None, max_tokens: int = 20):
        self.max_tokens = max_tokens
        self.extractor = extractor
        super().__init__(with_special_tokens(tokenizer, ends_in_sep=True))

    @classmethod
    def from_config(cls, config: PreTrainedConfig, tokenizer, **kwargs) -> "LXMERTProcessor":
        """The processor for a `tokenizer`; nothing of it depends on the model."""
        return cls(tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls, *args, extractor: str | RegionExtractor | None = None, **kwargs
    ) -> "LXMERTProcessor":
        """Load as in transformers; an `extractor` takes the place of the saved one."""
        processor = super().from_pretrained(*args, **kwargs)  # passes all it is given on to the tokenizer
        if extractor is not None:
            processor.extractor = extractor
        return processor

    @property
    def extractor(self) -> str | None:
        """What `load_extractor` takes to load the extractor, which is saved; None without one, or of one that
        has no name. It may be set to either."""
        return self._spec

    @extractor.setter
    def extractor(self, extractor: str | RegionExtractor | None):
        is_name = extractor is None or isinstance(extractor, str)
        self._spec = extractor if is_name else getattr(extractor, "spec", None)
        self._loaded = None if is_name else extractor

    @property
    def region_extractor(self) -> RegionExtractor:
        """The extractor, loaded if need be.

        Raises:
            ValueError: there is none.
        """
        if self._loaded is None:
            if self._spec is None:
                raise ValueError(
                    "extractor is None, so images cannot be read; give regions, or the processor an "
                    "extractor: LXMERTProcessor.from_pretrained(folder, extractor=...)"
                )
            self._loaded = load_extractor(self._spec)
        return self._loaded

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the extractor's name."""
        loaded = self.__dict__.pop("_loaded")
        try:
            return super().to_dict() | {"extractor": self._spec}
        finally:
            self._loaded = loaded

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        regions: Regions | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Prepare texts, and images by their regions.

        Args:
            images: a PIL image, or a list of them, of any size, in which the extractor finds regions.
            text: a text or a list of texts.
            regions: instead of images, what an extractor made of them, or of each image the dict that
                `stack_regions` takes.
            return_tensors: "pt".
            kwargs: passed to the tokenizer (`padding`, `pad_to_multiple_of`, ...).

        Returns:
            `visual_feats` (B, R, F), `visual_pos` (B, R, 4), x1, y1, x2, y2 in 0..1, `visual_attention_mask`
            (B, R), 1 for a region; `input_ids` and `attention_mask` (T, L), padded to the longest text.

        Raises:
            ValueError: nothing is given, images and regions both, images without an extractor, an empty text,
                or regions that do not fit (`stack_regions`).
        """
        if images is None and text is None and regions is None:
            raise ValueError("images, regions and text are all None; give images, regions or texts")
        if images is not None and regions is not None:
            raise ValueError("images and regions are both given; give one of them")
        batch = BatchFeature()
        if images is not None:
            regions = self.extract(images)
        if regions is not None:
            batch.update(_visual_inputs(regions))
        if text is not None:
            batch.update(self._encode([text] if isinstance(text, str) else text, return_tensors, **kwargs))
        return batch

    def extract(self, images) -> Regions:
        """Regions of PIL images by the processor's extractor."""
        return self.region_extractor.extract(images if isinstance(images, (list, tuple)) else [images])


def _visual_inputs(regions: Regions | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    if not isinstance(regions, Regions):
        regions = stack_regions([regions] if isinstance(regions, Mapping) else list(regions))
    return {
        "visual_feats": regions.features.float(),
        "visual_pos": regions.boxes.float(),
        "visual_attention_mask": regions.mask.to(torch.long),
    }
