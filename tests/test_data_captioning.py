"""Captions to be written: Karpathy's files, batches with prompts, and batches with references."""

import json
import pickle

import pytest
import torch
from data_fixtures import image_text_rows, picture, tiny_processor

from hf_vlp.data.caption_collators import CaptioningCollator, SelfCriticalCollator
from hf_vlp.data.readers import read_karpathy
from hf_vlp.data.shapes import shapes_dataset

PROCESSOR = tiny_processor()
PROCESSOR.prompt = "a the"


def test_caption_batch():
    rows = [{"image": picture(0), "caption": ["The red cat!"]}, {"image": picture(1), "caption": "a box"}]
    batch = CaptioningCollator(processor=PROCESSOR, train=False)(rows)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    words = PROCESSOR.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["[CLS]", "a", "the", "the", "red", "cat", "[SEP]"]
    assert batch["labels"][0].tolist() == [-100] * 3 + batch["input_ids"][0, 3:].tolist()
    assert batch["labels"][1].tolist() == [-100] * 3 + batch["input_ids"][1, 3:6].tolist() + [-100]
    assert batch["attention_mask"].sum(1).tolist() == [7, 6]


@pytest.mark.parametrize("collator", [CaptioningCollator, SelfCriticalCollator])
def test_batches_are_drawn_from_their_seed(collator):
    rows = [row | {"sample_seed": 7} for row in image_text_rows(4)]
    collator = pickle.loads(pickle.dumps(collator(processor=PROCESSOR)))
    one, two = collator(rows), collator(rows)
    assert all(torch.equal(one[key], two[key]) for key in one if key != "references")
    assert one.get("references") == two.get("references")
    assert not torch.equal(
        collator([row | {"sample_seed": 8} for row in rows])["pixel_values"], one["pixel_values"]
    )


def test_no_image_is_mirrored_whose_captions_name_a_side():
    rows = [{"image": picture(0), "caption": ["one cat", "the left cat"], "sample_seed": s} for s in range(9)]
    settings = {"processor": PROCESSOR, "crop_scale": None, "augment_operations": 0, "flip_probability": 1.0}
    whole = PROCESSOR(images=[picture(0)])["pixel_values"]
    for row in rows:
        assert torch.equal(SelfCriticalCollator(**settings)([row])["pixel_values"], whole)


def test_self_critical_batch():
    captions = ["The cat", "a dog.", "one box", "two", "three", "bright"]
    rows = [{"image": picture(0), "caption": captions}, {"image": picture(1), "caption": "a red box"}]
    batch = SelfCriticalCollator(processor=PROCESSOR, train=False)(rows)
    assert batch["references"] == [["the cat", "a dog", "one box", "two", "three"], ["a red box"]]
    assert batch["input_ids"].tolist() == PROCESSOR.encode_prompt()["input_ids"].tolist() * 2
    drawn = SelfCriticalCollator(processor=PROCESSOR, max_references=2)(rows)["references"]
    assert len(set(drawn[0])) == 2 and drawn[1] == ["a red box"]


def test_rows_without_captions():
    for collator in (CaptioningCollator, SelfCriticalCollator):
        with pytest.raises(ValueError, match="no text"):
            collator(processor=PROCESSOR)([{"image": picture(0), "caption": []}])
    with pytest.raises(ValueError, match="max_references is 0"):
        SelfCriticalCollator(processor=PROCESSOR, max_references=0)


def test_drawn_scenes():
    from tiny import tiny_processor

    rows = shapes_dataset("captions", "train", 4)
    batch = CaptioningCollator(processor=tiny_processor(), augment=False)(list(rows))
    assert len(batch["input_ids"]) == 4


# Karpathy's files


def entry(number: int, split: str, **fields) -> dict:
    sentences = [{"raw": f"Caption {number}.", "tokens": ["caption"]}, {"raw": "another", "tokens": []}]
    return {"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences} | fields


@pytest.fixture
def file(tmp_path):
    coco = {"filepath": "val2014", "cocoid": 77}
    entries = [entry(0, "train"), entry(1, "test"), entry(2, "restval", **coco), entry(3, "val")]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"dataset": "coco", "images": entries}))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_karpathy(file, streaming):
    rows = list(read_karpathy(file, "coco", streaming=streaming))
    assert [row["image"]["path"] for row in rows] == ["coco/0.jpg", "coco/val2014/2.jpg"]
    assert [row["image_id"] for row in rows] == ["0", "77"]
    assert rows[0]["caption"] == ["Caption 0.", "another"]
    assert [row["image_id"] for row in read_karpathy(file, "coco", "test")] == ["1"]


def test_what_is_none_of_karpathys(file, tmp_path):
    with pytest.raises(ValueError, match="split is dev; .* has restval, test, train, val"):
        read_karpathy(file, "coco", "dev")
    for content, message in (
        ([], "no list of images"),
        ({"images": [{"split": "train"}]}, "image 0: not one"),
        ({"images": [entry(0, "train", sentences=[])]}, "sentences is"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_karpathy(tmp_path / "other.json", "coco")
