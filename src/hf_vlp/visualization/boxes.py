"""Predicted and true boxes drawn on an image.

PIL draws them and not `torchvision.utils.draw_bounding_boxes`, whose labels stay at 10 pixels unless a
font file is at hand, and hide what lies in a small box.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PREDICTED, TRUE = "#d81b60", "#1e88e5"  # told apart by the colour-blind too
MIN_SIDE = 320  # pixels; smaller images are enlarged so that lines and labels stay readable
PADDING = 4  # pixels between a label's text and its edge


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
) -> Image.Image:
    """Return a copy of `image` with labelled boxes; small images are enlarged by a whole factor.

    boxes: (n, 4) as x1, y1, x2, y2 in pixels of `image`, the form `post_process_boxes` gives.
    labels, colors: n each; by default no labels, and the colour of a predicted box.
    Raises ValueError when the three differ in length or a box is inverted.
    """
    labels = [""] * len(boxes) if labels is None else labels
    colors = [PREDICTED] * len(boxes) if colors is None else colors
    if not len(boxes) == len(labels) == len(colors):
        raise ValueError(
            f"{len(boxes)} boxes, {len(labels)} labels and {len(colors)} colors: give one of each per box"
        )
    scale = -(-MIN_SIDE // min(image.size)) if min(image.size) < MIN_SIDE else 1
    canvas = image.convert("RGB").resize(
        (image.width * scale, image.height * scale), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(canvas)
    line = max(2, min(canvas.size) // 120)
    font = ImageFont.load_default(size=max(12, min(canvas.size) // 22))
    used: list[tuple[float, float, float, float]] = []  # where labels stand already
    for box, label, color in zip(boxes, labels, colors, strict=True):
        x1, y1, x2, y2 = (float(value) * scale for value in box)
        if x2 < x1 or y2 < y1:
            raise ValueError(
                f"box {list(map(float, box))} is inverted: give x1, y1, x2, y2 with x1 <= x2, y1 <= y2"
            )
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
        if label:
            place = _label_place(draw.textbbox((0, 0), label, font=font), (x1, y1, x2, y2), canvas.size, used)
            used.append(place)
            draw.rectangle(place, fill=color)
            draw.text((place[0] + PADDING, place[1] + PADDING), label, font=font, fill="white", anchor="lt")
    return canvas


def _label_place(text, box, size, used) -> tuple[float, float, float, float]:
    """Above the box or below it, else within it, where the image has room and no other label stands."""
    width, height = text[2] - text[0] + 2 * PADDING, text[3] - text[1] + 2 * PADDING
    left = max(min(box[0], size[0] - width), 0)
    places = [
        (left, top, left + width, top + height) for top in (box[1] - height, box[3], box[1], box[3] - height)
    ]
    return next(
        (p for p in places if p[1] >= 0 and p[3] <= size[1] and not any(_overlap(p, u) for u in used)),
        places[2],
    )


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
