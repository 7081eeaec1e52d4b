"""Metrics of captions as functions of strings: BLEU, ROUGE-L and CIDEr-D, as COCO's tools compute them.

Each of N `captions` has its list of `references`. COCO's tools call Stanford's tokenizer, a Java program;
`tokenize_caption` follows its rules for what captions hold. Other words come from another `tokenize`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

Tokenize = Callable[[str], list[str]]
References = Sequence[Sequence[str]]
NGram = tuple[str, ...]

MAX_N = 4  # longest n-grams of BLEU and CIDEr-D
SIGMA = 6.0  # of CIDEr-D's penalty of lengths
ROUGE_BETA = 1.2

_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-'./,&]\w+)*|[$%&#@+=*/]")


def tokenize_caption(text: str) -> list[str]:
    """Words in lower case, without punctuation: "A man's dog, it isn't black-haired." becomes
    a man 's dog it is n't black-haired.

    As Stanford's tokenizer and COCO's list of punctuation have it, but for brackets, which are left out, and
    abbreviations, which lose their last dot.
    """
    text = text.lower().replace("\u2019", "'").replace("cannot", "can not")
    return _WORD.findall(_CONTRACTION.sub(r" \1", text))


def words_and_end(text: str) -> list[str]:
    """What self-critical training compares: words between spaces, and an end, which has to be learnt."""
    return [*text.split(), "<eos>"]


def caption_metrics(
    captions: Sequence[str], references: References, tokenize: Tokenize = tokenize_caption
) -> dict[str, float]:
    """`bleu_1` to `bleu_4` and `rouge_l` in 0..1, `cider_d` in 0..10, over the whole corpus.

    Papers print BLEU and CIDEr-D times 100.

    Raises:
        ValueError: no captions, or not a reference for each of them.
    """
    scores = bleu_scores(captions, references, tokenize)
    return {
        **{f"bleu_{n}": score for n, score in enumerate(scores, 1)},
        "rouge_l": _mean(rouge_l_scores(captions, references, tokenize)),
        "cider_d": _mean(cider_d_scores(captions, references, tokenize=tokenize)),
    }


# BLEU


def bleu_scores(
    captions: Sequence[str], references: References, tokenize: Tokenize = tokenize_caption
) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole corpus; lengths are compared with the closest reference, the shorter of
    two.

    Raises:
        ValueError: as `caption_metrics`.
    """
    check_captions(captions, references)
    length = closest = 0
    right, written = [0] * MAX_N, [0] * MAX_N
    for caption, texts in zip(captions, references, strict=True):
        words, others = tokenize(caption), [tokenize(text) for text in texts]
        length += len(words)
        closest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        counts, allowed = ngrams(words), Counter()
        for other in others:
            allowed |= ngrams(other)
        for ngram, count in counts.items():
            written[len(ngram) - 1] += count
            right[len(ngram) - 1] += min(count, allowed[ngram])
    penalty = min(0.0, 1 - closest / length) if length else -math.inf
    scores, product = [], 1.0
    for n in range(MAX_N):
        product *= right[n] / written[n] if written[n] else 0.0
        scores.append(product ** (1 / (n + 1)) * math.exp(penalty))
    return scores


def ngrams(words: Sequence[str]) -> Counter[NGram]:
    """How often each of one to four words in a row is there."""
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


# ROUGE-L


def rouge_l_scores(
    captions: Sequence[str], references: References, tokenize: Tokenize = tokenize_caption
) -> list[float]:
    """ROUGE-L of each caption: the F-measure (beta 1.2) of the best precision and the best recall of its
    longest common subsequences with the references.

    Raises:
        ValueError: as `caption_metrics`.
    """
    check_captions(captions, references)
    return [
        _rouge_l(tokenize(caption), [tokenize(text) for text in texts])
        for caption, texts in zip(captions, references, strict=True)
    ]


def _rouge_l(words: list[str], references: list[list[str]]) -> float:
    common = [(_common_length(words, other), len(other)) for other in references]
    precision = max(length for length, _ in common) / max(len(words), 1)
    recall = max(length / max(size, 1) for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_length(words: list[str], others: list[str]) -> int:
    """Length of the longest subsequence of both."""
    row = [0] * (len(others) + 1)
    for word in words:
        before = row
        row = [0]
        for i, other in enumerate(others):
            row.append(before[i] + 1 if word == other else max(before[i + 1], row[i]))
    return row[-1]


# CIDEr-D


class NGramFrequencies(NamedTuple):
    """In the references of how many of `images` each n-gram of `counts` occurs."""

    counts: dict[NGram, int]
    images: int


def ngram_frequencies(references: References, tokenize: Tokenize = tokenize_caption) -> NGramFrequencies:
    """The frequencies that weigh CIDEr-D, of the references of each image."""
    counts = Counter()
    for texts in references:
        counts.update({ngram for text in texts for ngram in ngrams(tokenize(text))})
    return NGramFrequencies(counts, len(references))


def cider_d_scores(
    captions: Sequence[str],
    references: References,
    frequencies: NGramFrequencies | None = None,
    tokenize: Tokenize = tokenize_caption,
) -> list[float]:
    """CIDEr-D of each caption, 0 to 10 (arXiv 1411.5726): the mean over its references, and over n-grams of
    one to four words, of the cosine of their weighed counts.

    A count weighs the more the fewer images the n-gram occurs with, by `frequencies`, which without are those
    of `references`; of a single image all weigh nothing, and the score is 0.

    Raises:
        ValueError: as `caption_metrics`.
    """
    check_captions(captions, references)
    if frequencies is None:
        frequencies = ngram_frequencies(references, tokenize)
    weigh = partial(_weighed, frequencies=frequencies)
    return [
        10 * _mean([_cider_d(found, weigh(tokenize(text))) for text in texts])
        for texts, found in zip(references, (weigh(tokenize(caption)) for caption in captions), strict=True)
    ]


def cider_d_reward(references: References) -> Callable[[Sequence[str], References], list[float]]:
    """The reward of self-critical training: CIDEr-D by the frequencies of these references, those of the
    training set, of words between spaces with an end after them."""
    frequencies = ngram_frequencies(references, words_and_end)
    return partial(cider_d_scores, frequencies=frequencies, tokenize=words_and_end)


class _Weighed(NamedTuple):
    """Weights of the n-grams of a text, their norm for each n, and how many pairs of words it has."""

    weights: dict[NGram, float]
    norms: list[float]
    length: int


def _weighed(words: list[str], frequencies: NGramFrequencies) -> _Weighed:
    everywhere, weights, squares = math.log(max(frequencies.images, 1)), {}, [0.0] * MAX_N
    for ngram, count in ngrams(words).items():
        rarity = everywhere - math.log(max(1, frequencies.counts.get(ngram, 0)))
        weights[ngram] = count * rarity
        squares[len(ngram) - 1] += weights[ngram] ** 2
    return _Weighed(weights, [math.sqrt(square) for square in squares], max(len(words) - 1, 0))


def _cider_d(found: _Weighed, wanted: _Weighed) -> float:
    """In 0..1; no n-gram counts more often than in the reference."""
    products = [0.0] * MAX_N
    for ngram, weight in found.weights.items():
        other = wanted.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    cosines = [
        product / (a * b) if a and b else 0.0
        for product, a, b in zip(products, found.norms, wanted.norms, strict=True)
    ]
    return _mean(cosines) * math.exp(-((found.length - wanted.length) ** 2) / (2 * SIGMA**2))


def check_captions(captions: Sequence[str], references: References):
    """A list of at least one reference for each of at least one caption."""
    if isinstance(captions, str) or not len(captions) or len(captions) != len(references):
        raise ValueError(
            f"captions is {len(captions)} long and references {len(references)}; give a list of captions, "
            "and for each of them a list of references"
        )
    for place, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"references[{place}] is {texts!r}; give a list of at least one string")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
