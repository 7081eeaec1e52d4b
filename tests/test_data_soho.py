"""SOHO's data: its files, batches of several captions for each image, soft answers, masks of padding, and
batches of one orientation.
"""

import json
from collections import Counter

import datasets
import pytest
import torch
from data_fixtures import picture, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from hf_vlp.data.collators import RetrievalCollator
from hf_vlp.data.mixing import MixedDataset
from hf_vlp.data.orientation import OrientationBatchSampler, with_image_sizes
from hf_vlp.data.soho_collators import SOHOPretrainingCollator, SOHOQuestionCollator
from hf_vlp.data.soho_readers import read_soho_answers, read_soho_pretraining, read_soho_vqa
from hf_vlp.data.task_collators import EntailmentCollator, PairCollator

WORDS = ["a", "the", "red", "blue", "cat", "dog", "sit", "mat", "box", "one", "two", "three"]


class PaddingProcessor:
    """Images of their own size, padded right and below; texts as [CLS] words [SEP]."""

    def __init__(self):
        self.tokenizer = tiny_tokenizer()

    def __call__(self, *, images=None, text=None, return_tensors="pt") -> dict:
        batch = self.image_processor(images) if images is not None else {}
        return batch | (self.encode_questions(text) if text is not None else {})

    def image_processor(self, images, return_tensors="pt", size=None) -> dict:
        if size is not None:
            images = [F.resize(image, size["shortest_edge"]) for image in images]
        images = [F.pil_to_tensor(image).float() for image in images]
        height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
        pixels = torch.zeros(len(images), 3, height, width)
        mask = torch.zeros(len(images), height, width, dtype=torch.bool)
        for row, image in enumerate(images):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
            mask[row, : image.shape[1], : image.shape[2]] = True
        return {"pixel_values": pixels, "pixel_mask": mask}

    def clean_text(self, text: str) -> str:
        return text

    def encode_questions(self, questions) -> dict:
        texts = [f"[CLS] {text} [SEP]" for text in questions]
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))


PROCESSOR = PaddingProcessor()


def captions_of(image: int) -> list[str]:
    return [f"{WORDS[image]} {WORDS[4 + number]}" for number in range(4)]


def rows(count: int = 6, **columns) -> list[dict]:
    return [
        {"image": picture(i, 40 + i, 30), "image_id": str(i), "caption": captions_of(i), **columns}
        for i in range(count)
    ]


def words_of(batch: dict) -> list[str]:
    """The texts as they were before masking."""
    ids = torch.where(batch["mlm_labels"] == -100, batch["mlm_input_ids"], batch["mlm_labels"])
    return [
        " ".join(text.split()) for text in PROCESSOR.tokenizer.batch_decode(ids, skip_special_tokens=True)
    ]


# Pre-training


def test_pretraining_batch():
    batch = SOHOPretrainingCollator(processor=PROCESSOR)(rows(sample_seed=3))
    assert set(batch) == {
        *("pixel_values", "pixel_mask", "mlm_input_ids", "attention_mask", "mlm_labels", "itm_labels")
    }
    assert batch["pixel_values"].shape == (6, 3, 30, 45) and batch["pixel_mask"].shape == (6, 30, 45)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [30 * (40 + i) for i in range(6)]
    assert batch["mlm_input_ids"].shape == batch["mlm_labels"].shape == batch["attention_mask"].shape
    assert batch["itm_labels"].shape == (24,) and batch["itm_labels"].dtype == torch.int64
    for number, (text, label) in enumerate(zip(words_of(batch), batch["itm_labels"].tolist(), strict=True)):
        own = captions_of(number // 4)
        assert (text == own[number % 4]) if label else (text not in own)
        assert text in [caption for image in range(6) for caption in captions_of(image)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40))
def test_of_each_image_half_of_the_texts_are_others(seed):
    collator = SOHOPretrainingCollator(processor=PROCESSOR, balanced=True)
    labels = collator(rows(3, sample_seed=seed))["itm_labels"].view(3, 4)
    assert labels.sum(1).tolist() == [2, 2, 2]


def test_texts_are_replaced_independently_of_each_other():
    collator = SOHOPretrainingCollator(processor=PROCESSOR)
    counts = Counter()
    for seed in range(100):
        counts.update(collator(rows(sample_seed=seed))["itm_labels"].view(-1, 4).sum(1).tolist())
    shares = [counts[number] / 600 for number in range(5)]
    assert shares == pytest.approx([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], abs=0.05)


def test_any_caption_of_any_other_image_may_come():
    collator = SOHOPretrainingCollator(processor=PROCESSOR, mismatch_probability=1.0)
    found = {text for seed in range(40) for text in words_of(collator(rows(3, sample_seed=seed)))[:4]}
    assert found == {*captions_of(1), *captions_of(2)}


def test_two_rows_of_one_image_lend_each_other_nothing():
    collator = SOHOPretrainingCollator(processor=PROCESSOR, mismatch_probability=1.0)
    same = [{**row, "image_id": 7} for row in rows(3)]
    assert collator(same)["itm_labels"].tolist() == [1] * 12
    mixed = [*same[:2], rows(3)[2]]
    for seed in range(5):
        texts = words_of(collator([{**row, "sample_seed": seed} for row in mixed]))
        assert set(texts[:8]) <= set(captions_of(2)) and not set(texts[8:]) & set(captions_of(2))


def test_other_numbers_of_captions():
    one = {"image": picture(0), "image_id": 0, "caption": "red cat"}
    five = {"image": picture(1), "image_id": 1, "caption": [f"{word} dog" for word in WORDS[:5]]}
    collator = SOHOPretrainingCollator(processor=PROCESSOR, mismatch_probability=0.0)
    drawn = Counter()
    for seed in range(40):
        texts = words_of(collator([{**row, "sample_seed": seed} for row in (one, five)]))
        assert texts[:4] == ["red cat"] * 4 and len(set(texts[4:])) == 4
        drawn.update(texts[4:])
    assert set(drawn) == set(five["caption"])
    still = SOHOPretrainingCollator(processor=PROCESSOR, mismatch_probability=0.0, train=False)
    assert words_of(still([five])) == five["caption"][:4]


@pytest.mark.parametrize("predict_all", [True, False])
def test_words_of_matched_pairs_alone_are_predicted(predict_all):
    """Masks are in all texts, so that they do not tell which belong."""
    collator = SOHOPretrainingCollator(processor=PROCESSOR, predict_mismatched=predict_all)
    predicted, masked = set(), set()
    for seed in range(20):
        batch = collator(rows(sample_seed=seed))
        with_label = (batch["mlm_labels"] != -100).any(1)
        with_mask = (batch["mlm_input_ids"] == PROCESSOR.tokenizer.mask_token_id).any(1)
        predicted |= set(batch["itm_labels"][with_label].tolist())
        masked |= set(batch["itm_labels"][with_mask].tolist())
    assert predicted == ({0, 1} if predict_all else {1}) and masked == {0, 1}


def test_a_balance_without_wrong_texts_is_refused():
    with pytest.raises(ValueError, match="rounded to none"):
        SOHOPretrainingCollator(
            processor=PROCESSOR, balanced=True, captions_per_image=2, mismatch_probability=0.25
        )


def test_a_batch_depends_on_its_seed_alone():
    collator = SOHOPretrainingCollator(processor=PROCESSOR)
    one, two = (collator(rows(sample_seed=5)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = collator(rows(sample_seed=6))
    assert not torch.equal(one["itm_labels"], other["itm_labels"])


def test_unreadable_images_take_their_captions_along(tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    some = rows(3)
    some[1]["image"] = str(bad)
    batch = SOHOPretrainingCollator(processor=PROCESSOR, on_bad_image="skip", mismatch_probability=1.0)(some)
    assert len(batch["pixel_values"]) == 2 and len(batch["itm_labels"]) == 8
    assert not set(words_of(batch)) & set(captions_of(1))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"captions_per_image": 0}, "captions_per_image is 0"),
        ({"mismatch_probability": 1.5}, "mismatch_probability is 1.5"),
    ],
)
def test_errors_of_the_pretraining(fields, match):
    with pytest.raises(ValueError, match=match):
        SOHOPretrainingCollator(processor=PROCESSOR, **fields)


def test_errors_of_its_rows():
    collator = SOHOPretrainingCollator(processor=PROCESSOR)
    with pytest.raises(ValueError, match="has no image_id"):
        collator([{"image": picture(), "caption": "a cat"}])
    with pytest.raises(ValueError, match="has no caption"):
        collator([{"image": picture(), "caption": [], "image_id": 1}])


# Questions and the tasks of other collators

QUESTIONS = [
    {
        "image": picture(0, 40, 30),
        "question": "the cat",
        "answers": ["red", "box"],
        "answer_scores": [1.0, 0.3],
    },
    {"image": picture(1, 50, 60), "question": "a dog sit", "answers": ["blue"], "answer_scores": [0.6]},
]


def test_question_batch():
    batch = SOHOQuestionCollator(processor=PROCESSOR, answers=["blue", "red"])(QUESTIONS)
    assert set(batch) == {"pixel_values", "pixel_mask", "input_ids", "attention_mask", "labels"}
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [1200, 3000] and len(batch["input_ids"]) == 2
    torch.testing.assert_close(batch["labels"], torch.tensor([[0.0, 1.0], [0.6, 0.0]]))
    unanswered = [{"image": picture(), "question": "a cat"}]
    collator = SOHOQuestionCollator(processor=PROCESSOR, answers=["red"], train=False)
    assert "labels" not in collator(unanswered)


def test_sizes_are_drawn_in_training_alone():
    sizes = set()
    for seed in range(20):
        collator = SOHOQuestionCollator(processor=PROCESSOR, answers=["red"], shortest_edges=(20, 22))
        batch = collator([{**QUESTIONS[0], "sample_seed": seed}])
        sizes.add(batch["pixel_values"].shape[2])
    assert sizes == {20, 21, 22}
    still = SOHOQuestionCollator(processor=PROCESSOR, answers=["red"], shortest_edges=(20, 22), train=False)
    assert still(QUESTIONS[:1])["pixel_values"].shape[2:] == (30, 40)
    with pytest.raises(ValueError, match=r"shortest_edges is \(800, 400\)"):
        SOHOQuestionCollator(processor=PROCESSOR, answers=["red"], shortest_edges=(800, 400))


def test_other_collators_pass_the_mask_on():
    images = [picture(0, 40, 30), picture(1, 50, 60)]
    pair = [
        {"images": images, "sentence": "a cat", "label": 1},
        {"images": images[::-1], "sentence": "a", "label": 0},
    ]
    batch = PairCollator(processor=PROCESSOR, augment=False)(pair)
    assert batch["pixel_values"].shape == (2, 2, 3, 60, 50)
    assert batch["pixel_mask"].sum((2, 3)).tolist() == [[1200, 3000], [3000, 1200]]
    assert len(batch["input_ids"]) == 2
    single = [
        {"image": image, "sentence": "a cat", "caption": "a cat", "label": 1, "image_id": 1}
        for image in images
    ]
    for collator in (EntailmentCollator, RetrievalCollator):
        batch = collator(processor=PROCESSOR, augment=False)(single)
        assert batch["pixel_mask"].sum((1, 2)).tolist() == [1200, 3000]
        assert torch.equal(batch["pixel_values"][0, :, :30, :40], F.pil_to_tensor(images[0]).float())


# Files


def entry(number: int, width: int = 640, height: int = 480, **keys) -> dict:
    return {"file_name": f"{number}.jpg", "image_id": number, "width": width, "height": height, **keys}


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_read_pretraining(tmp_path, streaming):
    five = [f"caption {i}" for i in range(5)]
    file = write(
        tmp_path / "train.json",
        [
            entry(1, captions=five, labels=[3]),
            entry(2, 31, 480, captions=five),
            entry(3, 32, 480, captions=["one"]),
            entry(4, captions=five[:4]),
        ],
    )
    found = list(read_soho_pretraining(file, "images", streaming=streaming))
    assert [row["image_id"] for row in found] == ["1", "1", "3", "4"]
    assert [row["caption"] for row in found if row["image_id"] != "1"] == [["one"] * 4, five[:4]]
    assert found[0]["caption"] == five[:4] and found[1]["caption"][0] == five[4]
    assert len(found[1]["caption"]) == len(set(found[1]["caption"][1:])) + 1 == 4
    assert set(found[1]["caption"]) <= set(five)
    assert found == list(read_soho_pretraining(file, "images", streaming=True))
    assert (found[0]["width"], found[0]["height"], found[0]["image"]["path"]) == (640, 480, "images/1.jpg")
    assert [len(row["caption"]) for row in read_soho_pretraining(file, "images", captions_per_row=5)] == [
        5
    ] * 3


def test_read_vqa(tmp_path):
    questions = [
        {"question": "What?", "question_id": 10, "labels": [1, 0], "scores": [1, 0.3]},
        {"question": "Who?", "question_id": 11, "labels": [], "scores": []},
    ]
    data = [entry(1, vqa=questions), entry(2, 20, 20, vqa=questions)]
    answers = {"ans2label": {"no": 0, "yes": 1}, "label2ans": ["no", "yes"]}
    file = write(tmp_path / "vqa.json", {"data": data, **answers})
    first, second = read_soho_vqa(file, "images")
    assert first["question"] == "What?" and first["question_id"] == 10 and first["image_id"] == "1"
    assert first["answers"] == ["yes", "no"] and first["answer_scores"] == [1.0, 0.3]
    assert second["answers"] == [] and second["image"]["path"] == "images/1.jpg"
    assert read_soho_answers(file) == ["no", "yes"]
    test = [entry(3, 20, 20, question="Where?", question_id=12, labels=[5])]
    (row,) = read_soho_vqa(write(tmp_path / "test.json", {"data": test, **answers}), "images")
    assert row["question_id"] == 12 and row["answers"] == [] and row["width"] == 20


def test_a_read_row_makes_a_batch(tmp_path):
    for number in (1, 2):
        picture(number, 64, 48).save(tmp_path / f"{number}.jpg")
    file = write(tmp_path / "a.json", [entry(n, 64, 48, captions=captions_of(n)) for n in (1, 2)])
    batch = SOHOPretrainingCollator(processor=PROCESSOR)(list(read_soho_pretraining(file, tmp_path)))
    assert batch["pixel_values"].shape == (2, 3, 48, 64) and len(batch["itm_labels"]) == 8


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([entry(1)], "entry 0: lacks captions"),
        ([entry(1, captions=[])], r"entry 0: captions is \[\]"),
        ([entry(1, captions=["a"]) | {"width": None}], "entry 0"),
    ],
)
def test_errors_of_pretraining_files(tmp_path, content, match):
    with pytest.raises(ValueError, match=match):
        read_soho_pretraining(write(tmp_path / "a.json", content), "images")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([entry(1)], "is not SOHO's VQA"),
        ({"data": [], "label2ans": {"a": 0}}, "is not SOHO's VQA"),
        ({"data": [entry(1)], "label2ans": ["a"]}, "entry 0: lacks 'question'"),
        ({"data": [{"vqa": []}], "label2ans": ["a"]}, "entry 0: lacks 'file_name'"),
        ({"data": [entry(1, question="a", question_id="b")], "label2ans": ["a"]}, "question_id is 'b'"),
        (
            {
                "data": [entry(1, vqa=[{"question": "a", "question_id": 1, "labels": [1], "scores": [1]}])],
                "label2ans": ["a"],
            },
            r"labels is \[1\]",
        ),
    ],
)
def test_errors_of_vqa_files(tmp_path, content, match):
    with pytest.raises(ValueError, match=match):
        read_soho_vqa(write(tmp_path / "a.json", content), "images")


# Orientation


def sized(wide: int, tall: int) -> list[dict]:
    sizes = [(20, 10)] * wide + [(10, 20)] * (tall - tall // 2) + [(10, 10)] * (tall // 2)
    return [{"number": i, "width": width, "height": height} for i, (width, height) in enumerate(sizes)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_batches_of_one_orientation(wide, tall, batch_size, run_length, epoch):
    batches = -(-wide // batch_size) + -(-tall // batch_size)
    if batches < run_length:
        return
    dataset = MixedDataset(sized(wide, tall))
    sampler = OrientationBatchSampler(dataset, batch_size, run_length)
    sampler.set_epoch(epoch)
    seen, found = set(), list(sampler)
    assert len(found) == len(sampler) == batches // run_length * run_length
    for keys in found:
        kinds, indices, seeds = zip(*keys, strict=True)
        assert len(keys) == batch_size and set(kinds) == {"image"} and len(set(seeds)) == 1
        assert len({index < wide for index in indices}) == 1
        seen |= set(indices)
    if batches % run_length == 0:
        assert seen == set(range(wide + tall))
    assert list(sampler) == found


def test_orientations_are_mixed_anew_in_each_epoch():
    sampler = OrientationBatchSampler(MixedDataset(sized(40, 40)), 2)
    first = [keys[0][1] < 40 for keys in sampler]
    sampler.set_epoch(1)
    second = [keys[0][1] < 40 for keys in sampler]
    assert first != second and first != sorted(first) and sum(first) == sum(second) == 20


def test_a_loader_reads_its_rows():
    dataset = MixedDataset(datasets.Dataset.from_list(sized(5, 4)))
    sampler = OrientationBatchSampler(dataset, 2)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=list))
    assert len(batches) == 5
    for batch in batches:
        assert len({row["width"] > row["height"] for row in batch}) == 1
        assert len({row["sample_seed"] for row in batch}) == 1


def test_sizes_of_images(tmp_path):
    images = [picture(0, 40, 30), picture(1, 20, 60, mode="L")]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = with_image_sizes(datasets.Dataset.from_list([{"image": image} for image in images], features))
    assert rows["width"][:] == [40, 20] and rows["height"][:] == [30, 60]
    assert isinstance(images[0], Image.Image) and rows.features["image"] == features["image"]


def test_errors_of_orientation():
    with pytest.raises(ValueError, match="needs the columns width and height"):
        OrientationBatchSampler(MixedDataset([{"width": 3}]), 1)
    with pytest.raises(ValueError, match="needs the columns width and height"):
        OrientationBatchSampler(MixedDataset(datasets.Dataset.from_list([{"width": 3}])), 1)
    with pytest.raises(ValueError, match="dataset has regions"):
        OrientationBatchSampler(MixedDataset(sized(1, 1), sized(1, 1)), 1)
    with pytest.raises(ValueError, match="has 2 rows, fewer"):
        OrientationBatchSampler(MixedDataset(sized(2, 0)), 2, run_length=2)
