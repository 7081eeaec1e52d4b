"""Images for the bottom-up-attention detector."""

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

_MIN_SIDE = 3  # of a scaled image: with less, nothing is left after the first two strides


class BUTDImageProcessor(PilBackend):
    """One image as the detector was trained to see it: channels blue, green, red, without `image_mean`, then
    resized with its aspect ratio kept, without antialiasing.

    Gives `pixel_values` (1, 3, H, W), `scale` (1,), by which the image was scaled, and `image_size` (1, 2),
    height and width before. The scale makes the shorter side `size["shortest_edge"]` pixels, or the longer
    one `size["longest_edge"]` where it would become longer. Pixels are mapped by the scale itself, not by the
    ratio of the rounded sizes.

    Raises:
        ValueError: several images, or one so narrow that nothing is left of it.
    """

    _auto_class = "AutoImageProcessor"
    model_input_names = ["pixel_values", "scale", "image_size"]
    size = {"shortest_edge": 600, "longest_edge": 1000}
    default_to_square = False
    image_mean = (102.9801, 115.9465, 122.7717)
    do_convert_rgb = True

    def _preprocess(
        self, images: list[np.ndarray], size: SizeDict, image_mean, return_tensors=None, **kwargs
    ) -> BatchFeature:
        if len(images) != 1:
            raise ValueError(
                f"images has {len(images)} images; give one at a time, the detector reads no padded batch"
            )
        pixels = torch.from_numpy(images[0][::-1].astype(np.float32))[None]  # (1, 3, H, W), blue first
        height, width = pixels.shape[-2:]
        scale = image_scale(height, width, size["shortest_edge"], size["longest_edge"])
        if round(min(height, width) * scale) < _MIN_SIDE:
            raise ValueError(
                f"image of {width} x {height} pixels is {round(min(height, width) * scale)} pixels wide on "
                "its shorter side once it is scaled; crop it to a less narrow one"
            )
        data = {
            "pixel_values": resize(pixels - pixels.new_tensor(image_mean)[:, None, None], scale),
            "scale": np.array([scale], dtype=np.float32),
            "image_size": np.array([[height, width]]),
        }
        return BatchFeature(data, tensor_type=return_tensors)


def image_scale(height: int, width: int, shortest_edge: int, longest_edge: int) -> float:
    """The factor that brings the shorter side to `shortest_edge` pixels, but the longer to no more than
    `longest_edge`."""
    scale = shortest_edge / min(height, width)
    return longest_edge / max(height, width) if round(scale * max(height, width)) > longest_edge else scale


def resize(pixels: Tensor, scale: float) -> Tensor:
    """Images (B, C, H, W) to `round(scale * H)`, `round(scale * W)` with bilinear weights.

    Output pixel i is at (i + 0.5) / scale - 0.5, as in OpenCV with `fx` and `fy`. `interpolate` of torch
    takes either the scale, and rounds sizes down, or the sizes, and forgets the scale.
    """
    size = [round(scale * side) for side in pixels.shape[-2:]]
    return torch.ops.aten.upsample_bilinear2d(pixels, size, False, scale, scale)
