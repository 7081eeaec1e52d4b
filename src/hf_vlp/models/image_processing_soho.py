"""Images for SOHO: resized as OpenCV does it, normalised, and padded to one canvas."""

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict

_BITS = 11  # of the weights in OpenCV's resize of bytes


class SOHOImageProcessor(PilBackend):
    """Images with their aspect ratio kept: the shorter side becomes `size["shortest_edge"]` pixels, or the
    longer one `size["longest_edge"]` where it would become longer.

    Gives `pixel_values` (B, 3, H, W), RGB less the mean over the standard deviation, with zeros on the right
    and below up to multiples of `pad_to_multiple_of` and to the largest image, and `pixel_mask` (B, H, W),
    True on the image. Resizing is that of OpenCV on bytes, on which the released weights were trained.
    """

    _auto_class = "AutoImageProcessor"
    model_input_names = ["pixel_values", "pixel_mask"]
    size = {"shortest_edge": 600, "longest_edge": 1000}
    default_to_square = False
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    pad_to_multiple_of = 32
    do_convert_rgb = True

    def _preprocess(
        self,
        images: list[np.ndarray],
        size: SizeDict,
        image_mean,
        image_std,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        mean, std = (
            255 * np.asarray(value, dtype=np.float32)[:, None, None] for value in (image_mean, image_std)
        )
        resized = []
        for image in images:  # (3, H, W) bytes
            target = scaled_size(*image.shape[-2:], size["shortest_edge"], size["longest_edge"])
            pixels = resize_bytes(np.asarray(image, dtype=np.uint8), *target).astype(np.float32)
            resized.append(torch.from_numpy((pixels - mean) / std))
        step = self.pad_to_multiple_of
        height, width = (-(-max(one.shape[dim] for one in resized) // step) * step for dim in (1, 2))
        mask = torch.zeros(len(resized), height, width, dtype=torch.bool)
        for row, one in zip(mask, resized, strict=True):
            row[: one.shape[1], : one.shape[2]] = True
        canvas = [pad(one, (0, width - one.shape[2], 0, height - one.shape[1])) for one in resized]
        return BatchFeature(
            {"pixel_values": torch.stack(canvas), "pixel_mask": mask}, tensor_type=return_tensors
        )


def scaled_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """Height and width after scaling, rounded half up."""
    scale = min(longest_edge / max(height, width), shortest_edge / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_bytes(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bytes (C, H, W) to (C, height, width), bilinear without antialiasing in OpenCV's whole-number
    arithmetic."""
    if image.shape[-2:] == (height, width):
        return image
    (top, above, below), (left, before, after) = (
        _weights(old, new) for old, new in zip(image.shape[-2:], (height, width), strict=True)
    )
    right, bottom = (
        np.minimum(start + 1, length - 1) for start, length in ((left, image.shape[2]), (top, image.shape[1]))
    )
    image = image.astype(np.int32)
    rows = image[:, :, left] * before + image[:, :, right] * after  # (C, H, width), 11 more bits
    rows >>= 4
    upper, lower = rows[:, top] * above[:, None] >> 16, rows[:, bottom] * below[:, None] >> 16
    return ((upper + lower + 2) >> 2).clip(0, 255).astype(np.uint8)


def _weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` places the first of its two places among `old`, and the weights of both."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    start = np.floor(place).astype(np.int64)
    share = place - start.astype(np.float32)
    outside = (start < 0) | (start >= old - 1)
    start, share = start.clip(0, old - 1), np.where(outside, np.float32(0), share)
    scale = np.float32(1 << _BITS)
    first, second = (np.rint(weight * scale).astype(np.int32) for weight in (np.float32(1) - share, share))
    return start, first, second
