"""Masking: exact counts, whole words, never [CLS] or padding, and the shares of [MASK], random and kept
tokens.
"""

import random

import pytest
import torch
from data_fixtures import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from hf_vlp.data.masking import TokenMasking, WholeWordMasking, choose_masked_positions

texts = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda pieces: [False, False, *pieces[1:]])


@given(texts, st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_count_is_exact_and_cls_is_never_masked(is_continuation, seed, max_masks, probability):
    masked = choose_masked_positions(is_continuation, random.Random(seed), probability, max_masks)
    n = len(is_continuation)
    assert len(masked) == len(set(masked)) == min(max_masks, n - 1, max(1, round(probability * n)))
    assert all(0 < position < n for position in masked)


@given(texts, st.integers(0, 10**6))
def test_words_are_whole_unless_cut(is_continuation, seed):
    """Without spans, what is cut to meet the count is less than the one word drawn last."""
    n = len(is_continuation)
    masked = set(
        choose_masked_positions(is_continuation, random.Random(seed), 0.25, max_masks=n, span_probability=0)
    )
    word = [sum(not c for c in is_continuation[: i + 1]) for i in range(n)]
    words = {word[i] for i in masked}
    whole = {i for i in range(1, n) if word[i] in words}
    longest = max(word.count(w) for w in words)
    # Each word drawn before the last one fits below the count, so the overshoot is less than one word.
    assert len(whole) - len(masked) < longest


def test_half_words_are_never_masked_without_a_cut():
    is_continuation = [False, *[False, True] * 20]  # 41 tokens, 20 words of two pieces
    for seed in range(200):
        masked = choose_masked_positions(is_continuation, random.Random(seed), 0.25, 10, span_probability=0)
        assert len(masked) == 10 and all((i + 1 if i % 2 else i - 1) in masked for i in masked)


def test_spans_are_two_or_three_words():
    lengths = set()
    for seed in range(300):
        masked = choose_masked_positions([False] * 41, random.Random(seed), 0.25, 10, span_probability=1.0)
        runs = "".join("x" if i in masked else " " for i in range(41)).split()
        lengths |= {len(run) for run in runs}
    assert {2, 3} <= lengths
    singles = choose_masked_positions([False] * 41, random.Random(0), 0.25, 10, span_probability=0.0)
    assert len(singles) == 10


def test_shares_and_labels():
    tokenizer = tiny_tokenizer()
    masking, rng = WholeWordMasking(tokenizer, max_masks=1000), random.Random(1)
    cat = tokenizer.convert_tokens_to_ids("cat")
    input_ids = torch.full((50, 400), cat)
    input_ids[:, 0] = tokenizer.cls_token_id
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, 300:], input_ids[:, 300:] = 0, tokenizer.pad_token_id
    before = input_ids.clone()
    out = masking(input_ids, attention_mask, rng)
    chosen = out["mlm_labels"] != -100
    assert torch.equal(input_ids, before)
    assert (chosen.sum(1) == round(0.25 * 300)).all()
    assert not chosen[:, 0].any() and not chosen[:, 300:].any()
    assert (out["mlm_labels"][chosen] == cat).all()
    assert torch.equal(out["mlm_input_ids"][~chosen], input_ids[~chosen])
    replaced = out["mlm_input_ids"][chosen]
    vocab = len(tokenizer)
    share_mask = (replaced == tokenizer.mask_token_id).float().mean().item()
    share_kept = (replaced == cat).float().mean().item()
    assert abs(share_mask - (0.8 + 0.1 / vocab)) < 0.03
    assert abs(share_kept - (0.1 + 0.1 / vocab)) < 0.03
    assert len(replaced.unique()) == vocab  # random tokens come from the whole vocabulary


@given(
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from([0.15, 0.5, 1.0]),
)
def test_token_masking(ids, seed, probability):
    """Labels are the tokens that were there, never [PAD] (0), [CLS] (2) or [SEP] (3); with probability 1 all
    others.
    """
    length = max(map(len, ids))
    input_ids = torch.tensor([[2, *row, *[0] * (length - len(row))] for row in ids])
    attention_mask = torch.tensor([[1] * (len(row) + 1) + [0] * (length - len(row)) for row in ids])
    before = input_ids.clone()
    out = TokenMasking(tiny_tokenizer(), probability)(input_ids, attention_mask, random.Random(seed))
    chosen, may_be = out["mlm_labels"] != -100, (input_ids != 0) & (input_ids != 2) & (input_ids != 3)
    assert torch.equal(input_ids, before) and not (chosen & ~may_be).any()
    assert torch.equal(out["mlm_labels"][chosen], input_ids[chosen])
    assert torch.equal(out["mlm_input_ids"][~chosen], input_ids[~chosen])
    assert probability < 1 or torch.equal(chosen, may_be)


def test_tokens_are_masked_independently():
    """A share of 0.15 with the spread of a binomial distribution, some texts without any; 80% are [MASK]."""
    tokenizer = tiny_tokenizer()
    cat = tokenizer.convert_tokens_to_ids("cat")
    input_ids = torch.full((4000, 11), cat)
    input_ids[:, 0] = tokenizer.cls_token_id
    out = TokenMasking(tokenizer)(input_ids, torch.ones_like(input_ids), random.Random(0))
    chosen = out["mlm_labels"] != -100
    counts = chosen.sum(1).float()
    assert abs(chosen[:, 1:].float().mean() - 0.15) < 0.01 and abs(counts.var() - 10 * 0.15 * 0.85) < 0.1
    assert abs((counts == 0).float().mean() - 0.85**10) < 0.03
    replaced = out["mlm_input_ids"][chosen]
    assert abs((replaced == tokenizer.mask_token_id).float().mean() - 0.8) < 0.02
    assert abs((replaced == cat).float().mean() - 0.1) < 0.02
    assert len(replaced.unique()) == len(tokenizer)


@pytest.mark.parametrize("masking_class", [WholeWordMasking, TokenMasking])
def test_same_random_numbers_same_masks(masking_class):
    tokenizer = tiny_tokenizer()
    masking = masking_class(tokenizer)
    batch = tokenizer(["[CLS] a red cat sitting on the mat"], return_tensors="pt")
    one, two = (masking(batch["input_ids"], batch["attention_mask"], random.Random(3)) for _ in range(2))
    assert torch.equal(one["mlm_input_ids"], two["mlm_input_ids"])
    assert torch.equal(one["mlm_labels"], two["mlm_labels"])


def test_errors():
    with pytest.raises(ValueError, match=r"besides \[CLS\]"):
        choose_masked_positions([False], random.Random(0))
    with pytest.raises(ValueError, match="mask_probability is 0"):
        WholeWordMasking(tiny_tokenizer(), mask_probability=0)
    with pytest.raises(ValueError, match="mask_probability is 1.5"):
        TokenMasking(tiny_tokenizer(), mask_probability=1.5)
    with pytest.raises(ValueError, match="max_masks is 0"):
        WholeWordMasking(tiny_tokenizer(), max_masks=0)
