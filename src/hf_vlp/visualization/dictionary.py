"""What SOHO's visual dictionary holds: the image patches of an entry, the entries of an image, their usage
(arXiv 2104.03135, section 3).

K: entries of the dictionary, h, w: cells of an image.
"""

import heapq
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from ..evaluation.inference import batched, evaluating, number_of, to_model
from ..images import load_image
from ..models.modeling_soho import SOHOPreTrainedModel, VisualDictionary

PATCH = 64  # pixels a side that a patch is drawn with
GAP = 4  # pixels between patches
LABEL = 132  # pixels left of the patches, for the entry's name


@dataclass
class EntryMap:
    """The entries (h, w) of the cells more than half of whose rows and columns lie on an image, scaled to
    `size`, (height, width) in pixels; a cell is a square of `cell` pixels a side."""

    entries: Tensor
    size: tuple[int, int]
    cell: int

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a cell in pixels of the scaled image, which the last ones may leave."""
        left, top = column * self.cell, row * self.cell
        return left, top, left + self.cell, top + self.cell


@dataclass
class CollectedEntries:
    """What `collect_entries` finds: `counts` (K,), the cells of each entry, `maps`, one for each image, and
    `patches`, a random choice of the cells of each entry as pictures, in random order."""

    counts: Tensor
    maps: list[EntryMap]
    patches: dict[int, list[Image.Image]]

    def most_used(self, number: int) -> list[int]:
        """Up to `number` entries with the most cells, most first; only such as have a cell."""
        order = self.counts.argsort(descending=True, stable=True)[:number]
        return order[self.counts[order] > 0].tolist()


def collect_entries(
    model: SOHOPreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable,
    entries: Sequence[int] | None = None,
    patches: int = 12,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> CollectedEntries:
    """Look up every cell of images in the dictionary, in one pass. The dictionary stays as it is.

    Cells count that lie on the image, with more than half of their rows and columns, whatever
    `padding_mask_mode` is; so an image has as many cells beside any others.

    Args:
        model: `SOHOModel` or a head, with a dictionary.
        images: PIL images, paths, or rows with the column `image`; a stream will do.
        entries: those to keep patches of; all without it.
        patches: kept of each entry, every cell with the same chance; 0 to count only. Of 2,048 entries with
            12 patches each, they take 300 MB.
        batch_size: images at a time.
        seed: of the choice of patches.
        progress: show a bar.

    Raises:
        ValueError: a model without a dictionary, an entry that it lacks, `patches` or `batch_size` too small.
        BadImageError: an image that cannot be read, named.
    """
    size = len(_dictionary(model).embeddings)
    if patches < 0:
        raise ValueError(f"patches is {patches}; use a number per entry of at least 0")
    _check_entries(entries, size)
    sample = _PatchSample(size, entries, patches, seed)
    counts, maps = torch.zeros(size, dtype=torch.long), []
    with evaluating(model), tqdm(total=number_of(images), desc="entries", disable=not progress) as bar:
        for batch in batched(images, batch_size):
            pictures = [load_image(_image_of(one)) for one in batch]
            for picture, found in zip(pictures, _entry_maps(model, processor, pictures), strict=True):
                counts += found.entries.flatten().bincount(minlength=size)
                sample.add(picture, found)
                maps.append(found)
            bar.update(len(batch))
    return CollectedEntries(counts, maps, sample.pictures())


def living_entries(model: SOHOPreTrainedModel) -> Tensor:
    """Which entries (K,) training has left something of: those whose moving average of cells outweighs its
    smoothing `vd_eps`. The others have faded to zero; before the first step of training all live.

    Raises:
        ValueError: a model without a dictionary.
    """
    dictionary = _dictionary(model)
    return (dictionary.ema_count > dictionary.eps) | (dictionary.usage.sum() == 0)


# Pictures


def draw_entry_patches(
    found: CollectedEntries, entries: Sequence[int] | None = None, columns: int = 10
) -> Image.Image:
    """A row of up to `columns` patches for each entry, the eight most used ones without `entries`; beside it
    the number of its cells and their share among all.

    Raises:
        ValueError: an entry that the dictionary lacks, or no entry or column to draw.
    """
    entries = found.most_used(8) if entries is None else entries
    if not len(entries) or columns < 1:
        raise ValueError(f"{len(entries)} entries in {columns} columns; give at least one of each")
    _check_entries(entries, len(found.counts))
    rows = [found.patches.get(int(entry), [])[:columns] for entry in entries]
    step, total = PATCH + GAP, found.counts.sum().clamp(min=1)
    width = LABEL + max(map(len, rows)) * step
    sheet = Image.new("RGB", (width, GAP + len(rows) * step), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for i, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        top, count = GAP + i * step, found.counts[entry]
        text = f"entry {entry}\n{count:,} cells\n{count / total:.2%}"
        draw.multiline_text((2 * GAP, top + PATCH // 2), text, "black", font, anchor="lm")
        for j, patch in enumerate(row):
            sheet.paste(patch.resize((PATCH, PATCH), Image.Resampling.BILINEAR), (LABEL + j * step, top))
    return sheet


def draw_entry_map(image: Image.Image, found: EntryMap, opacity: float = 0.5) -> Image.Image:
    """A scaled copy of `image` under its cells, each in the colour of its entry and with its number.

    An entry has the same colour in all images; what no cell covers stays bare.

    Raises:
        ValueError: an opacity outside 0..1.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}; use 0 to 1")
    rows, columns = found.entries.shape
    scaled = _scaled(image, found)
    cells = Image.fromarray(_colors(found.entries.cpu().numpy()))
    covered = scaled.copy()
    size = (columns * found.cell, rows * found.cell)
    covered.paste(cells.resize(size, Image.Resampling.NEAREST), (0, 0))
    canvas = Image.blend(scaled, covered, opacity)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(8, found.cell // 4))
    for (row, column), entry in np.ndenumerate(found.entries.cpu().numpy()):
        left, top, right, bottom = found.box(row, column)
        middle = (left + min(right, canvas.width)) / 2, (top + min(bottom, canvas.height)) / 2
        draw.text(middle, str(entry), "white", font, anchor="mm", stroke_width=1, stroke_fill="black")
    return canvas


def draw_usage(model: SOHOPreTrainedModel, counts: Tensor | None = None) -> Image.Image:
    """The share of cells of each entry, most used first: of all training, and of images with `counts` (K,).

    The title tells how many entries live, the legend how many had a cell.

    Raises:
        ValueError: a model without a dictionary, counts of another one, or neither training nor counts.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing usage needs matplotlib: pip install 'hf-vlp[viz]'") from error

    usage, living = _dictionary(model).usage, living_entries(model)
    if counts is not None and counts.shape != usage.shape:
        raise ValueError(f"counts is {tuple(counts.shape)}; give one for each of the {len(usage)} entries")
    series = {"training": usage, "given images": torch.zeros_like(usage) if counts is None else counts}
    series = {name: values for name, values in series.items() if values.sum() > 0}
    if not series:
        raise ValueError("the dictionary was never trained; give the counts of collect_entries")
    figure = Figure(figsize=(6.4, 3.2), dpi=120, layout="constrained")
    axis = figure.subplots()
    for (name, values), color in zip(series.items(), ("#1e88e5", "#d81b60"), strict=False):
        used = values[values > 0].double().cpu().sort(descending=True).values
        label = f"{name}: {len(used):,} of {len(values):,} used"
        edges = np.arange(len(used) + 1) + 0.5  # of bars around 1, 2, ...
        axis.stairs((used / used.sum()).numpy(), edges, label=label, color=color, linewidth=1.5)
    axis.set_title(f"{living.sum():,} of {len(living):,} entries live ({living.float().mean():.1%})")
    axis.title.set_fontsize(10)
    axis.set_yscale("log")
    axis.set_xlabel("entries, most used first", fontsize=9)
    axis.set_ylabel("share of cells", fontsize=9)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, frameon=False)
    written = io.BytesIO()
    figure.savefig(written)
    return Image.open(written).convert("RGB")


# Cells


def _dictionary(model: SOHOPreTrainedModel) -> VisualDictionary:
    dictionary = getattr(model.base_model, "visual_dictionary", None)
    if dictionary is None:
        raise ValueError(
            f"{type(model).__name__} has no visual dictionary; give a SOHO model whose visual_fusion is not "
            '"none"'
        )
    return dictionary


def _check_entries(entries: Sequence[int] | None, size: int):
    missing = [entry for entry in entries or () if not 0 <= entry < size]
    if missing:
        raise ValueError(f"entries holds {missing[0]}; use 0 to {size - 1}")


def _image_of(row: Any) -> Any:
    return row["image"] if isinstance(row, Mapping) and "image" in row else row


def _entry_maps(
    model: SOHOPreTrainedModel, processor: ProcessorMixin, images: list[Image.Image]
) -> Iterator[EntryMap]:
    inputs = to_model(processor(images=images, return_tensors="pt"), model)
    tokens = model.base_model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"])
    cells = tokens.entries.view(tokens.mask.shape).cpu()
    for of_image, size, cell in on_images(cells, inputs["pixel_mask"]):
        yield EntryMap(of_image, size, cell)


def on_images(cells: Tensor, pixel_mask: Tensor) -> Iterator[tuple[Tensor, tuple[int, int], int]]:
    """Of cells (B, ..., h, w) of a batch of masks (B, H, W) those of each image, more than half of whose rows
    and columns lie on it, with its height and width, and the side of a cell in pixels."""
    # The stride is a power of two, and what is left over after the last cell is less than one
    cell = 1 << (pixel_mask.shape[1] // cells.shape[-2]).bit_length() - 1
    for of_image, mask in zip(cells, pixel_mask.cpu(), strict=True):
        height, width = int(mask[:, 0].sum()), int(mask[0].sum())
        down, right = ((side + cell // 2 - 1) // cell for side in (height, width))
        yield of_image[..., :down, :right], (height, width), cell


def _scaled(image: Image.Image, found: EntryMap) -> Image.Image:
    return load_image(image).resize(found.size[::-1], Image.Resampling.BILINEAR)


class _PatchSample:
    """Up to `number` patches of each entry, of all cells with the same chance: every cell draws a number, and
    those with the lowest are kept."""

    def __init__(self, size: int, entries: Sequence[int] | None, number: int, seed: int):
        self.number = number
        self.kept: dict[int, list[tuple]] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.images = 0
        self.limits = torch.zeros(size)  # only lower numbers have a chance
        if number:
            self.limits[slice(None) if entries is None else torch.as_tensor(entries)] = 1.0

    def add(self, image: Image.Image, found: EntryMap):
        drawn = torch.rand(found.entries.shape, generator=self.generator)
        chosen = (drawn < self.limits[found.entries]).nonzero().tolist()
        scaled = _scaled(image, found) if chosen else None
        for row, column in chosen:
            heap = self.kept.setdefault(int(found.entries[row, column]), [])
            place = (-float(drawn[row, column]), self.images, row, column)  # no two are equal
            heapq.heappush(heap, (*place, scaled.crop(found.box(row, column))))
            if len(heap) > self.number:
                heapq.heappop(heap)
            if len(heap) == self.number:
                self.limits[found.entries[row, column]] = -heap[0][0]
        self.images += 1

    def pictures(self) -> dict[int, list[Image.Image]]:
        return {entry: [one[-1] for one in sorted(heap, reverse=True)] for entry, heap in self.kept.items()}


def _colors(entries: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of entries, neighbours in number far apart."""
    hue = entries * 0.618034 % 1  # the golden ratio fills the circle evenly
    saturation, value = 0.55 + entries % 3 * 0.2, 0.7 + entries // 3 % 3 * 0.14
    hsv = np.stack([hue, saturation, value], axis=-1)
    image = Image.fromarray((hsv * 255).astype(np.uint8), mode="HSV")
    return np.asarray(image.convert("RGB"))
