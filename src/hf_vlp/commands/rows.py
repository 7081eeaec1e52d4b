"""Rows of a folder, a file or the Hub, as `docs/data.md` tells their columns."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel

from ..data.features import RegionStore, with_regions
from ..models.modeling_lxmert import LXMERTPreTrainedModel

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_rows(source: str, split: str, columns: Sequence[str]) -> datasets.Dataset:
    """Rows with `columns` of a folder that `save_to_disk` wrote, a JSON, JSON-lines or parquet file, or a
    dataset of the Hub; `split` chooses among several.

    Images stay undecoded, and paths of images are relative to the file or the folder.

    Raises:
        ValueError: a file of another kind, no such split, no rows, or columns that are not there.
    """
    path = Path(source)
    if path.is_dir():
        rows, root = datasets.load_from_disk(source), path
    elif path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"{source} is of no known kind; give a file in {', '.join(FILES)}")
        rows, root = datasets.load_dataset(FILES[path.suffix], data_files=source), path.parent
        rows = rows["train"]  # the only one
    else:
        rows, root = datasets.load_dataset(source), None
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(rows)}")
        rows = rows[split]
    missing = [column for column in columns if column not in rows.column_names]
    if missing or not len(rows):
        raise ValueError(
            f"{source} has {len(rows)} rows with the columns {', '.join(rows.column_names)}; give at least "
            f"one row with {', '.join(columns)}"
        )
    return _undecoded(rows, root)


def read_model_rows(
    model: PreTrainedModel, source: str, split: str, columns: Sequence[str], features: Path | None = None
) -> datasets.Dataset:
    """Rows as `read_rows` finds them, with what `model` reads in place of `columns[0]`, the one of images.

    For LXMERT that may be `regions`. With `features`, a folder of regions, they are looked up there: by
    `image_id`, or for two images by `image_ids`.

    Raises:
        ValueError: as `read_rows` and `with_regions`, neither regions nor images, or `features` for a model
            that reads images.
    """
    if isinstance(model, LXMERTPreTrainedModel):
        image_column, *others = columns
        rows = read_rows(source, split, others)
        if features is not None:
            key = "image_ids" if image_column == "images" else "image_id"
            return with_regions(rows, RegionStore(features), key)
        if not {"regions", image_column} & set(rows.column_names):
            raise ValueError(
                f"{source} has rows with the columns {', '.join(rows.column_names)}; give them regions or "
                f"{image_column}, or the folder of their regions with --features"
            )
        return rows
    if features is not None:
        raise ValueError(f"features is {features}, but {type(model).__name__} reads images; leave it out")
    return read_rows(source, split, columns)


def without_images(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows to read without reading images or regions."""
    visual = {"image", "images", "regions"}
    return rows.remove_columns([name for name in rows.column_names if name in visual])


def _undecoded(rows: datasets.Dataset, root: Path | None) -> datasets.Dataset:
    undecoded = datasets.Image(decode=False)
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, undecoded)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(undecoded))
    return rows if root is None else rows.with_transform(partial(_find_images, root))


def _find_images(root: Path, batch: dict[str, list]) -> dict[str, list]:
    """A batch of rows with the paths of its images relative to `root`."""
    found = dict(batch)
    if "image" in batch:
        found["image"] = [_found(root, image) for image in batch["image"]]
    if "images" in batch:
        found["images"] = [[_found(root, image) for image in images] for images in batch["images"]]
    return found


def _found(root: Path, image: Any) -> Any:
    if isinstance(image, str):
        return str(root / image)
    if isinstance(image, dict) and not image["bytes"] and image["path"]:
        return {**image, "path": str(root / image["path"])}
    return image
