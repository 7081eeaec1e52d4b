"""Files of precomputed region features, as extractors publish them, read an image at a time.

R: regions of an image, F: width of a feature. All give boxes x1, y1, x2, y2 in pixels of the image, and are
told apart by what they are called and by what is inside:

- TSV without header, arrays in base64; files with `.tsv` in their name, also in parts (`.tsv.0`). Ten columns
  (LXMERT): image_id, image_h, image_w, object ids, object scores, attribute ids, attribute scores, num_boxes,
  boxes, features. Six columns (bottom-up attention): image_id, image_w, image_h, num_boxes, boxes, features;
  here the width stands first. Ids are int64, the rest float32.
- HDF5 (`.h5`, `.hdf5`; needs h5py), one group for each image id with the arrays below, sizes as arrays or
  attributes; or one array for all images:
  image_features (N, R, F) and image_bb (N, R, 4), with num_boxes (N,) if they are padded, or all regions in
  a row, (M, F) and (M, 4), with pos_boxes (N, 2), the first region of each image and the one after its last.
  Ids are in image_id (N,), or in a pickle {image id: index} beside it: `train36_imgid2idx.pkl` for
  `train36.hdf5`. Sizes are in image_h and image_w (N,), or follow from spatial_features, whose first four
  columns are the same boxes over the image's width and height.
- A folder of NPZ files, one for each image and called like it, with the arrays below. Pickled objects in them
  ("info") are not read.

Arrays of one image, under any of these names: features, image_features or x (R, F), x also (F, R); boxes,
bbox or image_bb (R, 4); image_h and image_w; if there are labels, object_ids or objects_id, object_scores or
objects_conf, attribute_ids or attrs_id, attribute_scores or attrs_conf (R,).
"""

import base64
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..models.regions import TOLERANCE
from .readers import PathLike, _load_pickle

TSV_COLUMNS = {
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    10: (
        "image_id",
        "image_h",
        "image_w",
        "object_ids",
        "object_scores",
        "attribute_ids",
        "attribute_scores",
        "num_boxes",
        "boxes",
        "features",
    ),
}
LABELS = {
    "object_ids": np.int64,
    "object_scores": np.float32,
    "attribute_ids": np.int64,
    "attribute_scores": np.float32,
}
NAMES = {
    "features": ("features", "image_features", "x"),
    "boxes": ("boxes", "bbox", "image_bb"),
    "image_h": ("image_h",),
    "image_w": ("image_w",),
    "object_ids": ("object_ids", "objects_id"),
    "object_scores": ("object_scores", "objects_conf"),
    "attribute_ids": ("attribute_ids", "attrs_id"),
    "attribute_scores": ("attribute_scores", "attrs_conf"),
}
# Of features that the released weights were trained on, an image at a time.
GENUINE = {
    "mean": (0.50, 0.84),
    "standard deviation": (1.28, 1.71),
    "maximum": (25, 35),
    "zeros": (0.24, 0.39),
}
SLACK = 0.25  # of these ranges, which were measured on ten images

Row = dict[str, np.ndarray]
Place = str  # where in a file something is wrong


def read_feature_file(path: PathLike) -> Iterator[tuple[str, Row]]:
    """(image id, region row) of each image in a file or folder of one of the layouts of this module.

    A row is what `stack_regions` takes: features (R, F) and boxes (R, 4) float32, the boxes x1, y1, x2, y2
    over the image's width and height, image_size (2,) int64 height and width, and the labels if there are
    any. At the end of a file whose features look unlike those that the released weights were trained on,
    one warning says what is odd.

    Raises:
        ValueError: no such file, another layout, or, with the line or the image: text that is not base64 or
            was cut off, numbers of regions that differ, features of another width than before or not
            finite, boxes that are NaN, upside down, outside the image by more than 1e-5 of its size, or in
            0..1 instead of pixels.
        ImportError: HDF5 without h5py.
    """
    path = Path(path)
    if path.is_dir():
        arrays = _read_npz_folder(path)
    elif not path.is_file():
        raise ValueError(f"{path} does not exist; give a TSV or HDF5 file or a folder of NPZ files")
    elif path.suffix in (".h5", ".hdf5"):
        arrays = _read_hdf5(path)
    elif ".tsv" in path.suffixes:
        arrays = _read_tsv(path)
    else:
        raise ValueError(f"{path} is neither .tsv, .h5 nor .hdf5, nor a folder of .npz files")
    width, found = None, []
    for place, image_id, values in arrays:
        row = _region_row(place, values)
        width = width or row["features"].shape[1]
        if row["features"].shape[1] != width:
            raise ValueError(
                f"{place}: features have width {row['features'].shape[1]}, those before it {width}; get the "
                "file again or leave the image out"
            )
        found.append(_statistics(row["features"]))
        yield image_id, row
    if not found:
        raise ValueError(f"{path} has no images; give a file with region features")
    odd = _oddities(np.mean(found, axis=0))
    if odd:
        warnings.warn(
            f"{path}: features {'; '.join(odd)}. Weights trained on genuine bottom-up-attention features do "
            "not fit them",
            stacklevel=2,
        )


# TSV


def _read_tsv(path: Path) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            texts = line.rstrip(b"\r\n").split(b"\t")
            if len(texts) not in TSV_COLUMNS:
                raise ValueError(
                    f"{place}: {len(texts)} columns instead of 10 or 6; the file is cut off or not a TSV of "
                    "region features"
                )
            columns = dict(zip(TSV_COLUMNS[len(texts)], texts, strict=True))
            image_id = columns["image_id"].decode(errors="replace")
            yield f"{place} ({image_id})", image_id, _tsv_values(place, columns)


def _tsv_values(place: Place, columns: dict[str, bytes]) -> dict[str, Any]:
    values = {name: _positive(place, name, columns[name]) for name in ("image_h", "image_w", "num_boxes")}
    count = values.pop("num_boxes")
    shapes = {"boxes": (count, 4), "features": (count, -1)}
    for name, dtype in {"boxes": np.float32, "features": np.float32, **LABELS}.items():
        if name in columns:
            numbers = _decode(place, name, columns[name], np.dtype(dtype).newbyteorder("<"))
            try:
                values[name] = numbers.reshape(shapes.get(name, (count,)))
            except ValueError:
                raise ValueError(
                    f"{place}: {name} holds {len(numbers)} numbers, which do not fit num_boxes {count}; get "
                    "the file again"
                ) from None
    return values


def _positive(place: Place, name: str, text: bytes) -> int:
    if not text.isdigit() or not int(text):
        raise ValueError(f"{place}: {name} is {text[:20]!r}; it must be a whole number of at least 1")
    return int(text)


def _decode(place: Place, name: str, text: bytes, dtype: np.dtype) -> np.ndarray:
    if text.startswith(b"b'"):  # from Python 3 scripts that wrote str(bytes)
        text = text[2:].removesuffix(b"'")
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype)
    except ValueError as error:
        raise ValueError(
            f"{place}: {name} is not {dtype.name} in base64 ({error}); get the file again"
        ) from None


# NPZ and HDF5


def _read_npz_folder(folder: Path) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    for file in sorted(folder.glob("*.npz")):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                values = _named(str(file), arrays, arrays)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is not a whole NPZ file ({error}); get it again") from error
        yield str(file), re.sub(r"\.(jpe?g|png)$", "", file.stem, flags=re.IGNORECASE), values


def _read_hdf5(path: Path) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading HDF5 needs h5py: pip install h5py") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a whole HDF5 file ({error}); get it again") from error
    with file:
        if all(isinstance(item, h5py.Group) for item in file.values()):
            for image_id, group in file.items():
                place = f"{path}, image {image_id}"
                yield place, image_id, _named(place, group, group.attrs)
        else:
            yield from _hdf5_arrays(path, file)


def _hdf5_arrays(path: Path, file: Mapping[str, Any]) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    """From arrays over all images; `file` is a h5py.File."""
    for index, image_id in _hdf5_ids(path, file):
        place = f"{path}, image {image_id}"
        regions = index
        if "pos_boxes" in file:
            regions = slice(*(int(bound) for bound in file["pos_boxes"][index]))
        elif "num_boxes" in file:
            regions = (index, slice(int(file["num_boxes"][index])))
        per_image = ("image_h", "image_w", "image_id", "num_boxes", "pos_boxes")
        row = {name: array[regions] for name, array in file.items() if name not in per_image}
        if "image_h" in file and "image_w" in file:
            sizes = {name: file[name][index] for name in ("image_h", "image_w")}
        else:
            sizes = _size_from_boxes(place, row)
        yield place, image_id, _named(place, row, sizes)


def _hdf5_ids(path: Path, file: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    beside = path.with_name(f"{path.stem}_imgid2idx.pkl")
    if "image_id" in file:
        for index, image_id in enumerate(file["image_id"][:].tolist()):
            yield index, image_id.decode() if isinstance(image_id, bytes) else str(image_id)
    elif beside.is_file():
        for image_id, index in sorted(_load_pickle(beside).items(), key=itemgetter(1)):
            yield index, str(image_id)
    else:
        raise ValueError(
            f"{path} has no image_id, and {beside.name} is not beside it; give one of them, or a group for "
            "each image"
        )


def _size_from_boxes(place: Place, row: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Of the image, from its boxes in pixels and the same boxes over width and height."""
    if "image_bb" not in row or "spatial_features" not in row:
        raise ValueError(f"{place}: no size; give image_h and image_w, or image_bb and spatial_features")
    pixels, shares = row["image_bb"].max(axis=0), row["spatial_features"].max(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        width, height = pixels[2] / shares[2], pixels[3] / shares[3]
    if not np.isfinite(width) or not np.isfinite(height):
        raise ValueError(f"{place}: image_bb and spatial_features give no image size; give image_h, image_w")
    return {"image_h": round(float(height)), "image_w": round(float(width))}


def _named(place: Place, arrays: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of one image by the names of this package; sizes are looked for in both mappings."""
    values = {}
    for name, written in NAMES.items():
        found = next((source[key] for key in written for source in (arrays, sizes) if key in source), None)
        if found is not None:
            values[name] = np.asarray(found)
        elif name not in LABELS:
            raise ValueError(f"{place}: none of the arrays {', '.join(written)}; it has {', '.join(arrays)}")
    features, boxes = values["features"], values["boxes"]
    if features.ndim == 2 and len(features) != len(boxes) == features.shape[1]:
        values["features"] = features.T
    return values


# Checks


def _region_row(place: Place, values: Mapping[str, Any]) -> Row:
    features, boxes = (np.asarray(values[name], np.float32) for name in ("features", "boxes"))
    count = len(boxes)
    if boxes.shape != (count, 4) or features.ndim != 2 or len(features) != count or not features.size:
        raise ValueError(
            f"{place}: features {features.shape} and boxes {boxes.shape}; they must be (R, F) and (R, 4)"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"{place}: features hold NaN or infinity; extract them again")
    labels = {name: values[name].astype(dtype) for name, dtype in LABELS.items() if name in values}
    for name, label in labels.items():
        if label.shape != (count,):
            raise ValueError(f"{place}: {name} has shape {label.shape} for {count} regions; give one each")
    height, width = int(values["image_h"]), int(values["image_w"])
    return {
        "features": features,
        "boxes": _boxes_in_image(place, boxes, height, width),
        "image_size": np.array([height, width], np.int64),
        **labels,
    }


def _boxes_in_image(place: Place, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes in pixels → (R, 4) over the image's width and height."""
    if boxes.max() <= 1 < max(height, width):
        raise ValueError(
            f"{place}: all boxes lie in 0..1, in an image of {width} x {height} pixels (width x height); "
            "give boxes in pixels"
        )
    scaled = boxes / np.array([width, height, width, height], np.float32)
    inside = ((scaled >= -TOLERANCE) & (scaled <= 1 + TOLERANCE)).all(axis=1)  # not so if NaN
    upright = (scaled[:, 2:] >= scaled[:, :2]).all(axis=1)
    if not (inside & upright).all():
        index = int(np.argmin(inside & upright))
        raise ValueError(
            f"{place}: box {index} is {boxes[index].tolist()} in an image of {width} x {height} pixels "
            "(width x height); give x1, y1, x2, y2 inside the image with x1 <= x2 and y1 <= y2"
        )
    return scaled


def _statistics(features: np.ndarray) -> tuple[float, ...]:
    """Mean, standard deviation, maximum, share of zeros, of negatives, of regions of length 1."""
    lengths = np.sqrt(np.einsum("rf,rf->r", features, features))
    return (
        features.mean(),
        features.std(),
        features.max(),
        (features == 0).mean(),
        (features < 0).mean(),
        (np.abs(lengths - 1) < 0.01).mean(),
    )


def _oddities(means: np.ndarray) -> list[str]:
    """What is odd about `_statistics`, averaged over the images of a file."""
    *measured, negative, normalised = means
    odd = []
    if negative > 0:
        odd.append(f"have negative values ({negative:.1%}; genuine ones come after a ReLU)")
    if normalised > 0.99:
        odd.append("are L2-normalised (genuine ones are not)")
    for (name, (low, high)), value in zip(GENUINE.items(), measured, strict=True):
        if not (1 - SLACK) * low <= value <= (1 + SLACK) * high:
            odd.append(f"have {name} {value:.3g} (genuine {low} to {high})")
    return odd
