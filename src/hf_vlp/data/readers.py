"""Annotation files → `datasets` rows: X-VLM's image and region JSON lines, Karpathy's splits, REFER
(RefCOCO, RefCOCO+, RefCOCOg). ALBEF's JSON lists are in `task_readers.py`, LXMERT's in `lxmert_readers.py`,
NLVR v1 in `nlvr.py`.

Each reader returns a `datasets.Dataset`, or with `streaming=True` an `IterableDataset` with one shard for
each file. Boxes are [x, y, w, h] in pixels of the image. Images stay undecoded, {"bytes", "path"}: the
collators decode them, convert them to RGB and treat corrupt ones as the user chose; elsewhere
`load_image(row["image"])` does the same, and `rows.cast_column("image", datasets.Image(mode="RGB"))` gives
PIL images. JSON lines, which may carry their images, and ALBEF's lists go to an Arrow file in the datasets
cache, written anew when a file changes; the other annotations are held in memory. Errors are ValueErrors that
name the file and the line or entry: nothing is skipped silently.
"""

import base64
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, List, Value
from datasets.exceptions import DatasetGenerationError

from .transforms import as_texts

PathLike = str | os.PathLike
Rows = datasets.Dataset | datasets.IterableDataset

IMAGE = datasets.Image(decode=False)
BOX = List(Value("float64"), length=4)
STRINGS = List(Value("string"))


def read_image_text(
    files: PathLike | Sequence[PathLike], image_root: PathLike | None = None, streaming: bool = False
) -> Rows:
    """X-VLM's image files, JSON lines {caption: str or list, binary: base64 | image_rpath: path} → image,
    caption (list of str).

    files: one file, a list, or a directory, whose files are taken in sorted order. image_root: joined to
    relative paths.
    """
    features = Features({"image": IMAGE, "caption": STRINGS})
    return _read_lines(_image_text_row, files, image_root, features, streaming)


def read_regions(
    files: PathLike | Sequence[PathLike], image_root: PathLike | None = None, streaming: bool = False
) -> Rows:
    """X-VLM's region files, JSON lines {elems: [{caption, attributes?, bb: [x, y, w, h]}], caption?, image
    key} → image, phrases (list of str for each region: the alternatives), boxes, caption (list of str, empty
    if there is none).

    Where a region has attributes, its alternatives are each attribute before each caption.
    """
    features = Features({"image": IMAGE, "phrases": List(STRINGS), "boxes": List(BOX), "caption": STRINGS})
    return _read_lines(_region_row, files, image_root, features, streaming)


def read_retrieval(
    files: PathLike | Sequence[PathLike], image_root: PathLike, split: str = "train", streaming: bool = False
) -> Rows:
    """Karpathy's retrieval files, JSON lists joined in order. "train": {image, caption, image_id} → image,
    caption, image_id (str); any other split: {image, caption: [...]} → image, caption (list of str).
    """
    if split == "train":
        features = Features({"image": IMAGE, "caption": Value("string"), "image_id": Value("string")})
    else:
        features = Features({"image": IMAGE, "caption": STRINGS})
    arguments = {"files": list_files(files), "image_root": str(image_root), "training": split == "train"}
    return rows_in_memory(_retrieval_rows, features, arguments, streaming)


def read_karpathy(
    file: PathLike,
    image_root: PathLike,
    split: str | Sequence[str] = ("train", "restval"),
    streaming: bool = False,
) -> Rows:
    """Karpathy's dataset_coco.json, dataset_flickr30k.json and their like → image, caption (list of str),
    image_id (str, COCO's own where the file has it): a row for each image.

    split: train, val, test, restval, or several; COCO's papers train on train and restval, which others lack.
    """
    splits = (split,) if isinstance(split, str) else tuple(split)
    features = Features({"image": IMAGE, "caption": STRINGS, "image_id": Value("string")})
    arguments = {"files": list_files(file), "image_root": str(image_root), "splits": splits}
    return rows_in_memory(_karpathy_rows, features, arguments, streaming)


def read_refcoco(
    refs: PathLike,
    instances: PathLike,
    image_root: PathLike,
    split: str | None = None,
    annotation: PathLike | Sequence[PathLike] | None = None,
    detections: PathLike | None = None,
    streaming: bool = False,
) -> Rows:
    """REFER annotation → grounding rows: image, text, box, ref_id, candidates (boxes of all objects of the
    image), image_id (str, its file name).

    refs: REFER's "refs(unc).p" or a JSON list of the same entries; instances: its instances.json. Each
    sentence of a referred object is a row. With `annotation`, X-VLM's JSON lists {image, text, ref_id}, those
    are the rows, and `refs` and `instances` give the boxes. With `detections`, ALBEF's "dets.json" {COCO's
    image id: [[x, y, w, h, ...], ...]}, the candidates are a detector's boxes. split: train, val, testA,
    testB; None for all. image_root: folder of the images.

    `rows.rename_column("text", "caption")` makes retrieval rows, on which weakly supervised grounding trains.
    """
    features = Features(
        {
            "image": IMAGE,
            "text": Value("string"),
            "box": BOX,
            "ref_id": Value("int64"),
            "candidates": List(BOX),
            "image_id": Value("string"),
        }
    )
    referred = _read_refer(refs, instances, split)
    if detections is not None:
        referred = _with_detections(referred, detections)
    files = [None] if annotation is None else list_files(annotation)
    arguments = {"files": files, "image_root": str(image_root), "referred": referred}
    return rows_in_memory(_refcoco_rows, features, arguments, streaming)


# JSON lines


def _read_lines(
    make_row: Callable[[dict, str | None], dict],
    files: PathLike | Sequence[PathLike],
    image_root: PathLike | None,
    features: Features,
    streaming: bool,
) -> Rows:
    arguments = {
        "files": list_files(files),
        "make_row": make_row,
        "image_root": None if image_root is None else str(image_root),
    }
    return cached_rows(_line_rows, features, arguments, streaming)


def cached_rows(
    generator: Callable[..., Iterator[dict]], features: Features, arguments: dict[str, Any], streaming: bool
) -> Rows:
    """Rows of `generator(files=..., stamp=..., ...)` in an Arrow file of the datasets cache, or streamed."""
    if streaming:
        return datasets.IterableDataset.from_generator(generator, features, arguments)
    # The cache is keyed by the arguments; with sizes and times of files and code it notices changes.
    code = {
        function.__code__.co_filename for function in (generator, *arguments.values()) if callable(function)
    }
    stats = [Path(file).stat() for file in (*arguments["files"], *sorted(code))]
    stamp = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    try:
        return datasets.Dataset.from_generator(generator, features, gen_kwargs=arguments | {"stamp": stamp})
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _line_rows(
    files: list[str], make_row: Callable[[dict, str | None], dict], image_root: str | None, stamp: tuple = ()
) -> Iterator[dict[str, Any]]:
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row_or_error(make_row, line, image_root, f"{file}, line {number}")


def _row_or_error(
    make_row: Callable[[dict, str | None], dict], line: str, image_root: str | None, where: str
) -> dict[str, Any]:
    """A row, or what is wrong with it as a ValueError that says where."""
    try:
        return make_row(json.loads(line), image_root)
    except KeyError as error:
        raise ValueError(f"{where}: key {error} is missing") from error
    except (
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # JSONDecodeError and binascii.Error are ValueErrors
        raise ValueError(f"{where}: not a valid annotation ({error}); repair or remove the line") from error


def _image_text_row(line: dict, image_root: str | None) -> dict[str, Any]:
    return {"image": _line_image(line, image_root), "caption": check_texts(line["caption"])}


def _region_row(line: dict, image_root: str | None) -> dict[str, Any]:
    phrases = [_alternatives(elem) for elem in line["elems"]]
    boxes = [[float(number) for number in elem["bb"]] for elem in line["elems"]]
    if not boxes or any(len(box) != 4 for box in boxes):
        raise ValueError("elems must hold at least one region, each with bb as [x, y, w, h]")
    caption = check_texts(line["caption"]) if line.get("caption") else []
    return {"image": _line_image(line, image_root), "phrases": phrases, "boxes": boxes, "caption": caption}


def _alternatives(elem: dict) -> list[str]:
    """Texts of a region: attribute and caption, each attribute with each caption."""
    captions, attributes = check_texts(elem["caption"]), as_texts(elem.get("attributes"))
    return [f"{attribute} {caption}" for attribute, caption in product(attributes, captions)] or captions


def check_texts(value: Any, name: str = "caption") -> list[str]:
    """A string or a list of strings as a list; ValueError for anything else."""
    texts = as_texts(value) if isinstance(value, str | list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {value!r}; give a string or a list with at least one")
    return texts


def _line_image(line: dict, image_root: str | None) -> dict[str, Any]:
    if "binary" in line:
        return {"bytes": base64.b64decode(line["binary"], validate=True), "path": None}
    path = line["image_rpath"] if "image_rpath" in line else line["image"]
    return {"bytes": None, "path": os.path.join(image_root or "", path)}


# JSON lists and pickles


def rows_in_memory(
    generator: Callable[..., Iterator[dict]], features: Features, arguments: dict[str, Any], streaming: bool
) -> Rows:
    if streaming:
        return datasets.IterableDataset.from_generator(generator, features, arguments)
    return datasets.Dataset.from_list(list(generator(**arguments)), features)


def _retrieval_rows(files: list[str], image_root: str, training: bool) -> Iterator[dict[str, Any]]:
    for file, number, entry in read_entries(
        files, {"image", "caption"} | ({"image_id"} if training else set())
    ):
        if isinstance(entry["caption"], str) != training:
            expected = (
                "a string in the training split" if training else "a list of strings in an evaluation split"
            )
            raise ValueError(
                f"{file}, entry {number}: caption is {entry['caption']!r}; it must be {expected}"
            )
        row = {"image": os.path.join(image_root, entry["image"]), "caption": entry["caption"]}
        yield row | ({"image_id": str(entry["image_id"])} if training else {})


def _karpathy_rows(files: list[str], image_root: str, splits: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for file in files:
        content, found = load_json(file), set()
        entries = content.get("images") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file} holds no list of images; give Karpathy's dataset_*.json")
        for number, entry in enumerate(entries):
            try:
                found.add(entry["split"])
                row = _karpathy_row(entry, image_root) if entry["split"] in splits else None
            except (KeyError, TypeError) as error:
                raise ValueError(f"{file}, image {number}: not one of Karpathy's ({error!r})") from error
            if row is not None:
                yield row
        if not found & set(splits):
            raise ValueError(f"split is {', '.join(splits)}; {file} has {', '.join(sorted(found))}")


def _karpathy_row(entry: dict, image_root: str) -> dict[str, Any]:
    return {
        "image": os.path.join(image_root, entry.get("filepath", ""), entry["filename"]),
        "caption": check_texts([sentence["raw"] for sentence in entry["sentences"]], "sentences"),
        "image_id": str(entry.get("cocoid", entry["imgid"])),
    }


def _refcoco_rows(
    files: list[str | None], image_root: str, referred: dict[int, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    if files == [None]:
        for ref_id, ref in referred.items():
            for text in ref["texts"]:
                yield _grounding_row(os.path.join(image_root, ref["file_name"]), text, ref_id, ref)
        return
    for file, number, entry in read_entries(files, {"image", "text", "ref_id"}):
        if entry["ref_id"] not in referred:
            raise ValueError(
                f"{file}, entry {number}: ref_id {entry['ref_id']} is not in the REFER file, or not in "
                "the split asked for"
            )
        path = os.path.join(image_root, entry["image"])
        yield _grounding_row(path, entry["text"], entry["ref_id"], referred[entry["ref_id"]])


def _grounding_row(path: str, text: str, ref_id: int, ref: dict[str, Any]) -> dict[str, Any]:
    row = {"image": path, "text": text, "box": ref["box"], "ref_id": ref_id, "candidates": ref["candidates"]}
    return row | {"image_id": os.path.basename(path)}


def _read_refer(refs: PathLike, instances: PathLike, split: str | None) -> dict[int, dict[str, Any]]:
    """ref_id → image_id, file_name, texts, box, candidates."""
    entries = load_json(refs) if str(refs).endswith(".json") else _load_pickle(refs)
    try:
        splits = sorted({ref["split"] for ref in entries})
        objects = load_json(instances)
        file_names = {image["id"]: image["file_name"] for image in objects["images"]}
        boxes = {thing["id"]: thing["bbox"] for thing in objects["annotations"]}
        candidates: dict[int, list] = {}
        for thing in objects["annotations"]:
            candidates.setdefault(thing["image_id"], []).append(thing["bbox"])
        if split is not None and split not in splits:
            raise ValueError(f"split is {split!r}; {refs} has {', '.join(splits)}")
        return {
            ref["ref_id"]: {
                "image_id": ref["image_id"],
                "file_name": file_names[ref["image_id"]],
                "texts": [sentence["sent"] for sentence in ref["sentences"]],
                "box": boxes[ref["ann_id"]],
                "candidates": candidates[ref["image_id"]],
            }
            for ref in entries
            if split in (None, ref["split"])
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{refs} and {instances} do not fit together or are not REFER's files: {error!r}"
        ) from error


def _with_detections(referred: dict[int, dict[str, Any]], path: PathLike) -> dict[int, dict[str, Any]]:
    """`referred` with a detector's boxes as candidates."""
    detected = load_json(path)
    for ref in referred.values():
        boxes = detected.get(str(ref["image_id"])) if isinstance(detected, dict) else None
        if not isinstance(boxes, list) or not all(isinstance(box, list) and len(box) >= 4 for box in boxes):
            raise ValueError(
                f"{path} has no list of boxes [x, y, w, h, ...] under {ref['image_id']}, COCO's id of "
                f"{ref['file_name']}; give a split that the detector has seen"
            )
        ref["candidates"] = [box[:4] for box in boxes]
    return referred


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; anything else in a pickle could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


def _load_pickle(path: PathLike) -> Any:
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a pickle of plain lists, dicts, strings and numbers ({error}); give REFER's own "
            "refs(...).p, or the same entries as JSON"
        ) from error


def load_json(path: PathLike) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); get the file again") from error


def read_entries(files: Sequence[str], keys: set[str]) -> Iterator[tuple[str, int, dict]]:
    """File, position and entry of JSON lists of dicts that hold `keys`."""
    for file in files:
        entries = load_json(file)
        if not isinstance(entries, list):
            raise ValueError(
                f"{file} holds a {type(entries).__name__}; give a JSON list of {{{', '.join(sorted(keys))}}}"
            )
        for number, entry in enumerate(entries):
            missing = keys - set(entry) if isinstance(entry, dict) else keys
            if missing:
                raise ValueError(f"{file}, entry {number}: lacks {', '.join(sorted(missing))}")
            yield file, number, entry


def list_files(files: PathLike | Sequence[PathLike]) -> list[str]:
    """Paths of existing files; of a directory all visible ones, sorted, since each machine lists them in
    another order.
    """
    paths = [Path(files)] if isinstance(files, (str, os.PathLike)) else [Path(file) for file in files]
    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(
            path for path in paths[0].iterdir() if path.is_file() and not path.name.startswith(".")
        )
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(
            f"files is {files}: {missing[0] + ' does not exist' if missing else 'no file found'}"
        )
    return [str(path) for path in paths]
