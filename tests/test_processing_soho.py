"""SOHO's images: sizes, the resize of OpenCV, padding and masks; its texts and boxes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_soho_processor, tiny_tokenizer
from transformers import AutoImageProcessor, AutoProcessor

from hf_vlp import SOHOImageProcessor, SOHOProcessor
from hf_vlp.models.image_processing_soho import resize_bytes, scaled_size


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def resized_pixel(image: np.ndarray, row: int, column: int, height: int, width: int) -> int:
    """One byte of the resized image (H, W), step by step as OpenCV computes it."""

    def weigh(place: int, new: int, old: int):
        where = np.float32((place + 0.5) * (old / new) - 0.5)
        first = int(np.floor(where))
        share = np.float32(where - np.float32(first))
        weights = [int(np.rint(value * np.float32(2048))) for value in (np.float32(1) - share, share)]
        return max(first, 0), min(max(first + 1, 0), old - 1), weights

    top, bottom, (above, below) = weigh(row, height, image.shape[0])
    left, right, (before, after) = weigh(column, width, image.shape[1])
    upper, lower = (int(image[y, left]) * before + int(image[y, right]) * after for y in (top, bottom))
    value = ((above * (upper >> 4)) >> 16) + ((below * (lower >> 4)) >> 16)
    return (value + 2) >> 2


@pytest.mark.parametrize(
    ("size", "scaled", "padded"),
    [
        ((600, 800), (600, 800), (608, 800)),
        ((480, 640), (600, 800), (608, 800)),
        ((600, 1200), (500, 1000), (512, 1024)),
        ((300, 300), (600, 600), (608, 608)),
        ((427, 640), (600, 899), (608, 928)),
    ],
)
def test_sizes(size, scaled, padded):
    assert scaled_size(*size, 600, 1000) == scaled
    batch = SOHOImageProcessor()(picture(*size), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, *padded)
    assert batch["pixel_mask"].sum() == scaled[0] * scaled[1]
    assert batch["pixel_mask"][0, : scaled[0], : scaled[1]].all()


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 4), st.integers(0, 99))
def test_resize_is_that_of_opencv(sides, seed):
    old_height, old_width, height, width = sides
    image = np.array(picture(old_height, old_width, seed))[..., 0]
    expected = [
        [resized_pixel(image, row, column, height, width) for column in range(width)] for row in range(height)
    ]
    assert resize_bytes(image[None], height, width)[0].tolist() == expected


def test_resize_gives_what_opencv_gave():
    """`cv2.resize` 4.5.5, 4.10 and 5.0 of three rows; the first and last rows keep both their weights."""
    image = np.array([[29, 240, 66], [19, 182, 39], [59, 4, 59]], dtype=np.uint8)
    expected = [
        [29, 59, 149, 240, 165, 91, 66],
        [28, 58, 147, 236, 163, 89, 64],
        [25, 52, 133, 215, 146, 77, 54],
        [21, 45, 119, 193, 129, 65, 44],
        [26, 44, 96, 149, 103, 58, 43],
        [41, 47, 65, 82, 68, 55, 50],
        [56, 50, 33, 15, 33, 51, 58],
        [59, 51, 27, 4, 27, 51, 59],
    ]
    assert resize_bytes(image[None], 8, 7)[0].tolist() == expected


def test_a_flat_image_stays_flat():
    image = np.full((3, 7, 5), 200, dtype=np.uint8)
    assert (resize_bytes(image, 13, 11) == 200).all()


def test_normalisation_and_one_canvas():
    """Padding comes after normalisation, so it is the mean colour."""
    processor = SOHOImageProcessor(size={"shortest_edge": 40, "longest_edge": 80})
    wide, tall = picture(40, 60), picture(70, 40, seed=1)
    batch = processor([wide, tall], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 96, 64)
    mean, std = (
        torch.tensor(value)[:, None, None] for value in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    expected = (torch.from_numpy(np.array(wide)).permute(2, 0, 1) - mean) / std
    torch.testing.assert_close(batch["pixel_values"][0, :, :40, :60], expected, atol=1e-6, rtol=1e-6)
    assert not batch["pixel_values"][~batch["pixel_mask"][:, None].expand(-1, 3, -1, -1)].any()
    assert batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [40 * 60, 70 * 40]


def test_processor(tmp_path):
    processor = tiny_soho_processor()
    batch = processor(images=[picture(50, 70)], text=["a Red circle ", "a"])
    assert batch.input_ids.tolist() == [[2, 5, 8, 12, 3], [2, 5, 3, 0, 0]]
    assert processor(text=" ".join(["red"] * 30)).input_ids.shape == (1, 16)
    boxes = processor.encode_regions([[[10, 5, 20, 10]]], [(20, 40)])["target_boxes"]
    torch.testing.assert_close(boxes, torch.full((1, 4), 0.5))
    torch.testing.assert_close(
        processor.post_process_boxes(boxes, [(20, 40)]), torch.tensor([[10.0, 5, 30, 15]])
    )
    processor.save_pretrained(tmp_path)
    for loader in (SOHOProcessor, AutoProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is SOHOProcessor and loaded.max_tokens == 16
        again = loaded(images=[picture(50, 70)], text=["a Red circle ", "a"])
        assert all(torch.equal(again[name], value) for name, value in batch.items())
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SOHOImageProcessor


@pytest.mark.parametrize(("inputs", "match"), [({}, "both None"), ({"text": [" "]}, "no word")])
def test_processor_refuses(inputs, match):
    with pytest.raises(ValueError, match=match):
        SOHOProcessor(SOHOImageProcessor(), tiny_tokenizer())(**inputs)


@pytest.mark.parametrize(
    ("images", "settings", "match"),
    [
        ([], {}, "images is empty"),
        (np.zeros((60, 80, 3), np.float32), {}, "float32"),
        (picture(1, 3000), {}, "less narrow"),
        (picture(20, 640), {}, "less narrow"),
        (picture(60, 80), {"size": {"height": 64, "width": 64}}, "shortest_edge"),
        (picture(60, 80), {"size": {"shortest_edge": 64}}, "longest_edge"),
    ],
)
def test_images_it_refuses(images, settings, match):
    with pytest.raises(ValueError, match=match):
        SOHOImageProcessor()(images, **settings, return_tensors="pt")
