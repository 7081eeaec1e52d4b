"""Images at the border: whatever a row holds, to PIL in RGB, and what cannot be read by name."""

import io
from http.client import HTTPException
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

TIMEOUT = 30  # seconds until a server that does not answer is given up


class BadImageError(ValueError):
    """An image that cannot be read; the message names it."""


def image_name(image: Any) -> str:
    """What to call the image of a row in a message: its path where it has one."""
    if isinstance(image, dict):
        return image.get("path") or f"image of {len(image.get('bytes') or b'')} bytes"
    if isinstance(image, (np.ndarray, Tensor)):
        return f"array {tuple(image.shape)} of {image.dtype}"
    return str(image) if isinstance(image, (str, Image.Image)) else repr(image)


def is_url(image: Any) -> bool:
    """Whether an image is the address of one."""
    return isinstance(image, str) and image.startswith(("http://", "https://"))


def load_image(image: Any) -> Image.Image:
    """A PIL image, a path, an http(s) URL, the {"bytes", "path"} of an undecoded `datasets.Image` column, or
    an array → PIL image in RGB.

    Arrays are (H, W, 3) or (H, W) in uint8, tensors (3, H, W) or (H, W), in uint8 or from 0 to 1. RGBA, L, P
    and CMYK are converted. Raises BadImageError, naming the image, if it is missing, corrupt or cut off.
    """
    try:
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            raise TypeError(f"its numbers are {image.dtype}, not uint8")
        if isinstance(image, (np.ndarray, Tensor)):
            return to_pil_image(image).convert("RGB")
        if is_url(image):
            # some servers refuse clients without a name
            with urlopen(Request(image, headers={"User-Agent": "hf_vlp"}), timeout=TIMEOUT) as answer:
                return Image.open(io.BytesIO(answer.read())).convert("RGB")
        if isinstance(image, dict):
            image_file = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
            return Image.open(image_file).convert("RGB")
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        return Image.open(image).convert("RGB")
    # PIL reports broken files in all these ways, depending on the format and on where the damage lies.
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        AttributeError,
        Image.DecompressionBombError,
        HTTPException,
    ) as error:
        raise BadImageError(
            f"image {image_name(image)} cannot be read ({error}); repair or remove it, or build the collator "
            'with on_bad_image="skip"'
        ) from error
