"""SOHO's annotation files → `datasets` rows: pre-training captions, VQA v2, its answers (arXiv 2104.03135).

Retrieval files are read by `read_retrieval`, SNLI-VE and NLVR2 by `read_snli_ve` and `read_nlvr2`. Rows with
one image get `width` and `height` from `hf_vlp.data.orientation.with_image_sizes`. What all readers have in
common is told in `readers.py`; errors are ValueErrors that name file and entry.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Features, List, Value

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
from .task_readers import Files, entry_text

MIN_SIDE = 32  # pixels; smaller images are left out of training, as in the official code
_IMAGE_KEYS = {"file_name", "image_id", "width", "height"}
_IMAGE_FEATURES = {
    "image": IMAGE,
    "image_id": Value("string"),
    "width": Value("int64"),
    "height": Value("int64"),
}


def read_soho_pretraining(
    files: Files, image_root: PathLike, captions_per_row: int = 4, streaming: bool = False
) -> Rows:
    """SOHO's pre-training files {file_name, image_id, width, height, captions: [str]} → a row for every
    `captions_per_row` captions of an image, in their order: image, image_id (str), width, height, caption
    (list of str, `captions_per_row` of them).

    The last row of an image is filled with captions of the same image, drawn once and for all, so that one
    with 5 captions gives 2 rows of 4. Images below 32 pixels are left out. image_root: folder of the images
    of all `files`; `datasets.concatenate_datasets` joins those of several folders.

    Raises:
        ValueError: `captions_per_row` is below 1, or an entry is wrong.
    """
    if captions_per_row < 1:
        raise ValueError(f"captions_per_row is {captions_per_row}; give 1 or more")
    features = Features({**_IMAGE_FEATURES, "caption": STRINGS})
    arguments = {"files": list_files(files), "image_root": str(image_root), "size": captions_per_row}
    return cached_rows(_caption_rows, features, arguments, streaming)


def read_soho_vqa(files: Files, image_root: PathLike, streaming: bool = False) -> Rows:
    """SOHO's VQA files {data: [{file_name, image_id, width, height, vqa: [{question, question_id, labels,
    scores}]}], label2ans} → a row for each question: image, image_id (str), width, height, question,
    question_id (int), answers (list of str) and answer_scores (list of float).

    Images below 32 pixels are left out. In files of the test an entry has question and question_id itself;
    its answers are empty, and none is left out.
    """
    features = Features(
        {
            **_IMAGE_FEATURES,
            "question": Value("string"),
            "question_id": Value("int64"),
            "answers": STRINGS,
            "answer_scores": List(Value("float64")),
        }
    )
    arguments = {"files": list_files(files), "image_root": str(image_root)}
    return cached_rows(_question_rows, features, arguments, streaming)


def read_soho_answers(file: PathLike) -> list[str]:
    """The answers that a model chooses from, in the order of its classes, of a VQA file of SOHO."""
    return _load_vqa(file)["label2ans"]


def _caption_rows(
    files: list[str], image_root: str, size: int, stamp: tuple = ()
) -> Iterator[dict[str, Any]]:
    for file, number, entry in read_entries(files, _IMAGE_KEYS | {"captions"}):
        yield from _rows_of_entry(_caption_rows_of, file, number, entry, image_root, size)


def _question_rows(files: list[str], image_root: str, stamp: tuple = ()) -> Iterator[dict[str, Any]]:
    for file in files:
        content = _load_vqa(file)
        for number, entry in enumerate(content["data"]):
            yield from _rows_of_entry(
                _question_rows_of, file, number, entry, image_root, content["label2ans"]
            )


def _rows_of_entry(
    make_rows: Callable[..., Iterator[dict]], file: str, number: int, entry: dict, *settings: Any
) -> list[dict[str, Any]]:
    """`make_rows(entry, *settings)`, or what is wrong with the entry as a ValueError that says where."""
    try:
        return list(make_rows(entry, *settings))
    except KeyError as error:
        raise ValueError(f"{file}, entry {number}: lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}, entry {number}: {error}") from error


def _caption_rows_of(entry: dict, image_root: str, size: int) -> Iterator[dict[str, Any]]:
    captions, image = check_texts(entry["captions"], "captions"), _image_columns(entry, image_root)
    if min(image["width"], image["height"]) < MIN_SIDE:
        return
    rng = random.Random(image["image_id"])
    for start in range(0, len(captions), size):
        group, fill = captions[start : start + size], rng.sample(captions, len(captions))
        missing = size - len(group)
        yield image | {"caption": group + (fill * missing)[:missing]}


def _question_rows_of(entry: dict, image_root: str, answers: Sequence[str]) -> Iterator[dict[str, Any]]:
    image, questions = _image_columns(entry, image_root), entry.get("vqa")
    if questions is None:  # of the test
        questions = [{key: entry[key] for key in ("question", "question_id")}]
    elif min(image["width"], image["height"]) < MIN_SIDE:
        return
    for question in questions:
        labels, scores = question.get("labels", []), question.get("scores", [])
        if len(labels) != len(scores) or not all(0 <= label < len(answers) for label in labels):
            raise ValueError(
                f"labels is {labels} and scores {scores}; they must be as many, labels positions in the "
                f"{len(answers)} of label2ans"
            )
        if not isinstance(question["question_id"], int):
            raise ValueError(f"question_id is {question['question_id']!r}; it must be an integer")
        yield {
            **image,
            "question": entry_text(question, "question"),
            "question_id": question["question_id"],
            "answers": [answers[label] for label in labels],
            "answer_scores": [float(score) for score in scores],
        }


def _image_columns(entry: dict, image_root: str) -> dict[str, Any]:
    return {
        "image": os.path.join(image_root, entry_text(entry, "file_name")),
        "image_id": str(entry["image_id"]),
        "width": int(entry["width"]),
        "height": int(entry["height"]),
    }


def _load_vqa(file: PathLike) -> dict[str, Any]:
    content = load_json(file)
    answers = content.get("label2ans") if isinstance(content, dict) else None
    if not isinstance(answers, list) or not isinstance(content.get("data"), list):
        raise ValueError(
            f"{file} is not SOHO's VQA; it must be a JSON dict with the lists data and label2ans"
        )
    return content
