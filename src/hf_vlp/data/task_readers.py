"""ALBEF's annotation files, JSON lists of entries → `datasets` rows: pre-training pairs, VQA v2 and its
answer list, SNLI-VE, NLVR2, and the texts of RefCOCO+ (arXiv 2107.07651); X-VLM takes those of VQA v2, NLVR2
and RefCOCO+ (arXiv 2111.08276). Retrieval files and REFER are read by `readers.py`, where it also says what
all readers have in common, LXMERT's lists by `lxmert_readers.py`.

Several files are joined in order. Errors are ValueErrors that name the file and the entry.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import ClassLabel, Features, List, Value

from .readers import (
    IMAGE,
    STRINGS,
    PathLike,
    Rows,
    cached_rows,
    check_texts,
    list_files,
    load_json,
    read_entries,
)

Files = PathLike | Sequence[PathLike]

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")  # 0, 1, 2 as in ALBEF
VISUAL_GENOME_WEIGHT = 0.5  # of its one answer, ALBEF's VQA recipe


def read_captions(files: Files, image_root: PathLike | None = None, streaming: bool = False) -> Rows:
    """ALBEF's pre-training files {image, caption: str or list} → image, caption (list of str).

    image_root: joined to relative paths.
    """
    features = Features({"image": IMAGE, "caption": STRINGS})
    return read_lists(_caption_row, ("image", "caption"), files, (image_root,), features, streaming)


def read_vqa(
    files: Files, vqa_root: PathLike, vg_root: PathLike | None = None, streaming: bool = False
) -> Rows:
    """ALBEF's VQA files {image, question, question_id, dataset: "vqa" | "vg", answer?: list or str}, and
    X-VLM's, where dataset may be missing ("vqa") or "gqa" (image is a whole path) → image, question, answers
    (list of str, one per annotator; empty where the file has none, as for the test), question_id (int),
    answer_weight (float: 1, of Visual Genome 0.5).

    vqa_root, vg_root: folders of COCO's and of Visual Genome's images.
    """
    features = Features(
        {
            "image": IMAGE,
            "question": Value("string"),
            "answers": STRINGS,
            "question_id": Value("int64"),
            "answer_weight": Value("float64"),
        }
    )
    keys = ("image", "question", "question_id")
    return read_lists(_question_row, keys, files, (vqa_root, vg_root), features, streaming)


def read_answer_list(file: PathLike) -> list[str]:
    """The answers that VQA ranks, from a JSON list of strings (ALBEF's answer_list.json has 3,128)."""
    answers = load_json(file)
    if not isinstance(answers, list) or not answers or not all(isinstance(item, str) for item in answers):
        raise ValueError(f"{file} is not a list of answers; give a JSON list of strings, at least one")
    return answers


def read_snli_ve(files: Files, image_root: PathLike, streaming: bool = False) -> Rows:
    """ALBEF's SNLI-VE files {image: id of Flickr30k, sentence, label} → image (`id.jpg`), sentence, label (0
    contradiction, 1 neutral, 2 entailment).
    """
    label = ClassLabel(names=list(ENTAILMENT_LABELS))
    features = Features({"image": IMAGE, "sentence": Value("string"), "label": label})
    keys = ("image", "sentence", "label")
    return read_lists(_entailment_row, keys, files, (image_root,), features, streaming)


def read_nlvr2(files: Files, image_root: PathLike, streaming: bool = False) -> Rows:
    """ALBEF's NLVR2 files {images: [first, second], sentence, label: "True" | "False", identifier?} → images
    (two), sentence, label (bool), identifier (str, such as "dev-850-0-1"; None where the file has none).
    """
    features = Features(
        {
            "images": List(IMAGE),
            "sentence": Value("string"),
            "label": Value("bool"),
            "identifier": Value("string"),
        }
    )
    keys = ("images", "sentence", "label")
    return read_lists(_pair_row, keys, files, (image_root,), features, streaming)


def read_grounding_texts(files: Files, image_root: PathLike, streaming: bool = False) -> Rows:
    """ALBEF's training file of RefCOCO+ {image, text} → retrieval rows: image, caption, image_id (str, the
    file name), on which weakly supervised grounding trains.
    """
    features = Features({"image": IMAGE, "caption": Value("string"), "image_id": Value("string")})
    return read_lists(_grounding_text_row, ("image", "text"), files, (image_root,), features, streaming)


def read_lists(
    make_row: Callable[..., dict],
    keys: tuple[str, ...],
    files: Files,
    roots: tuple[PathLike | None, ...],
    features: Features,
    streaming: bool,
) -> Rows:
    """`make_row(entry, *roots)` of every entry of JSON lists of dicts that hold `keys`."""
    arguments = {
        "files": list_files(files),
        "make_row": make_row,
        "keys": keys,
        "roots": tuple(None if root is None else str(root) for root in roots),
    }
    return cached_rows(_list_rows, features, arguments, streaming)


def _list_rows(
    files: list[str],
    make_row: Callable[..., dict],
    keys: tuple[str, ...],
    roots: tuple[str | None, ...],
    stamp: tuple = (),
) -> Iterator[dict[str, Any]]:
    for file, number, entry in read_entries(files, set(keys)):
        try:
            row = make_row(entry, *roots)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, entry {number}: {error}") from error
        yield row


def _caption_row(entry: dict, image_root: str | None) -> dict[str, Any]:
    return {"image": _path(image_root or "", entry["image"]), "caption": check_texts(entry["caption"])}


def _question_row(entry: dict, vqa_root: str, vg_root: str | None) -> dict[str, Any]:
    dataset, roots = entry.get("dataset", "vqa"), {"vqa": vqa_root, "vg": vg_root, "gqa": ""}
    if dataset not in roots:
        raise ValueError(f"dataset is {dataset!r}; it must be vqa, vg or gqa")
    if roots[dataset] is None:
        raise ValueError("dataset is 'vg' and vg_root is None; give the folder of Visual Genome's images")
    if not isinstance(entry["question_id"], int):
        raise ValueError(f"question_id is {entry['question_id']!r}; it must be an integer")
    return {
        "image": _path(roots[dataset], entry["image"]),
        "question": entry_text(entry, "question"),
        "answers": check_texts(entry["answer"], "answer") if "answer" in entry else [],
        "question_id": entry["question_id"],
        "answer_weight": VISUAL_GENOME_WEIGHT if dataset == "vg" else 1.0,
    }


def _entailment_row(entry: dict, image_root: str) -> dict[str, Any]:
    if entry["label"] not in ENTAILMENT_LABELS:
        raise ValueError(f"label is {entry['label']!r}; it must be one of {', '.join(ENTAILMENT_LABELS)}")
    return {
        "image": _path(image_root, f"{entry['image']}.jpg"),
        "sentence": entry_text(entry, "sentence"),
        "label": ENTAILMENT_LABELS.index(entry["label"]),
    }


def _pair_row(entry: dict, image_root: str) -> dict[str, Any]:
    if not isinstance(entry["images"], list) or len(entry["images"]) != 2:
        raise ValueError(f"images is {entry['images']!r}; it must be a list of two paths")
    if entry["label"] not in ("True", "False"):
        raise ValueError(f'label is {entry["label"]!r}; it must be "True" or "False"')
    return {
        "images": [_path(image_root, image) for image in entry["images"]],
        "sentence": entry_text(entry, "sentence"),
        "label": entry["label"] == "True",
        "identifier": entry.get("identifier"),
    }


def _grounding_text_row(entry: dict, image_root: str) -> dict[str, Any]:
    return {
        "image": _path(image_root, entry["image"]),
        "caption": entry_text(entry, "text"),
        "image_id": os.path.basename(entry["image"]),
    }


def _path(root: str, image: str) -> str:
    if not isinstance(image, str):
        raise ValueError(f"an image is {image!r}; it must be a string, its path")
    return os.path.join(root, image)


def entry_text(entry: dict, key: str) -> str:
    if not isinstance(entry[key], str):
        raise ValueError(f"{key} is {entry[key]!r}; it must be a string")
    return entry[key]
