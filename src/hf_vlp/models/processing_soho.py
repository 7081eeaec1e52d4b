"""Images and texts for SOHO, and boxes back in pixels.

B: images, T: texts, L: text length.
"""

from collections.abc import Sequence

from transformers import BatchFeature, PreTrainedConfig

from .image_processing_soho import SOHOImageProcessor
from .processing_sentences import SentenceProcessor
from .tokens import with_special_tokens


class SOHOProcessor(SentenceProcessor):
    """Image processor and tokenizer.

    Texts are read as `[CLS] words [SEP]`, at most `max_tokens` in all, 16 in the paper.

    Args:
        image_processor: a `SOHOImageProcessor`.
        tokenizer: a fast BERT-like tokenizer; a copy of it is kept.
        max_tokens: tokens of a text that are read, [CLS] and [SEP] included.
    """

    def __init__(self, image_processor=None, tokenizer=None, max_tokens: int = 16):
        self.max_tokens = max_tokens
        super().__init__(image_processor, with_special_tokens(tokenizer, ends_in_sep=True))

    @classmethod
    def from_config(cls, config: PreTrainedConfig, tokenizer, **kwargs) -> "SOHOProcessor":
        """The paper's images and a `tokenizer`; nothing of it depends on the model."""
        return cls(SOHOImageProcessor(), tokenizer, **kwargs)

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
