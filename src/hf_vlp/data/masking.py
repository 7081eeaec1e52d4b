"""Masking for masked language modelling: that of X-VLM (arXiv 2111.08276), a quarter of the tokens in whole
words and short spans, cut to an exact count; that of ALBEF (arXiv 2107.07651) and LXMERT (arXiv 1908.07490),
each token by itself. LXMERT masks regions of images too.

Shape letters: B texts or images, L text length, R regions, F width of a feature.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def choose_masked_positions(
    is_continuation: Sequence[bool],
    rng: random.Random,
    mask_probability: float = 0.25,
    max_masks: int = 8,
    span_probability: float = 0.2,
    max_span: int = 3,
) -> list[int]:
    """Positions to predict in one text whose position 0 is [CLS].

    `is_continuation[i]` says whether token i goes on with a word ("##ing"). The count is
    min(max_masks, max(1, round(mask_probability * n))) of n tokens with [CLS], Python's rounding, and at most
    n - 1. Positions are drawn in random order; with `span_probability` one becomes a span of 2..max_span
    tokens; both ends grow to whole words. What exceeds the count is cut at random, so a word may be masked in
    part. Raises ValueError if the text has no token besides [CLS].
    """
    n = len(is_continuation)
    if n < 2:
        raise ValueError(
            "input_ids: a text has no token besides [CLS], so nothing can be masked; give it words"
        )
    count = min(max_masks, n - 1, max(1, round(mask_probability * n)))
    masked: set[int] = set()
    for position in rng.sample(range(1, n), n - 1):
        if len(masked) >= count:
            break
        if position in masked:
            continue
        span = rng.randint(2, max_span) if rng.random() < span_probability else 1
        start, end = position, min(position + span, n)
        while start > 1 and is_continuation[start]:
            start -= 1
        while end < n and is_continuation[end]:
            end += 1
        masked.update(range(start, end))
    return sorted(rng.sample(sorted(masked), count))


class Masking(ABC):
    """Texts → inputs and labels of masked language modelling: of the chosen tokens 80% become [MASK], 10% a
    token drawn from the whole vocabulary, 10% stay. Subclasses choose the positions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_probability: float):
        if not 0 < mask_probability <= 1:
            raise ValueError(f"mask_probability is {mask_probability}; give a share above 0 and up to 1")
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer has no mask_token; give one for masked language modelling")
        self.mask_probability = mask_probability
        self.mask_token_id = tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, rng: random.Random) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, L), padded on the right → mlm_input_ids and mlm_labels (B, L).

        Labels are -100 wherever nothing is to be predicted.
        """
        mlm_input_ids, mlm_labels = input_ids.clone(), torch.full_like(input_ids, -100)
        for row, (ids, length) in enumerate(
            zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)
        ):
            for position in self.choose_positions(ids[:length], rng):
                mlm_labels[row, position] = ids[position]
                mlm_input_ids[row, position] = self._replacement(ids[position], rng)
        return {"mlm_input_ids": mlm_input_ids, "mlm_labels": mlm_labels}

    @abstractmethod
    def choose_positions(self, ids: Sequence[int], rng: random.Random) -> list[int]:
        """Positions to predict in one text without its padding."""

    def _replacement(self, token: int, rng: random.Random) -> int:
        draw = rng.random()
        if draw < 0.8:
            return self.mask_token_id
        return rng.randrange(self.vocab_size) if draw < 0.9 else token


def continuations(tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Whether each token of the vocabulary goes on with a word that another one began.

    WordPiece marks those that do ("##ing"), byte-level BPE ("Ġred") and SentencePiece ("▁rot") those that
    begin one; most tokens that are marked tell which of the three it is. Special tokens go on with nothing.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    mark = max(("##", "Ġ", "▁"), key=lambda mark: sum(token.startswith(mark) for token in tokens))
    if mark == "##" or not any(token.startswith(mark) for token in tokens):
        return [token.startswith("##") for token in tokens]
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return [not token.startswith(mark) and token not in special for token in tokens]


class WholeWordMasking(Masking):
    """X-VLM's masking, of whole words and spans; see `choose_masked_positions` and `continuations`.

    Defaults are those of the 4M recipe; the 16M recipe has `max_masks=6`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_probability: float = 0.25,
        max_masks: int = 8,
        span_probability: float = 0.2,
        max_span: int = 3,
    ):
        super().__init__(tokenizer, mask_probability)
        if max_masks < 1 or max_span < 2:
            raise ValueError(f"max_masks is {max_masks} and max_span {max_span}; give at least 1 and 2")
        self.span_settings = (max_masks, span_probability, max_span)
        self.is_continuation = continuations(tokenizer)

    def choose_positions(self, ids: Sequence[int], rng: random.Random) -> list[int]:
        is_continuation = [self.is_continuation[token] for token in ids]
        return choose_masked_positions(is_continuation, rng, self.mask_probability, *self.span_settings)


class TokenMasking(Masking):
    """The masking of ALBEF and LXMERT: each token but [CLS], [SEP] and [PAD] is chosen with
    `mask_probability`, independently of the others. A text may stay without a token to predict.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_probability: float = 0.15):
        super().__init__(tokenizer, mask_probability)
        self.never_masked = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}

    def choose_positions(self, ids: Sequence[int], rng: random.Random) -> list[int]:
        return [
            position
            for position, token in enumerate(ids)
            if token not in self.never_masked and rng.random() < self.mask_probability
        ]


def mask_regions(
    features: Tensor, mask: Tensor, rng: random.Random, mask_probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """LXMERT's masking of regions (section 3.1): features (B, R, F) → the masked ones, and which regions are
    to be predicted (B, R) bool.

    Each region of `mask` (B, R) bool, which is padded on the right, is chosen independently of the others. Of
    the chosen ones 80% become zeros, 10% the features of any region of another row, 10% stay; in a batch of
    one row there is no other, and 20% stay.
    """
    masked, chosen = features.clone(), torch.zeros_like(mask)
    counts = mask.sum(1).tolist()
    for row, region in mask.nonzero().tolist():
        if rng.random() >= mask_probability:
            continue
        chosen[row, region] = True
        draw = rng.random()
        if draw < 0.8:
            masked[row, region] = 0
        elif draw < 0.9 and len(mask) > 1:
            other = (row + rng.randrange(1, len(mask))) % len(mask)
            masked[row, region] = features[other, rng.randrange(counts[other])]
    return masked, chosen
