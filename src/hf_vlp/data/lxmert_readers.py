"""LXMERT's annotation files, JSON lists of entries → `datasets` rows: pre-training sentences, VQA v2, GQA,
NLVR2, and tables of answers (arXiv 1908.07490).

Rows have no images, but their ids: strings, by which `hf_vlp.data.features.with_regions` finds the regions.
What all readers have in common is told in `readers.py`; errors are ValueErrors that name file and entry.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from datasets import Features, List, Value

from ..models.answers import simplify_answer
from .readers import STRINGS, PathLike, Rows, cached_rows, list_files, load_json, read_entries
from .task_readers import Files, entry_text, read_answer_list, read_lists

ANSWERS = {"answers": STRINGS, "answer_scores": List(Value("float64"))}


def read_answer_table(file: PathLike, sources: Collection[str] | None = None) -> list[str]:
    """The answers that a model chooses from, in the order of its classes: LXMERT's all_ans.json, a list of
    {ans, dsets}, or a JSON list of strings, such as its trainval_label2ans.json.

    sources: keep only answers of these data sets, of "vqa", "gqa" and "visual7w".
    """
    entries = load_json(file)
    if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
        if sources is not None:
            raise ValueError(f"{file} does not say where answers come from; leave sources at None")
        return read_answer_list(file)
    table = [(entry["ans"], set(entry["dsets"])) for *_, entry in read_entries([str(file)], {"ans", "dsets"})]
    known = set().union(*(dsets for _, dsets in table))
    if sources is not None and not set(sources) <= known:
        raise ValueError(f"sources is {sorted(sources)}; {file} has answers of {', '.join(sorted(known))}")
    return [answer for answer, dsets in table if sources is None or dsets & set(sources)]


def read_lxmert_pretraining(
    files: Files, answers: Sequence[str] | None = None, streaming: bool = False
) -> Rows:
    """LXMERT's pre-training files {img_id, sentf: {source: [sentence]}, labelf: {source: [{answer: score}]}}
    → a row for each sentence: image_id (str), caption (str), source (str, such as "mscoco" or "vqa"), answers
    (list of str) and answer_scores (list of float), both empty where the sentence is no question.

    answers: the table, outside of which answers are dropped. Answers are read as `simplify_answer` makes
    them; of those that it makes equal one score is kept, as in the official code.
    """
    features = Features(
        {"image_id": Value("string"), "caption": Value("string"), "source": Value("string"), **ANSWERS}
    )
    table = None if answers is None else tuple(answers)
    return cached_rows(_sentence_rows, features, {"files": list_files(files), "answers": table}, streaming)


def read_lxmert_vqa(files: Files, streaming: bool = False) -> Rows:
    """LXMERT's VQA files {img_id, question_id, sent, label?: {answer: score}, answer_type?} → image_id (str),
    question, answers (list of str) and answer_scores (list of float), both empty where the file has none, as
    for the test; question_id (int), question_type (its answer_type "yes/no", "number" or "other"; None where
    the file has none).
    """
    features = Features(
        {
            "image_id": Value("string"),
            "question": Value("string"),
            **ANSWERS,
            "question_id": Value("int64"),
            "question_type": Value("string"),
        }
    )
    return read_lists(_vqa_row, ("img_id", "question_id", "sent"), files, (), features, streaming)


def read_lxmert_gqa(files: Files, streaming: bool = False) -> Rows:
    """LXMERT's GQA files {img_id, question_id, sent, label?: {answer: 1.0}} → as `read_lxmert_vqa`, with
    question_id as str and without question_type.
    """
    features = Features(
        {
            "image_id": Value("string"),
            "question": Value("string"),
            **ANSWERS,
            "question_id": Value("string"),
        }
    )
    return read_lists(_gqa_row, ("img_id", "question_id", "sent"), files, (), features, streaming)


def read_lxmert_nlvr2(files: Files, streaming: bool = False) -> Rows:
    """LXMERT's NLVR2 files {img0, img1, sent, label: 0 | 1, identifier} → image_ids (two), sentence, label
    (bool), identifier (str, such as "dev-850-0-1").
    """
    features = Features(
        {
            "image_ids": STRINGS,
            "sentence": Value("string"),
            "label": Value("bool"),
            "identifier": Value("string"),
        }
    )
    keys = ("img0", "img1", "sent", "label", "identifier")
    return read_lists(_pair_row, keys, files, (), features, streaming)


def _sentence_rows(
    files: list[str], answers: tuple[str, ...] | None, stamp: tuple = ()
) -> Iterator[dict[str, Any]]:
    table = None if answers is None else frozenset(answers)
    for file, number, entry in read_entries(files, {"img_id", "sentf"}):
        try:
            rows = list(_rows_of_image(entry, table))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, entry {number}: {error}") from error
        yield from rows


def _rows_of_image(entry: dict, table: frozenset[str] | None) -> Iterator[dict[str, Any]]:
    sentences_of, labels_of = entry["sentf"], entry.get("labelf", {})
    if not isinstance(sentences_of, dict) or not isinstance(labels_of, dict):
        raise ValueError("sentf or labelf is no dict; both must be dicts from a source to its list")
    for source, sentences in sentences_of.items():
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f"sentf has {sentences!r} of {source}; it must be a list of strings")
        labels = labels_of.get(source, [{}] * len(sentences))
        if len(labels) != len(sentences):
            raise ValueError(f"{source} has {len(sentences)} sentences and {len(labels)} labels")
        for sentence, label in zip(sentences, labels, strict=True):
            row = {"image_id": str(entry["img_id"]), "caption": sentence, "source": source}
            yield row | _answers(_simplify(_check_label(label), table))


def _simplify(label: dict[str, float], table: frozenset[str] | None) -> dict[str, float]:
    """Scores of the simplified answers. A rewritten answer takes the place of an equal one, in whichever
    order they come: what the official loop over the dict amounts to.
    """
    scores = dict(label)
    for answer in label:
        simple = simplify_answer(answer)
        if table is not None and simple not in table:
            del scores[answer]
        elif simple != answer:
            scores[simple] = scores.pop(answer)
    return scores


def _vqa_row(entry: dict) -> dict[str, Any]:
    if not isinstance(entry["question_id"], int):
        raise ValueError(f"question_id is {entry['question_id']!r}; it must be an integer")
    row = _question_row(entry)
    return row | {"question_id": entry["question_id"], "question_type": entry.get("answer_type")}


def _gqa_row(entry: dict) -> dict[str, Any]:
    return _question_row(entry) | {"question_id": str(entry["question_id"])}


def _question_row(entry: dict) -> dict[str, Any]:
    row = {"image_id": str(entry["img_id"]), "question": entry_text(entry, "sent")}
    return row | _answers(_check_label(entry.get("label", {})))


def _pair_row(entry: dict) -> dict[str, Any]:
    if entry["label"] not in (0, 1):
        raise ValueError(f"label is {entry['label']!r}; it must be 0 or 1")
    return {
        "image_ids": [str(entry["img0"]), str(entry["img1"])],
        "sentence": entry_text(entry, "sent"),
        "label": bool(entry["label"]),
        "identifier": entry_text(entry, "identifier"),
    }


def _check_label(label: Any) -> dict[str, float]:
    if not isinstance(label, dict) or not all(isinstance(score, (int, float)) for score in label.values()):
        raise ValueError(f"label is {label!r}; it must be a dict of answers and their scores")
    return label


def _answers(scores: dict[str, float]) -> dict[str, list]:
    return {"answers": list(scores), "answer_scores": list(scores.values())}
