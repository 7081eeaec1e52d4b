"""Images and texts for ALBEF and X-VLM, answers to questions, boxes back in pixels, and proposals ranked by
heat maps.

R: texts, A: answers, L: text length.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
        tokenizer: a fast tokenizer with [CLS], [SEP] and [MASK], or RoBERTa's `<s>`, `</s>` and `<mask>`; a
            copy of it is kept.
        max_words: words of a text that are read.
        max_tokens: tokens of a text that are read, [CLS] included.
        clean: lower-case texts and take out punctuation, as the papers do with English ones. Without it texts
            stay as they are but for spaces, for tokenizers of cased or of other languages.
    """

    _auto_class = "AutoProcessor"
    image_processor_type = SquashImageProcessor  # made by `from_config`

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_words: int = 30,
        max_tokens: int = 30,
        clean: bool = True,
    ):
        self.max_words = max_words
        self.max_tokens = max_tokens
        self.clean = clean
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
        """Lower case, without punctuation, dashes and slashes as spaces, at most `max_words` words; only the
        last without `clean`.

        Raises:
            ValueError: nothing is left.
        """
        if not self.clean:
            return self._first_words(text)
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
        if not self.clean:
            return self._first_words(question)
        cleaned = _DELETED.sub("", question.lower()).replace("-", " ").replace("/", " ").rstrip(" ")
        if not cleaned.strip():
            raise ValueError(f"question={question!r} has no word left after cleaning; give one with words")
        return " ".join(cleaned.split(" ")[: self.max_words])

    def _first_words(self, text: str) -> str:
        words = text.split()
        if not words:
            raise ValueError(f"text={text!r} has no word; give a text with words")
        return " ".join(words[: self.max_words])

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
            [f"{answer}{self.tokenizer.sep_token}" for answer in answers],
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

    def rank_proposals(
        self,
        heatmaps: Tensor,
        proposals: Sequence[Tensor | Sequence],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Score the proposals of each text by its heat map: what a box holds of it over the root of its area.

        Args:
            heatmaps: (R, grid, grid).
            proposals: for each text boxes (n, 4), x, y, w, h in pixels.
            image_sizes: (height, width) of the image of each text in pixels.

        Returns:
            Scores (n,) of each text, the best proposal highest.

        Raises:
            ValueError: the numbers of maps, lists and sizes differ, or a box has no area.
        """
        if not len(heatmaps) == len(proposals) == len(image_sizes):
            raise ValueError(
                f"heatmaps has {len(heatmaps)} maps, proposals {len(proposals)} lists and image_sizes "
                f"{len(image_sizes)}; give one of each per text"
            )
        return [
            _proposal_scores(*one) for one in zip(heatmaps.float().cpu(), proposals, image_sizes, strict=True)
        ]

    def _encode(self, texts: list[str], return_tensors: str = "pt", **kwargs) -> BatchFeature:
        settings = {"padding": True, "truncation": True, "max_length": self.max_tokens, **kwargs}
        settings.update(return_token_type_ids=False, return_tensors=return_tensors)
        return self.tokenizer(texts, **settings)


def _proposal_scores(heatmap: Tensor, proposals: Tensor | Sequence, image_size: tuple[int, int]) -> Tensor:
    boxes = torch.as_tensor(proposals, dtype=torch.double).view(-1, 4)
    if bool((boxes[:, 2:] <= 0).any()):
        raise ValueError(
            f"proposals holds a box without area: {boxes.tolist()}; give x, y, w, h with w, h > 0"
        )
    height, width = image_size
    pixels = F.interpolate(heatmap[None, None], size=image_size, mode="bicubic", align_corners=False)[0, 0]
    sums = F.pad(pixels.double().cumsum(0).cumsum(1), (1, 0, 1, 0))  # of all pixels above and left
    # whole pixels, as the official code cuts them
    left, right = (edge.long().clamp(0, width) for edge in (boxes[:, 0], boxes[:, 0] + boxes[:, 2]))
    top, bottom = (edge.long().clamp(0, height) for edge in (boxes[:, 1], boxes[:, 1] + boxes[:, 3]))
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return (inside / boxes[:, 2:].prod(dim=1).sqrt()).float()
