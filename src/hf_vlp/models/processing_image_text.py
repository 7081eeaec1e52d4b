"""Images and texts for ALBEF and X-VLM, answers to questions, and boxes back in pixels.

R: texts, A: answers, L: text length.
"""

import re
from collections.abc import Sequence

from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin

from .backbones import trunk_image_size
from .boxes import boxes_in_pixels
from .hub import SharedOnHub
from .image_processing_squash import SquashImageProcessor
from .tokens import with_special_tokens

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


class ImageTextProcessor(SharedOnHub, ProcessorMixin):
    """Image processor and tokenizer.

    Texts are cleaned and read as `[CLS] words`, without [SEP], as the released weights were trained.

    Args:
        image_processor: a `SquashImageProcessor`.
        tokenizer: a fast BERT-like tokenizer; a copy of it is kept.
        max_words: words of a text that are read.
        max_tokens: tokens of a text that are read, [CLS] included.
    """

    _auto_class = "AutoProcessor"
    image_processor_type = SquashImageProcessor  # made by `from_config`

    def __init__(self, image_processor=None, tokenizer=None, max_words: int = 30, max_tokens: int = 30):
        self.max_words = max_words
        self.max_tokens = max_tokens
        super().__init__(image_processor, with_special_tokens(tokenizer, ends_in_sep=False))

    @classmethod
    def from_config(cls, config: PreTrainedConfig, tokenizer, **kwargs) -> "ImageTextProcessor":
        """The processor that fits a model of `config` and its `tokenizer`.

        Raises:
            ValueError: the trunk tells no image size, as timm's do not: build the processor by hand.
        """
        size = trunk_image_size(config.vision_config)
        if size is None:
            raise ValueError(
                f"vision_config of type {config.vision_config.model_type} tells no image size; use "
                f"{cls.__name__}(...)"
            )
        return cls(cls.image_processor_type(size={"height": size, "width": size}), tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, image_size: int | None = None, **kwargs) -> "ImageTextProcessor":
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
            batch.update(self._encode(texts, return_tensors, **kwargs))
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

    def clean_question(self, question: str) -> str:
        """As `clean_text`, but by the official rule for questions, which counts every space as a word's end.

        Raises:
            ValueError: nothing is left.
        """
        cleaned = _DELETED.sub("", question.lower()).replace("-", " ").replace("/", " ").rstrip(" ")
        if not cleaned.strip():
            raise ValueError(f"question={question!r} has no word left after cleaning; give one with words")
        return " ".join(cleaned.split(" ")[: self.max_words])

    def encode_questions(self, questions: Sequence[str], **kwargs) -> BatchFeature:
        """Questions to `input_ids` and `attention_mask` (R, L); `kwargs` go to the tokenizer."""
        return self._encode([self.clean_question(question) for question in questions], **kwargs)

    def encode_answers(self, answers: Sequence[str]) -> BatchFeature:
        """Answers, uncleaned, to `answer_input_ids` and `answer_attention_mask` (A, L), `[CLS] words [SEP]`.

        Raises:
            ValueError: an answer without a word, or no answer.
        """
        empty = [answer for answer in answers if not str(answer).strip()]
        if empty or not len(answers):
            raise ValueError(
                f"answers holds {empty[0]!r}" if empty else "answers is empty; give at least one"
            )
        tokens = self.tokenizer(
            [f"{answer} {self.tokenizer.sep_token}" for answer in answers],
            padding=True,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return BatchFeature({f"answer_{name}": value for name, value in tokens.items()})

    def decode_answers(self, ids: Tensor) -> list[str]:
        """Answers (A, L) back to text, up to the first [SEP]."""
        texts = self.tokenizer.batch_decode(ids)
        words = (
            text.split(self.tokenizer.sep_token)[0].replace(self.tokenizer.cls_token, "") for text in texts
        )
        return [text.replace(self.tokenizer.pad_token, "").strip() for text in words]

    def post_process_boxes(self, pred_boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Boxes (R, 4) cx, cy, w, h in 0..1 to left, top, right, bottom in pixels of the original images.

        `image_sizes` holds (height, width) of the image of each box; boxes are clipped to it.
        """
        return boxes_in_pixels(pred_boxes, image_sizes)

    def _encode(self, texts: list[str], return_tensors: str = "pt", **kwargs) -> BatchFeature:
        settings = {"padding": True, "truncation": True, "max_length": self.max_tokens, **kwargs}
        settings.update(return_token_type_ids=False, return_tensors=return_tensors)
        return self.tokenizer(texts, **settings)
