"""LXMERT's collators: masking of regions and words, matching, answers, soft targets, and the other tasks."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from data_fixtures import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, tiny_lxmert_processor
from torch.utils.data import ConcatDataset, DataLoader

from hf_vlp.data.lxmert_collators import (
    LXMERTEntailmentCollator,
    LXMERTGroundingCollator,
    LXMERTPairCollator,
    LXMERTPretrainingCollator,
    LXMERTQuestionCollator,
    LXMERTRetrievalCollator,
    soft_scores,
)
from hf_vlp.data.masking import TokenMasking, mask_regions
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.models.region_extractors import CropRegions
from hf_vlp.models.regions import stack_regions

DIM = 6
ANSWERS = ["red", "green", "blue", "yes", "no"]
PROCESSOR = tiny_lxmert_processor()
TOKENIZER = PROCESSOR.tokenizer


class HalfRegions:
    """Regions of any image: its left and right half."""

    feature_dim, fits_released_weights = 48, False

    def extract(self, images):
        boxes = [
            [[0, 0, im.width // 2, im.height], [im.width // 2, 0, im.width // 2, im.height]] for im in images
        ]
        return CropRegions().extract(images, boxes)


SEEING = tiny_lxmert_processor(extractor=HalfRegions())


def region_row(number: int, regions: int = 3) -> dict:
    """Every feature says of which row and region it is: 100 x row + region."""
    values = 100.0 * (number + 1) + np.arange(regions)
    corners = np.array([[0.1, 0.2, 0.5, 0.9]] * regions, dtype=np.float32)
    return {
        "features": np.repeat(values[:, None], DIM, axis=1).astype(np.float32),
        "boxes": corners,
        "object_ids": np.arange(regions) + number,
        "object_scores": np.full(regions, 0.5),
        "attribute_ids": np.arange(regions),
        "attribute_scores": np.full(regions, 0.25),
        "image_size": np.array([60, 80]),
    }


def sentence(number: int) -> str:
    return f"a {WORDS[3 + number % 4]} {WORDS[7 + number % 4]} and the cross is top"


def pretraining_rows(count: int, **columns) -> list[dict]:
    return [
        {"regions": region_row(i, 2 + i % 3), "caption": sentence(i), "image_id": f"image {i}", **columns}
        for i in range(count)
    ]


def seeded(rows: list[dict], seed: int) -> list[dict]:
    return [{**row, "sample_seed": seed} for row in rows]


ROWS = {
    LXMERTPretrainingCollator: pretraining_rows(4, answers=["red"], answer_scores=[1.0]),
    LXMERTQuestionCollator: [
        {"regions": region_row(i), "question": "is the circle red", "answers": ["yes"]} for i in range(4)
    ],
    LXMERTPairCollator: [
        {"regions": [region_row(i), region_row(9, 2)], "sentence": sentence(i), "label": i % 2 == 0}
        for i in range(4)
    ],
    LXMERTEntailmentCollator: [
        {"regions": region_row(i), "sentence": sentence(i), "label": i % 3} for i in range(4)
    ],
    LXMERTRetrievalCollator: pretraining_rows(4),
    LXMERTGroundingCollator: [
        {"regions": region_row(i), "text": sentence(i), "box": [8 * i, 6, 16, 30]} for i in range(4)
    ],
}
every_collator = pytest.mark.parametrize("name", ROWS)


def make(name, processor=PROCESSOR, **settings):
    if name in (LXMERTPretrainingCollator, LXMERTQuestionCollator):
        settings = {"answers": ANSWERS, **settings}
    return name(processor=processor, **settings)


def equal(one: dict, two: dict) -> bool:
    assert set(one) == set(two)
    return all(torch.equal(one[key], two[key]) for key in one)


# Masking


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.sampled_from([0.15, 0.6, 1.0]),
)
def test_masked_regions(counts, seed, probability):
    """Chosen regions exist and become zeros, a region of another row, or stay; the others stay."""
    regions = stack_regions([region_row(i, count) for i, count in enumerate(counts)])
    regions.features[~regions.mask] = -7.0  # padding, which nothing may come from
    before = regions.features.clone()
    masked, chosen = mask_regions(regions.features, regions.mask, random.Random(seed), probability)
    assert torch.equal(regions.features, before) and not (chosen & ~regions.mask).any()
    assert torch.equal(masked[~chosen], before[~chosen])
    assert probability < 1 or torch.equal(chosen, regions.mask)
    there = before[regions.mask]
    for row, region in chosen.nonzero().tolist():
        feature = masked[row, region]
        if feature.any() and not torch.equal(feature, before[row, region]):
            assert (there == feature).all(1).any()
            assert int(feature[0]) // 100 - 1 != row


def test_shares_of_masked_regions():
    counts = [5, 3, 4, 5] * 200
    regions = stack_regions([region_row(i, count) for i, count in enumerate(counts)])
    masked, chosen = mask_regions(regions.features, regions.mask, random.Random(0), 0.5)
    assert abs(chosen[regions.mask].float().mean() - 0.5) < 0.03
    before, after = regions.features[chosen][:, 0], masked[chosen][:, 0]
    assert abs((after == 0).float().mean() - 0.8) < 0.03
    assert abs((after == before).float().mean() - 0.1) < 0.03
    swapped = after[(after != 0) & (after != before)]
    assert len(set((swapped % 100).tolist())) == 5  # every place of a row
    assert len(set((swapped // 100).tolist())) > 100
    default = mask_regions(regions.features, regions.mask, random.Random(0))[1]
    assert abs(default[regions.mask].float().mean() - 0.15) < 0.03


def test_regions_of_a_lone_row_are_not_swapped():
    regions = stack_regions([region_row(0, 5)])
    for seed in range(50):
        masked, _ = mask_regions(regions.features, regions.mask, random.Random(seed), 1.0)
        assert ((masked == 0) | (masked == regions.features)).all()


@given(st.integers(0, 10**6), st.sampled_from([0.15, 1.0]))
def test_masked_words(seed, probability):
    collator = make(
        LXMERTPretrainingCollator,
        masking=TokenMasking(TOKENIZER, probability),
        mismatch_probability=0,
    )
    rows = seeded(pretraining_rows(3), seed)
    batch = collator(rows)
    plain = PROCESSOR(text=[row["caption"] for row in rows])
    chosen = batch["mlm_labels"] != -100
    special = torch.isin(plain["input_ids"], torch.tensor(TOKENIZER.all_special_ids))
    assert not (chosen & special).any() and (probability < 1 or torch.equal(chosen, ~special))
    assert torch.equal(batch["mlm_labels"][chosen], plain["input_ids"][chosen])
    assert torch.equal(batch["mlm_input_ids"][~chosen], plain["input_ids"][~chosen])


# Pre-training


def test_pretraining_batch():
    rows = pretraining_rows(4, answers=["red"], answer_scores=[1.0])
    batch = make(LXMERTPretrainingCollator, mismatch_probability=0)(rows)
    assert set(batch) == {
        *("mlm_input_ids", "attention_mask", "mlm_labels", "visual_feats", "visual_pos"),
        *("visual_attention_mask", "region_mask", "target_feats", "object_ids", "object_scores"),
        *("attribute_ids", "attribute_scores", "itm_labels", "answer_labels"),
    }
    assert batch["visual_feats"].shape == batch["target_feats"].shape == (4, 4, DIM)
    assert batch["visual_pos"].shape == (4, 4, 4) and batch["region_mask"].dtype == torch.bool
    assert batch["visual_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1] * 4, [1, 1, 0, 0]]
    assert batch["object_ids"][1].tolist() == [1, 2, 3, 0] and batch["attribute_ids"][0, 1] == 1
    assert batch["object_scores"][2].tolist() == [0.5] * 4
    stacked = stack_regions([row["regions"] for row in rows])
    assert torch.equal(batch["target_feats"], stacked.features)
    assert torch.equal(batch["visual_feats"][~batch["region_mask"]], stacked.features[~batch["region_mask"]])
    assert batch["itm_labels"].tolist() == [1] * 4 and batch["answer_labels"].tolist() == [0] * 4
    assert batch["itm_labels"].dtype == batch["answer_labels"].dtype == torch.int64


def read_back(batch: dict) -> list[str]:
    """The texts that were masked."""
    labels = batch["mlm_labels"]
    ids = torch.where(labels == -100, batch["mlm_input_ids"], labels)
    return TOKENIZER.batch_decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(0, 10**6), st.sampled_from([0.5, 1.0])
)
def test_mismatched_texts_are_of_other_images(images, seed, probability):
    rows = [
        {"regions": region_row(i), "caption": sentence(image), "image_id": image, "answers": ["yes"]}
        for i, image in enumerate(images)
    ]
    batch = make(LXMERTPretrainingCollator, mismatch_probability=probability)(seeded(rows, seed))
    for row, text, label, answer in zip(
        rows, read_back(batch), batch["itm_labels"].tolist(), batch["answer_labels"].tolist(), strict=True
    ):
        assert label == (text == row["caption"])
        assert answer == (3 if label else -100)
        assert text in {other["caption"] for other in rows}
    if probability == 1:
        assert batch["itm_labels"].tolist() == [int(len(set(images)) == 1)] * len(images)


def test_half_of_the_texts_are_replaced_by_any_other():
    rows, collator = pretraining_rows(4), make(LXMERTPretrainingCollator)
    batches = [collator(seeded(rows, seed)) for seed in range(400)]
    labels = torch.stack([batch["itm_labels"] for batch in batches]).float()
    assert (labels.mean(0) - 0.5).abs().max() < 0.1
    texts = Counter(read_back(batch)[0] for batch in batches)
    assert set(texts) == {row["caption"] for row in rows}
    assert max(texts[row["caption"]] for row in rows[1:]) < 1.6 * min(
        texts[row["caption"]] for row in rows[1:]
    )


def test_answers_are_drawn_by_their_scores():
    answers = {"answers": ["red", "purple", "blue", "no"], "answer_scores": [0.3, 0.9, 0.9, 0.0]}
    collator = make(LXMERTPretrainingCollator, mismatch_probability=0)
    drawn = Counter()
    for seed in range(100):
        drawn.update(collator(seeded(pretraining_rows(8, **answers), seed))["answer_labels"].tolist())
    assert set(drawn) == {0, 2}  # purple is outside the list, no has no score
    assert drawn[2] / drawn.total() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("columns", [{}, {"answers": []}, {"answers": None}, {"answers": ["purple"]}])
def test_rows_without_a_known_answer(columns):
    batch = make(LXMERTPretrainingCollator)(pretraining_rows(3, **columns))
    assert batch["answer_labels"].tolist() == [-100] * 3
    assert LXMERTPretrainingCollator(processor=PROCESSOR)(pretraining_rows(3, **columns))


def test_pretraining_on_drawn_scenes_and_their_questions():
    captions = shapes_dataset("captions", "train", 6, regions=True)
    questions = shapes_dataset("questions", "train", 6, regions=True).rename_column("question", "caption")
    collator = make(LXMERTPretrainingCollator, answers=["yes", "no", "red"], mismatch_probability=0)
    rows = ConcatDataset([captions, questions])
    batch = collator([{**rows[i], "image_id": i} for i in range(12)])
    assert batch["visual_feats"].shape[2] == 48 and (batch["answer_labels"][:6] == -100).all()
    assert (batch["answer_labels"] >= 0).any()


def test_regions_of_images_are_extracted():
    rows = [{"image": picture(i), "caption": sentence(i), "image_id": i} for i in range(3)]
    batch = make(LXMERTPretrainingCollator, SEEING, mismatch_probability=0)(rows)
    expected = HalfRegions().extract([row["image"] for row in rows])
    assert torch.equal(batch["target_feats"], expected.features)
    assert "object_ids" not in batch and batch["region_mask"].shape == (3, 2)


# Questions


def test_question_batch():
    rows = [
        {"answers": ["red", "blue"], "answer_scores": [1.0, 0.3]},
        {"answers": ["yes"] * 7 + ["no"] * 2 + ["purple"]},
        {"answers": ["purple"]},
        {"answers": ["blue"]},
        {"answers": []},
    ]
    rows = [{**row, "regions": region_row(i), "question": "is it red"} for i, row in enumerate(rows)]
    batch = make(LXMERTQuestionCollator)(rows)
    assert set(batch) == {
        *("visual_feats", "visual_pos", "visual_attention_mask", "input_ids", "attention_mask", "labels")
    }
    expected = [[1, 0, 0.3, 0, 0], [0, 0, 0, 1, 0.6], [0] * 5, [0, 0, 1, 0, 0], [0] * 5]
    torch.testing.assert_close(batch["labels"], torch.tensor(expected))
    assert TOKENIZER.batch_decode(batch["input_ids"])[0].split() == "[CLS] is [UNK] red [SEP]".split()


@given(st.lists(st.sampled_from(["red", "blue", "no"]), min_size=10, max_size=10))
def test_scores_of_ten_votes_are_the_official_ones(votes):
    official = {1: 0.3, 2: 0.6, 3: 0.9}
    scores = soft_scores({"answers": votes})
    assert scores == pytest.approx({answer: official.get(n, 1.0) for answer, n in Counter(votes).items()})


def test_rows_of_a_test_split_have_no_labels():
    rows = [{"regions": region_row(0), "question": "is it red"}]
    assert "labels" not in make(LXMERTQuestionCollator, train=False)(rows)
    with pytest.raises(ValueError, match="question 'is it red' has no answers; add the column"):
        make(LXMERTQuestionCollator)(rows)


# Other tasks


def test_pair_batch():
    rows = ROWS[LXMERTPairCollator]
    batch = make(LXMERTPairCollator)(rows)
    assert batch["visual_feats"].shape == (4, 2, 3, DIM) and batch["visual_pos"].shape == (4, 2, 3, 4)
    assert batch["visual_attention_mask"].tolist() == [[[1, 1, 1], [1, 1, 0]]] * 4
    assert batch["visual_feats"][:, :, 0, 0].tolist() == [[100 * (i + 1), 1000] for i in range(4)]
    assert len(batch["input_ids"]) == 4 and batch["labels"].tolist() == [1, 0, 1, 0]


def test_entailment_batch():
    batch = make(LXMERTEntailmentCollator)(ROWS[LXMERTEntailmentCollator])
    assert batch["labels"].tolist() == [0, 1, 2, 0] and batch["visual_feats"].shape == (4, 3, DIM)


def test_retrieval_batch():
    rows = [{**row, "image_id": image} for row, image in zip(pretraining_rows(4), "abac", strict=True)]
    rows[3]["caption"] = rows[1]["caption"]
    ids = make(LXMERTRetrievalCollator)(rows)["image_ids"]
    assert ids[0] == ids[2] and len(set(ids.tolist())) == 3 and ids.dtype == torch.int64
    ids = make(LXMERTRetrievalCollator, group_equal_texts=True)(rows)["image_ids"]
    assert ids[1] == ids[3] and len(set(ids.tolist())) == 3


def test_grounding_batch():
    batch = make(LXMERTGroundingCollator)(ROWS[LXMERTGroundingCollator])
    expected = torch.tensor([[(8 * i + 8) / 80, 21 / 60, 16 / 80, 30 / 60] for i in range(4)])
    torch.testing.assert_close(batch["target_boxes"], expected)
    image = {"image": picture(width=80, height=60), "text": "the circle", "box": [8, 6, 16, 30]}
    torch.testing.assert_close(make(LXMERTGroundingCollator, SEEING)([image])["target_boxes"], expected[1:2])


# All collators


@every_collator
def test_sample_seed_decides_a_batch(name):
    rows = [{**row, "caption": [sentence(i), sentence(i + 1)]} for i, row in enumerate(ROWS[name])]
    rows = [{**row, "sentence": row["caption"], "text": row["caption"]} for row in rows]
    collator = make(name)
    assert equal(*(collator(seeded(rows, 5)) for _ in range(2)))
    others = [collator(seeded(rows, seed)) for seed in range(10)]
    if name is not LXMERTQuestionCollator:
        texts = "mlm_input_ids" if name is LXMERTPretrainingCollator else "input_ids"
        assert len({str(other[texts].tolist()) for other in others}) > 1


@every_collator
def test_evaluation_is_the_same_every_time(name):
    collator = make(name, train=False)
    torch.manual_seed(1)
    one = collator(ROWS[name])
    torch.manual_seed(2)
    assert equal(one, collator(seeded(ROWS[name], 9)))


@every_collator
def test_images_in_place_of_regions(name):
    rows = [{**row, "regions": None} for row in ROWS[name]]
    for i, row in enumerate(rows):
        row |= {"images": [picture(i), picture(9)]} if name is LXMERTPairCollator else {"image": picture(i)}
    batch = make(name, SEEING)(rows)
    assert batch["visual_feats"].shape[-2:] == (2, 48) and len(batch["visual_feats"]) == 4
    with pytest.raises(ValueError, match="extractor is None"):
        make(name)(rows)


@every_collator
def test_bad_images_are_named_or_skipped(name, tmp_path, caplog):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    rows = [{**row, "regions": None} for row in ROWS[name]]
    for i, row in enumerate(rows):
        image = str(bad) if i == 1 else picture(i)
        row |= {"images": [picture(), image]} if name is LXMERTPairCollator else {"image": image}
    with pytest.raises(ValueError, match="bad.png"):
        make(name, SEEING)(rows)
    skipping = make(name, SEEING, on_bad_image="skip", train=False)
    assert equal(skipping(rows), skipping([rows[0], *rows[2:]]))
    assert "bad.png" in caplog.text


@every_collator
def test_loader_workers_and_pickles(name):
    collator = pickle.loads(pickle.dumps(make(name)))
    batches = list(DataLoader(ROWS[name], batch_size=2, collate_fn=collator, num_workers=1))
    assert [len(batch["attention_mask"]) for batch in batches] == [2, 2]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (LXMERTQuestionCollator, "questions"),
        (LXMERTPairCollator, "pairs"),
        (LXMERTEntailmentCollator, "entailment"),
        (LXMERTRetrievalCollator, "retrieval"),
        (LXMERTGroundingCollator, "grounding"),
    ],
)
def test_drawn_scenes_make_batches(name, task):
    batch = make(name)(list(shapes_dataset(task, "train", 4, regions=True)))
    assert len(batch["input_ids"]) == 4 and batch["visual_feats"].shape[-1] == 48


@every_collator
def test_rows_without_regions_are_named(name):
    rows = [{**row, "regions": None, "image": None} for row in ROWS[name]]
    with pytest.raises(ValueError, match="the row of .* has neither regions nor image.*with_regions"):
        make(name, SEEING)(rows)


def test_errors():
    row = pretraining_rows(1)[0]
    with pytest.raises(ValueError, match="has no image_id; add the column"):
        make(LXMERTPretrainingCollator)([{"regions": row["regions"], "caption": "a cross"}])
    with pytest.raises(ValueError, match="has 1 answers and 2 answer_scores"):
        make(LXMERTPretrainingCollator)([{**row, "answers": ["red"], "answer_scores": [1.0, 0.3]}] * 9)
    with pytest.raises(ValueError, match="with regions and rows with images only"):
        make(LXMERTRetrievalCollator, SEEING)([row, {**row, "regions": None, "image": picture()}])
    with pytest.raises(ValueError, match="the row of 'a cross' has 1 regions; give two"):
        make(LXMERTPairCollator)([{"regions": [region_row(0)], "sentence": "a cross", "label": 1}])
    with pytest.raises(ValueError, match="'a cross' has no label"):
        make(LXMERTEntailmentCollator)([{"regions": region_row(0), "sentence": "a cross"}])
    with pytest.raises(ValueError, match="image_id 'image 0' has the text ' ', of which cleaning leaves"):
        make(LXMERTRetrievalCollator)([{**row, "caption": " "}])
    with pytest.raises(ValueError, match="answers holds 'red' more than once"):
        make(LXMERTQuestionCollator, answers=["red", "blue", "red"])
    with pytest.raises(ValueError, match="answers is empty"):
        make(LXMERTQuestionCollator, answers=[])
    for name in ("mismatch_probability", "region_mask_probability"):
        with pytest.raises(ValueError, match=f"{name} is 1.5; give a number from 0 to 1"):
            make(LXMERTPretrainingCollator, **{name: 1.5})
    with pytest.raises(ValueError, match="is inverted, empty or outside its image of 80x60"):
        make(LXMERTGroundingCollator)([{"regions": region_row(0), "text": "a cross", "box": [70, 0, 20, 9]}])
