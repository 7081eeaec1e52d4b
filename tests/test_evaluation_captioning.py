"""Metrics of captions against COCO's tools and by hand, and the protocol around them."""

import math

import pytest
import torch
from data_fixtures import picture
from heads import make_head
from hypothesis import given
from hypothesis import strategies as st

from hf_vlp import XVLMForCaptioning
from hf_vlp.evaluation import (
    CaptionScores,
    bleu_scores,
    caption_metrics,
    cider_d_reward,
    cider_d_scores,
    evaluate_captioning,
    majority_caption_metrics,
    ngram_frequencies,
    rouge_l_scores,
    tokenize_caption,
)
from hf_vlp.evaluation.caption_metrics import words_and_end

CAPTIONS = [
    "a man is riding a horse on the beach",
    "two dogs play with a red ball",
    "a plate of food on a table",
    "a man a man a man",
]
REFERENCES = [
    ["a man rides a brown horse along the beach", "someone riding a horse on the sand"],
    ["two dogs are playing with a ball", "dogs chase a red ball in the grass", "two dogs play"],
    ["a plate with food sits on a wooden table"],
    ["a man stands next to a horse", "the man is standing by his horse"],
]
# of pycocoevalcap 1.2
BLEU = [0.7462532377661991, 0.6138660566695664, 0.43250418227187476, 0.3043730864869036]
ROUGE = [0.69397042, 0.85915493, 0.73346693, 0.45522388]
CIDER = [2.93017457, 2.82313538, 2.27240543, 0.26433025]

WORDS = st.lists(st.sampled_from("a red dog the cat on".split()), min_size=1, max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=4)), min_size=1, max_size=6)


def test_numbers_are_those_of_coco():
    assert bleu_scores(CAPTIONS, REFERENCES) == pytest.approx(BLEU, abs=1e-9)
    assert rouge_l_scores(CAPTIONS, REFERENCES) == pytest.approx(ROUGE, abs=1e-8)
    assert cider_d_scores(CAPTIONS, REFERENCES) == pytest.approx(CIDER, abs=1e-8)
    metrics = caption_metrics(CAPTIONS, REFERENCES)
    assert metrics["bleu_4"] == pytest.approx(BLEU[3], abs=1e-9)
    assert metrics["cider_d"] == pytest.approx(sum(CIDER) / 4, abs=1e-8)
    assert list(metrics) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]


def test_cider_by_hand():
    """Of two images, words of one weigh log 2, words of both nothing; n-grams above two are not there."""
    scores = cider_d_scores(["red dog", "cat"], [["red cat"], ["blue cat"]])
    # 1-grams: red is found, weight log 2 of a reference norm log 2, and a caption norm sqrt(2) log 2
    assert scores[0] == pytest.approx(10 / 4 / math.sqrt(2))
    assert scores[1] == 0  # cat is everywhere
    longer = cider_d_scores(["red dog", "cat"], [["red cat cat cat"], ["blue cat"]])
    assert longer[0] == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-(2**2) / (2 * 6**2)))


def test_bleu_by_hand():
    """Two of three words, one of two pairs, closest length 4 against 3."""
    scores = bleu_scores(["a red dog"], [["a red old cat", "the small black cat that sleeps"]])
    penalty = math.exp(1 - 4 / 3)
    assert scores == pytest.approx([2 / 3 * penalty, (2 / 3 / 2) ** 0.5 * penalty, 0, 0])


@given(CORPUS)
def test_a_perfect_caption_is_the_best(corpus):
    references = [texts for _, texts in corpus]
    perfect = caption_metrics([texts[0] for texts in references], [[texts[0]] for texts in references])
    assert perfect["rouge_l"] == pytest.approx(1) and perfect["bleu_1"] == pytest.approx(1)
    others = [caption for caption, _ in corpus]
    ours = cider_d_scores([texts[0] for texts in references], [[texts[0]] for texts in references])
    theirs = cider_d_scores(others, [[texts[0]] for texts in references])
    assert all(0 <= b <= a + 1e-9 <= 10 + 1e-8 for a, b in zip(ours, theirs, strict=True))


@given(CORPUS, st.randoms())
def test_the_order_of_references_changes_nothing(corpus, random):
    captions, references = zip(*corpus, strict=True)
    shuffled = [random.sample(texts, len(texts)) for texts in references]
    assert caption_metrics(captions, shuffled) == pytest.approx(caption_metrics(captions, references))


@given(CORPUS)
def test_frequencies_may_be_cached(corpus):
    captions, references = zip(*corpus, strict=True)
    cached = cider_d_scores(captions, references, ngram_frequencies(references))
    assert cached == cider_d_scores(captions, references)
    one = cider_d_scores(captions[:1], references[:1], ngram_frequencies(references))
    assert one == pytest.approx(cached[:1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog, it isn't black-haired.", "a man 's dog it is n't black-haired"),
        ('He said: "no!" -- twice; (really?)', "he said no twice really"),
        ("They\u2019re at 3.5 miles & cannot stop...", "they 're at 3.5 miles & can not stop"),
        ("don't we'll I'd", "do n't we 'll i 'd"),
        ("", ""),
    ],
)
def test_words_of_a_caption(text, words):
    assert tokenize_caption(text) == words.split()


def test_the_reward_knows_where_a_caption_ends():
    reward = cider_d_reward(REFERENCES)
    whole, cut = reward(["two dogs play", "two dogs"], [REFERENCES[1], REFERENCES[1]])
    assert whole > cut > 0
    assert words_and_end("two dogs") == ["two", "dogs", "<eos>"]


def test_captions_that_cannot_be_scored():
    for captions, references in (([], []), (["a"], []), ("a", ["a"])):
        with pytest.raises(ValueError, match="captions is"):
            caption_metrics(captions, references)
    for references in ([[]], ["a"]):
        with pytest.raises(ValueError, match=r"references\[0\]"):
            caption_metrics(["a"], references)


def test_the_module():
    metric = CaptionScores()
    metric.add_batch(predictions=CAPTIONS, references=REFERENCES)
    assert metric.compute() == pytest.approx(caption_metrics(CAPTIONS, REFERENCES))


# The protocol


def rows(captions: bool = True) -> list[dict]:
    texts = ["a red circle", ["the blue square", "a blue square"], "a cross"]
    rows = [{"image": picture(i, 60 + i, 50), "caption": texts[i]} for i in range(3)]
    return rows if captions else [{"image": row["image"]} for row in rows]


@pytest.fixture
def head():
    torch.manual_seed(1)
    model, processor = make_head(XVLMForCaptioning)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    processor.prompt = "a the"
    return model.train(), processor


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_of_rows_are_those_of_the_model(head, beams):
    model, processor = head
    result = evaluate_captioning(model, processor, rows(), num_beams=beams, batch_size=2)
    assert model.training
    model.eval()
    for row, caption in zip(rows(), result.captions, strict=True):
        inputs = processor(images=[row["image"]], return_tensors="pt")
        settings = {"num_beams": beams, "min_length": 5, "official_length": beams > 1}
        ids = model.generate(inputs["pixel_values"], processor.encode_prompt()["input_ids"], **settings)
        assert processor.decode_captions(ids) == [caption]
    references = [[row["caption"]] if isinstance(row["caption"], str) else row["caption"] for row in rows()]
    assert result.metrics == caption_metrics(result.captions, references)
    assert evaluate_captioning(model, processor, rows(captions=False)).metrics is None


def test_one_caption_for_all_images():
    many = [*rows(), {"image": None, "caption": ["a cross", "one more"]}]
    texts = [["a red circle"], ["the blue square", "a blue square"], ["a cross"], ["a cross", "one more"]]
    assert majority_caption_metrics(many) == caption_metrics(["a cross"] * 4, texts)


def test_rows_that_cannot_be_captioned(head):
    with pytest.raises(ValueError, match="rows is empty"):
        evaluate_captioning(*head, [])
    with pytest.raises(ValueError, match="1 of 3 rows have no caption"):
        evaluate_captioning(*head, [*rows()[:2], rows(captions=False)[2]])
    with pytest.raises(ValueError, match="num_beams is 0"):
        evaluate_captioning(*head, rows(), num_beams=0)
