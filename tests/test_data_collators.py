"""Collators: batches of the contract, whole and in workers, augmented and plain, and clear errors for bad
rows.
"""

import logging
import pickle
import random

import pytest
import torch
from data_fixtures import image_text_rows, picture, region_rows, tiny_processor
from PIL import Image
from torch.utils.data import DataLoader

from hf_vlp.data.collators import (
    CaptionCollator,
    GroundingCollator,
    ImageTextCollator,
    RegionCollator,
    RegionGroundingCollator,
    RetrievalCollator,
    stable_id,
)
from hf_vlp.data.masking import TokenMasking, WholeWordMasking


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def decode(processor, batch):
    return processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)


def test_image_text_batch(processor):
    batch = ImageTextCollator(processor=processor)(image_text_rows(6))
    rows, length = batch["input_ids"].shape
    assert batch["pixel_values"].shape == (6, 3, 64, 64) and rows == 6
    for key in ("attention_mask", "mlm_input_ids", "mlm_labels"):
        assert batch[key].shape == (rows, length)
    masked = batch["mlm_labels"] != -100
    assert (masked.sum(1) >= 1).all()
    assert torch.equal(batch["mlm_labels"][masked], batch["input_ids"][masked])


def test_equal_texts_get_equal_ids(processor):
    rows = [{"image": picture(i), "image_id": i, "caption": text} for i, text in enumerate("aabab")]
    rows = [{**row, "caption": {"a": "a red cat", "b": "a red"}[row["caption"]]} for row in rows]
    ids = RetrievalCollator(processor=processor, group_equal_texts=True)(rows)["image_ids"].tolist()
    assert ids[0] == ids[1] == ids[3] != ids[2] == ids[4]


def test_captions_without_masks(processor):
    rows = [{**row, "sample_seed": 3} for row in image_text_rows(4)]
    batch, masked = (name(processor=processor)(rows) for name in (CaptionCollator, ImageTextCollator))
    assert batch.keys() == {"pixel_values", "input_ids", "attention_mask"}
    assert all(torch.equal(value, masked[name]) for name, value in batch.items())


def test_captions_are_drawn_in_training_and_the_first_one_outside(processor):
    rows = image_text_rows(40)
    drawn = set(decode(processor, ImageTextCollator(processor=processor)(rows)))
    assert "a red cat" in drawn and len(drawn) > 3
    assert set(decode(processor, ImageTextCollator(processor=processor, train=False)(rows))) == {"a red cat"}


def test_evaluation_is_repeatable_and_plain(processor):
    rows, collator = image_text_rows(4), ImageTextCollator(processor=processor, train=False)
    one, two = collator(rows), collator(rows)
    assert all(torch.equal(one[key], two[key]) for key in one)
    plain = processor(images=[row["image"] for row in rows])["pixel_values"]
    assert torch.equal(one["pixel_values"], plain)
    unaugmented = ImageTextCollator(processor=processor, augment=False)(rows)["pixel_values"]
    assert torch.equal(unaugmented, plain)


@pytest.mark.parametrize("kind", ["image", "region"])
def test_sample_seed_decides_a_batch(processor, kind):
    rows = image_text_rows(6) if kind == "image" else region_rows(6)
    collator = (ImageTextCollator if kind == "image" else RegionCollator)(processor=processor)
    seeded = [{**row, "sample_seed": 5} for row in rows]
    torch.manual_seed(0)
    one = collator(seeded)
    torch.manual_seed(1)
    two = collator(seeded)
    other = collator([{**row, "sample_seed": 6} for row in rows])
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["pixel_values"].shape != other["pixel_values"].shape or not torch.equal(
        one["pixel_values"], other["pixel_values"]
    )


def test_without_a_seed_the_torch_generator_decides(processor):
    collator, rows = ImageTextCollator(processor=processor), image_text_rows(4)
    torch.manual_seed(0)
    one, two = collator(rows), collator(rows)
    torch.manual_seed(0)
    again = collator(rows)
    assert torch.equal(one["pixel_values"], again["pixel_values"])
    assert not torch.equal(one["pixel_values"], two["pixel_values"])


def test_no_image_is_mirrored_whose_text_names_a_side(processor):
    settings = {
        "processor": processor,
        "crop_scale": (1.0, 1.0),
        "augment_operations": 0,
        "flip_probability": 1.0,
    }
    square = picture(width=64, height=64)
    plain = processor(images=[square, square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])["pixel_values"]
    for caption, expected in (("the left cat", 0), ("leftover cat", 1)):
        rows = [{"image": square, "caption": caption}] * 8
        pixels = ImageTextCollator(**settings)(rows)["pixel_values"]
        # The random aspect ratio may crop a little: look only at the images that stayed whole.
        whole = [image for image in pixels if any(torch.equal(image, other) for other in plain)]
        assert all(torch.equal(image, plain[expected]) for image in whole)


def test_region_batch(processor):
    batch = RegionCollator(processor=processor)(region_rows(5))
    count = len(batch["input_ids"])
    assert batch["pixel_values"].shape == (5, 3, 64, 64)
    assert batch["region_image_index"].shape == batch["is_full_image"].shape == (count,)
    assert batch["region_patch_mask"].shape == (count, 16) and batch["region_patch_mask"].any(1).all()
    assert batch["target_boxes"].shape == (count, 4)
    assert batch["mlm_labels"].shape == batch["mlm_input_ids"].shape == batch["input_ids"].shape
    assert "image_ids" not in batch
    full = batch["is_full_image"]
    assert full.sum() == 5 and batch["region_patch_mask"][full].all()
    assert torch.equal(batch["target_boxes"][full], torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(5, 4))
    assert [text for text, whole in zip(decode(processor, batch), full, strict=True) if whole] == [
        "one mat"
    ] * 5


def test_targets_follow_the_crop_and_the_flip(processor):
    """A white rectangle on black must be where the target box says, after crop, flip and resize."""
    image = Image.new("RGB", (80, 60))
    image.paste((255, 255, 255), (20, 15, 50, 45))
    row = {"image": image, "phrases": ["red box"], "boxes": [[20, 15, 30, 30]]}
    for seed in range(30):
        batch = RegionCollator(processor=processor, augment_operations=0)([{**row, "sample_seed": seed}])
        white = (batch["pixel_values"][0, 0] > 0.5).nonzero() / 64
        (top, left), (bottom, right) = white.min(0).values, white.max(0).values + 1 / 64
        cx, cy, w, h = batch["target_boxes"][0]
        found = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        torch.testing.assert_close(found, torch.stack([left, top, right, bottom]), atol=0.035, rtol=0)


def test_at_most_max_regions_and_the_caption_takes_one(processor):
    batch = RegionCollator(processor=processor, max_regions=3, train=False)(region_rows(2, regions=6))
    assert batch["region_image_index"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["is_full_image"].tolist() == [True, False, False] * 2
    expected = processor.encode_regions([[[5, 6, 12, 20], [15, 6, 12, 20]]], [(60, 80)])
    assert torch.equal(batch["target_boxes"][1:3], expected["target_boxes"])


def test_max_pairs_are_sampled_and_images_without_pairs_left_out(processor):
    rows = region_rows(8)
    shapes = set()
    for seed in range(20):
        collator = RegionCollator(processor=processor, max_pairs=5)
        batch = collator([{**row, "sample_seed": seed} for row in rows])
        index = batch["region_image_index"]
        assert len(index) == 5 and len(batch["input_ids"]) == 5
        assert index.unique().tolist() == list(range(len(batch["pixel_values"])))
        assert (index.diff() >= 0).all()
        shapes.add(len(batch["pixel_values"]))
    assert min(shapes) < 5


def test_no_more_pairs_than_there_are(processor):
    rows = [{"image": picture(), "phrases": ["the cat"], "boxes": [[0, 0, 80, 60]]}]
    batch = RegionCollator(processor=processor)(rows)
    assert len(batch["input_ids"]) == 1 and not batch["is_full_image"].any()


def test_equal_texts_share_an_id(processor):
    rows = [
        {"image": picture(i), "phrases": ["The cat!", "a dog", "the cat"], "boxes": [[0, 0, 9, 9]] * 3}
        for i in (0, 1)
    ]
    batch = RegionCollator(processor=processor, train=False, group_equal_texts=True)(rows)
    assert batch["image_ids"].tolist() == [0, 1, 0, 0, 1, 0]


def test_retrieval_batch(processor):
    rows = [
        {"image": picture(i), "caption": "a cat", "image_id": i_id}
        for i, i_id in enumerate(["x", "y", "x", 7])
    ]
    batch = RetrievalCollator(processor=processor)(rows)
    ids = batch["image_ids"]
    assert ids.dtype == torch.int64 and ids[0] == ids[2] != ids[1] and ids[3] == 7
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids"}
    assert stable_id("COCO_1") == stable_id("COCO_1") == 1774642371936015874
    assert 0 <= stable_id("x") < 2**63


def test_without_a_crop_images_stay_whole(processor):
    """Weakly supervised grounding: images are resized and perhaps mirrored, nothing is cut off."""
    settings = {"processor": processor, "augment_operations": 0, "flip_probability": 0.0}
    rows = [{"image": picture(i), "caption": "a cat", "image_id": i} for i in range(3)]
    plain = processor(images=[row["image"] for row in rows])["pixel_values"]
    whole = RetrievalCollator(**settings, crop_scale=None)(rows)["pixel_values"]
    assert torch.equal(whole, plain)
    assert not torch.equal(RetrievalCollator(**settings)(rows)["pixel_values"], plain)


@pytest.mark.parametrize("name", [ImageTextCollator, RegionCollator])
def test_official_sharpness_reaches_the_images(processor, name):
    def pixels(seed, **settings):
        rows = [{**row, "sample_seed": seed} for row in region_rows(2)]
        return name(processor=processor, augment_operations=6, **settings)(rows)["pixel_values"]

    same = [torch.equal(pixels(seed), pixels(seed, official_sharpness=True)) for seed in range(10)]
    assert 0 < sum(same) < 10


def test_token_masking_is_the_option_for_albef(processor):
    collator = ImageTextCollator(processor=processor, masking=TokenMasking(processor.tokenizer, 1.0))
    batch = collator(image_text_rows(3))
    words = batch["attention_mask"].bool() & (batch["input_ids"] != processor.tokenizer.cls_token_id)
    assert torch.equal(batch["mlm_labels"] != -100, words)


def test_grounding_batch(processor):
    rows = [{"image": picture(i), "text": "left cat", "box": [8, 6, 16, 12]} for i in range(3)]
    batch = GroundingCollator(processor=processor, train=False)(rows)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "target_boxes"}
    torch.testing.assert_close(batch["target_boxes"], torch.tensor([[0.2, 0.2, 0.2, 0.2]]).expand(3, 4))
    drawn = GroundingCollator(processor=processor)(rows)["target_boxes"]
    assert (drawn[:, 2:] >= 0.2 - 1e-6).all()  # a crop can only make the box larger


def test_several_texts_per_image_for_grounding(processor):
    """Regions without their captions, as many texts per image as there are regions."""
    batch = RegionGroundingCollator(processor=processor, augment=False, max_regions=2)(region_rows(3))
    names = {"pixel_values", "input_ids", "attention_mask", "target_boxes", "region_image_index"}
    assert set(batch) == names and batch["region_image_index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["target_boxes"].shape == (6, 4) and (batch["target_boxes"] < 1).all()
    assert "one mat" not in decode(processor, batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_with_workers(processor, workers):
    for collator, rows in (
        (ImageTextCollator(processor=processor), image_text_rows(8)),
        (RegionCollator(processor=processor), region_rows(8)),
    ):
        batches = list(DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=workers))
        assert len(batches) == 4 and all(
            torch.is_tensor(value) for batch in batches for value in batch.values()
        )


def test_workers_differ(processor):
    rows = [{"image": picture(), "caption": "a cat"}] * 4
    torch.manual_seed(0)
    loader = DataLoader(rows, batch_size=1, collate_fn=ImageTextCollator(processor=processor), num_workers=2)
    one, two, *_ = (batch["pixel_values"] for batch in loader)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", [ImageTextCollator, RegionCollator, RetrievalCollator, GroundingCollator])
def test_collators_can_be_pickled(processor, name):
    collator = pickle.loads(pickle.dumps(name(processor=processor, flip_probability=0.25)))
    assert collator.flip_probability == 0.25


def test_images_of_any_mode(processor, tmp_path):
    rows = []
    for mode in ("RGBA", "L", "P", "CMYK"):
        path = tmp_path / f"{mode}.tiff"
        picture(mode=mode).save(path)
        rows.append({"image": {"bytes": None, "path": str(path)}, "caption": "a cat"})
    assert ImageTextCollator(processor=processor)(rows)["pixel_values"].shape == (4, 3, 64, 64)


def test_corrupt_images_raise_or_are_skipped(processor, tmp_path, caplog):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    rows = image_text_rows(2) + [{"image": {"bytes": None, "path": str(bad)}, "caption": "a cat"}]
    with pytest.raises(ValueError, match="bad.png"):
        ImageTextCollator(processor=processor)(rows)
    collator = ImageTextCollator(processor=processor, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        assert len(collator(rows)["pixel_values"]) == 2
    assert "bad.png" in caplog.text
    with pytest.raises(ValueError, match="no row of the batch"):
        collator(rows[2:])
    with pytest.raises(ValueError, match="on_bad_image is 'ignore'"):
        ImageTextCollator(processor=processor, on_bad_image="ignore")


def test_bad_rows(processor):
    image_text = ImageTextCollator(processor=processor)
    region = RegionCollator(processor=processor)
    grounding = GroundingCollator(processor=processor)
    good = {"image": picture(), "phrases": ["a cat"], "boxes": [[0, 0, 5, 5]]}
    with pytest.raises(
        ValueError, match=r"the row of .* has the text '\?!', of which cleaning leaves nothing"
    ):
        image_text([{"image": picture(), "caption": "?!"}])
    with pytest.raises(ValueError, match="has no text"):
        image_text([{"image": picture(), "caption": []}])
    with pytest.raises(ValueError, match="0 phrases and 1 boxes"):
        region([{**good, "phrases": []}])
    with pytest.raises(ValueError, match="2 phrases and 1 boxes"):
        region([{**good, "phrases": ["a", "b"]}])
    with pytest.raises(ValueError, match="has no text"):
        region([{**good, "phrases": [[]]}])
    for box in ([70, 0, 20, 5], [10, 10, -5, 5], [0, 0, 0, 5]):
        with pytest.raises(ValueError, match="inverted, empty or outside"):
            region([{**good, "boxes": [box]}])
        with pytest.raises(ValueError, match="inverted, empty or outside"):
            grounding([{"image": picture(), "text": "a cat", "box": box}])
    with pytest.raises(ValueError, match="has 2 boxes"):
        grounding([{"image": picture(), "text": "a cat", "box": [[0, 0, 5, 5], [0, 0, 6, 6]]}])
    with pytest.raises(ValueError, match="no image_id"):
        RetrievalCollator(processor=processor)([{"image": picture(), "caption": "a cat"}])
    with pytest.raises(ValueError, match="max_pairs is 0"):
        RegionCollator(processor=processor, max_pairs=0)


def test_masking_settings_are_used(processor):
    masking = WholeWordMasking(processor.tokenizer, mask_probability=1.0, max_masks=2)
    batch = ImageTextCollator(processor=processor, masking=masking)(
        [{"image": picture(), "caption": "a red cat on the mat"}] * 3
    )
    assert ((batch["mlm_labels"] != -100).sum(1) == 2).all()


def test_choice_of_anchor_covers_all_boxes(processor):
    """Each box of a row is kept whole by some crop, also the ones in the corners."""
    boxes = [[0, 0, 10, 10], [70, 50, 10, 10]]
    row = {"image": picture(), "phrases": ["a", "the"], "boxes": boxes}
    texts = set()
    for seed in range(20):
        batch = RegionCollator(processor=processor)(
            [{**row, "sample_seed": random.Random(seed).getrandbits(60)}]
        )
        texts |= set(decode(processor, batch))
        assert batch["target_boxes"].isfinite().all()
    assert texts == {"a", "the"}
