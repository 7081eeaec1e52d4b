"""Images at the border: whatever a row holds, to PIL in RGB, and what cannot be read by name."""

import io
from typing import Any

from PIL import Image


class BadImageError(ValueError):
    """An image that cannot be read; the message names it."""


def image_name(image: Any) -> str:
    """What to call the image of a row in a message: its path where it has one."""
    if isinstance(image, dict):
        return image.get("path") or f"image of {len(image.get('bytes') or b'')} bytes"
    return str(image) if isinstance(image, (str, Image.Image)) else repr(image)


def load_image(image: Any) -> Image.Image:
    """A PIL image, a path, or the {"bytes", "path"} of an undecoded `datasets.Image` column → PIL image in
    RGB.

    RGBA, L, P and CMYK are converted. Raises BadImageError, naming the image, if it is missing, corrupt or
    cut off.
    """
    try:
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
    ) as error:
        raise BadImageError(
            f"image {image_name(image)} cannot be read ({error}); repair or remove it, or build the collator "
            'with on_bad_image="skip"'
        ) from error
