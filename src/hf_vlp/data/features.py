"""Stores of region features: folders of Arrow files that are read from disk, not held in memory.

A store is written by `convert_features` from files of precomputed features, or row by row by `RegionWriter`,
and read by `RegionStore`. Its files are tables of `datasets`, which `datasets.Dataset.from_file` opens as
well; features are float16, half of what the public files take after decoding. R: regions of an image, which
differ from image to image, F: width of a feature.

    convert_features(["train2014_obj36.tsv", "val2014_obj36.tsv"], "coco_regions")
    rows = with_regions(rows, RegionStore("coco_regions"))
    rows[0]["regions"]["boxes"]  # (R, 4)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..folders import new_folder
from ..models.regions import stack_regions
from .feature_files import read_feature_file
from .readers import IMAGE, PathLike

LABELS = {
    "object_ids": "int64",
    "object_scores": "float32",
    "attribute_ids": "int64",
    "attribute_scores": "float32",
}


def convert_features(
    files: PathLike | Sequence[PathLike], output_dir: PathLike, progress: bool = True
) -> "RegionStore":
    """Precomputed features, in the layouts of `read_feature_file`, → a store in a new folder.

    The folder appears when everything is read, or not at all. Boxes, labels and image sizes stay as they
    are; features are rounded to float16.

    Raises:
        ValueError: `output_dir` exists and is not an empty folder, an image twice, or as `read_feature_file`.
    """
    files = [files] if isinstance(files, PathLike) else list(files)
    if not files:
        raise ValueError("files is empty; give at least one file of region features")
    with new_folder(output_dir) as folder:
        with RegionWriter(folder) as writer, tqdm(desc="images", disable=not progress) as bar:
            for file in files:
                for image_id, row in read_feature_file(file):
                    writer.write(image_id, row)
                    bar.update()
    return RegionStore(output_dir)


class RegionWriter:
    """Appends rows to the store in `folder`, which may hold some already; a new one is made.

    Rows are collected and written `rows_per_file` at a time. A file appears whole or not at all, so a run
    that was cut short leaves a store that `RegionStore` reads and another writer goes on with:

        with RegionWriter("regions") as writer:
            for image_id, row in rows:
                if image_id not in writer:
                    writer.write(image_id, row)

    Leaving the block writes the last file, after an exception too: what was given is kept. One writer at a
    time may have a folder.
    """

    def __init__(self, folder: PathLike, rows_per_file: int = 512):
        if rows_per_file < 1:
            raise ValueError(f"rows_per_file is {rows_per_file}; give at least 1")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_per_file = rows_per_file
        self.feature_dim = None
        self._ids, self._rows = set(), []
        self._next = 0
        files = _files(self.folder)
        if files:
            store = RegionStore(self.folder)
            self._ids, self.feature_dim = set(store.ids), store.feature_dim
            self._next = int(files[-1].stem.removeprefix("regions-")) + 1

    def __contains__(self, image_id: Any) -> bool:
        return str(image_id) in self._ids

    def write(self, image_id: Any, row: Mapping[str, Any]):
        """Add the regions of one image: a row as `stack_regions` takes it, arrays, lists or tensors.

        Raises:
            ValueError: the image is stored already, F differs from that of the store, features that float16
                cannot hold, or as `stack_regions`.
        """
        image_id = str(image_id)
        if image_id in self._ids:
            raise ValueError(f"image {image_id!r} is stored already; leave the second one out")
        missing = {"features", "boxes", "image_size"} - set(row)
        if missing:
            raise ValueError(
                f"image {image_id!r} has no {' and no '.join(sorted(missing))}; give a region row"
            )
        try:
            regions = stack_regions([row])  # checks, and takes lists and tensors, too
        except ValueError as error:
            raise ValueError(f"image {image_id!r}: {error}") from error
        row = {name: value.cpu().numpy() for name, value in regions.row(0).items()}
        dim = row["features"].shape[1]
        if self.feature_dim not in (None, dim):
            raise ValueError(
                f"image {image_id!r} has features of width {dim}, the store {self.feature_dim}; use another "
                "folder for another extractor"
            )
        if not (np.abs(row["features"]) <= np.finfo(np.float16).max).all():  # not so if NaN
            raise ValueError(f"image {image_id!r} has features that float16 cannot hold; scale or leave out")
        row["features"] = row["features"].astype(np.float16)
        self.feature_dim = dim
        self._ids.add(image_id)
        self._rows.append({"image_id": image_id, **row})
        if len(self._rows) == self.rows_per_file:
            self.flush()

    def flush(self):
        """Write what is collected to a file of its own."""
        if not self._rows:
            return
        table = _to_table(self._rows, self.feature_dim)
        path = self.folder / f"regions-{self._next:05d}.arrow"
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._rows.clear()
        self._next += 1

    def __enter__(self) -> "RegionWriter":
        return self

    def __exit__(self, *_):
        self.flush()


class RegionStore:
    """Region rows by the id of their image, read from the Arrow files of `folder` when asked for.

    `store[image_id]` is a row as `stack_regions` takes it: features (R, F) float16 and boxes (R, 4) float32,
    views of the mapped file, image_size (2,) int64, and the labels that were stored. `len(store)`,
    `image_id in store` and `store.ids` say what there is. Ids are compared as strings. A pickled store holds
    the path alone.
    """

    def __init__(self, folder: PathLike):
        self.folder = Path(folder)
        files = _files(self.folder)
        if not files:
            raise ValueError(f"{folder} holds no region features; give a folder that convert_features wrote")
        self._table = _open(files)
        self._positions = {name: i for i, name in enumerate(self._table.column("image_id").to_pylist())}

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, image_id: Any) -> bool:
        return str(image_id) in self._positions

    def __getitem__(self, image_id: Any) -> dict[str, np.ndarray]:
        if image_id not in self:
            raise KeyError(f"{self.folder} has no regions of image {str(image_id)!r}")
        table = self._table.fast_slice(self._positions[str(image_id)], 1)
        values = {name: table.column(name).chunk(0) for name in table.column_names if name != "image_id"}
        return {name: _to_numpy(value) for name, value in values.items() if not value.null_count}

    def __reduce__(self):
        return RegionStore, (self.folder,)

    @property
    def ids(self) -> list[str]:
        """Of all images, in the order in which they were written."""
        return list(self._positions)

    @property
    def feature_dim(self) -> int:
        """F."""
        return self._table.schema.field("features").type.value_type.list_size


def with_regions(dataset: Dataset, store: RegionStore, key: str | Sequence[str] = "image_id") -> Dataset:
    """`dataset` with the column `regions`, read from `store` whenever rows are taken.

    key: the column with the ids of the images; for rows with several images a column of lists of ids, or a
    list of columns. Their `regions` are lists of region rows. `select`, `shuffle`, DataLoader workers and a
    transform that was given before all work. Columns of images become {"bytes", "path"}, undecoded. Give the
    dataset before rows
    are selected from it where you can: `datasets` copies a selection when it gets a column.

    Raises:
        ValueError: no such column, a column `regions` already, a format other than a transform, or images
            that are not in the store.
    """
    keys = [key] if isinstance(key, str) else list(key)
    missing = [name for name in keys if name not in dataset.column_names]
    if missing or not keys or "regions" in dataset.column_names:
        raise ValueError(
            f"dataset has the columns {', '.join(dataset.column_names)}; key={key!r} must name columns with "
            "ids of images, and regions must not be there yet"
        )
    form = dataset.format
    if form["type"] not in (None, "custom"):
        raise ValueError(f"dataset has the format {form['type']}; call dataset.reset_format() before")
    ids = _image_ids(dataset, keys)
    single = not isinstance(ids[0], list) if ids else isinstance(key, str)
    unknown = sorted({name for row in ids for name in ([row] if single else row) if name not in store})
    if unknown:
        raise ValueError(
            f"{store.folder} has no regions of {len(unknown)} images of the dataset, such as {unknown[0]!r}; "
            "convert the file that holds them, or leave their rows out with dataset.filter"
        )
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, IMAGE)
    feature = Value("string") if single else List(Value("string"))
    dataset = dataset.add_column("regions", ids, feature=feature)
    return dataset.with_transform(partial(_look_up, store, form["format_kwargs"].get("transform")))


def _image_ids(dataset: Dataset, keys: Sequence[str]) -> list[str] | list[list[str]]:
    table = dataset.select_columns(keys).with_format("arrow")[:]
    columns = [table.column(name).to_pylist() for name in keys]
    rows = columns[0] if len(keys) == 1 else list(zip(*columns, strict=True))
    return [[str(name) for name in row] if isinstance(row, (list, tuple)) else str(row) for row in rows]


def _look_up(
    store: RegionStore, transform: Callable[[dict], dict] | None, batch: dict[str, list]
) -> dict[str, list]:
    """A batch with region rows in the place of the ids of their images."""
    batch = dict(batch) if transform is None else dict(transform(batch))
    if "regions" in batch:  # not where another column is asked for
        batch["regions"] = [
            store[name] if isinstance(name, str) else [store[each] for each in name]
            for name in batch["regions"]
        ]
    return batch


# Arrow


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("regions-*.arrow"))


def _open(files: Sequence[Path]) -> datasets.table.Table:
    """Their rows as one table, mapped."""
    tables = []
    for file in files:
        try:
            tables.append(datasets.table.MemoryMappedTable.from_file(str(file)))
            if tables[-1].schema != tables[0].schema:
                raise ValueError(f"its columns or width are not those of {files[0].name}")
        except (OSError, ValueError) as error:  # pyarrow's own errors are among these
            raise ValueError(f"{file} is not a whole file of region features ({error})") from error
    return datasets.table.concat_tables(tables)


def _schema(dim: int) -> pa.Schema:
    features = Features(
        {
            "image_id": Value("string"),
            "image_size": List(Value("int64"), length=2),
            "features": List(List(Value("float16"), length=dim)),
            "boxes": List(List(Value("float32"), length=4)),
        }
    )
    return Features({**features, **{name: List(Value(kind)) for name, kind in LABELS.items()}}).arrow_schema


def _to_table(rows: Sequence[Mapping[str, Any]], dim: int) -> pa.Table:
    """One record batch; labels that a row lacks are null."""
    schema = _schema(dim)
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if field.name in ("features", "boxes"):
            columns.append(_to_lists(values))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _to_lists(values: Sequence[np.ndarray]) -> pa.ListArray:
    """Arrays (R, N), a list of lists of fixed length N each; `pa.array` takes (R,) only."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = pa.array(np.concatenate(values).reshape(-1))
    return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(flat, values[0].shape[1]))


def _to_numpy(value: pa.Array) -> np.ndarray:
    """Of a column of one row, without copying: (R, F), (R, 4), (R,) or (2,)."""
    inner = value.flatten()
    if isinstance(inner, pa.FixedSizeListArray):
        return inner.flatten().to_numpy().reshape(len(inner), -1)
    return inner.to_numpy()
