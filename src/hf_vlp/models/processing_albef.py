"""Images and texts for ALBEF."""

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
