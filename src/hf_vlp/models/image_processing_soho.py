"""Images for SOHO: resized as OpenCV does it, normalised, and padded to one canvas."""

from collections.abc import Sequence

import numpy as np
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
        if not images:
            raise ValueError("images is empty; give at least one")
        if not (size["shortest_edge"] and size["longest_edge"]):
            raise ValueError(f'size is {dict(size)}; give {{"shortest_edge": ..., "longest_edge": ...}}')
        tables = _normalised_bytes(image_mean, image_std)
        resized = [
            self._scaled(image, size["shortest_edge"], size["longest_edge"]) for image in images
        ]  # (3, H, W) bytes
        step = self.pad_to_multiple_of
        height, width = (-(-max(one.shape[dim] for one in resized) // step) * step for dim in (1, 2))
        pixels = np.zeros((len(resized), 3, height, width), dtype=np.float32)
        mask = np.zeros((len(resized), height, width), dtype=bool)
        for i, one in enumerate(resized):
            mask[i, : one.shape[1], : one.shape[2]] = True
            for channel, table in enumerate(tables):
                pixels[i, channel, : one.shape[1], : one.shape[2]] = table[one[channel]]
        return BatchFeature({"pixel_values": pixels, "pixel_mask": mask}, tensor_type=return_tensors)

    def _scaled(self, image: np.ndarray, shortest_edge: int, longest_edge: int) -> np.ndarray:
        """Bytes (3, H, W) at the size that the model reads.

        Raises:
            ValueError: no bytes, or an image of one row or column of cells, of which the model keeps none.
        """
        if image.dtype != np.uint8:
            raise ValueError(f"images hold {image.dtype} values; give PIL images or uint8 pixels, 0..255")
        height, width = scaled_size(*image.shape[-2:], shortest_edge, longest_edge)
        if min(height, width) <= self.pad_to_multiple_of:
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[1]} pixels is {min(height, width)} pixels wide on "
                f"its shorter side once scaled, and needs more than {self.pad_to_multiple_of}; crop it to "
                "a less narrow one"
            )
        return resize_bytes(image, height, width)


def _normalised_bytes(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What each byte becomes in each channel (3, 256), for a mean and standard deviation of values in 0..1.

    Rounded where OpenCV rounds: the difference to single precision, the division in double.
    """
    mean, std = (255 * np.asarray(value, dtype=np.float64)[:, None] for value in (mean, std))
    differences = np.arange(256, dtype=np.float32) - mean.astype(np.float32)
    return (differences.astype(np.float64) * (1 / std)).astype(np.float32)


def scaled_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """Height and width after scaling, rounded half up."""
    scale = min(longest_edge / max(height, width), shortest_edge / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_bytes(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bytes (C, H, W) to (C, height, width), bilinear without antialiasing: byte for byte what OpenCV's
    `INTER_LINEAR` gives."""
    if image.shape[-2:] == (height, width):
        return image
    left, right, before, after = _weights(image.shape[2], width)
    top, bottom, above, below = _weights(image.shape[1], height)
    rows = image.take(left, axis=2) * before + image.take(right, axis=2) * after  # (C, H, width)
    rows >>= 4
    upper, lower = rows[:, top] * above[:, None], rows[:, bottom] * below[:, None]  # (C, height, width)
    return (((upper >> 16) + (lower >> 16) + 2) >> 2).astype(np.uint8)


def _weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` places its two places among `old`, and the weights of both, which sum to 2048.

    Beyond the first and the last place both are the same one, but keep their two weights: each is rounded by
    itself.
    """
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    start = np.floor(place)
    share = place - start
    first, second = (np.clip(start + step, 0, old - 1).astype(np.int64) for step in (0, 1))
    weights = (np.rint(part * np.float32(1 << _BITS)).astype(np.int32) for part in (1 - share, share))
    return first, second, *weights
