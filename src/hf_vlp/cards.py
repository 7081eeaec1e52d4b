"""Model cards: what a model is, where it comes from, how it was trained, how good it is, and how to use it.

`push_to_hub` of models, `VLPTrainer` and the converters write them. A README.md that a person wrote, or from
which the line `CARD_MARK` was deleted, stays as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .models.hub import CARD, CARD_MARK, persons_card
from .papers import LOSSES, PAPERS, Paper
from .snippets import detect, predict, read, start

__all__ = ["CARD", "CARD_MARK", "make_card", "persons_card", "write_card"]
REPOSITORY_OF_UNSAVED = "ORG/NAME"


@dataclass(frozen=True)
class Task:
    """What a head does: its name in `hf_vlp.predict`, the Hub's name of it, if there is one, its losses, and
    a text to try it with."""

    name: str | None
    does: str
    pipeline_tag: str | None = None
    losses: tuple[str, ...] = ()
    loss: str = ""
    text: str = "a red circle"


# by the Auto class that stands for a head
TASKS = {
    "AutoModel": Task(None, "turns images and texts into features, without a head", "feature-extraction"),
    "AutoModelForPreTraining": Task("retrieval", "is pre-trained, to start from", "feature-extraction"),
    "AutoModelForRetrieval": Task(
        "retrieval", "finds the texts of images and the images of texts", "zero-shot-image-classification",
        ("loss_itc", "loss_itm"),
    ),
    "AutoModelForGrounding": Task(
        "grounding", "finds the box of what a text refers to", "zero-shot-object-detection",
        ("loss_bbox", "loss_giou"),
    ),
    "AutoModelForVisualQuestionAnswering": Task(
        "vqa", "answers questions about images", "visual-question-answering",
        loss="the cross-entropy of the answers", text="what colour is the circle?",
    ),
    "AutoModelForVisualEntailment": Task(
        "entailment", "tells whether an image entails a sentence",
        loss="the cross-entropy of the three classes", text="There is a circle.",
    ),
    "AutoModelForVisualReasoning": Task(
        "reasoning", "tells whether a sentence is true of two images",
        loss="the cross-entropy of true and false", text="Both images show a circle.",
    ),
    "AutoModelForCaptioning": Task(
        "captioning", "writes captions of images", "image-to-text",
        loss="the cross-entropy of the words, smoothed", text="a picture of",
    ),
    "AutoModelForTextAssignment": Task(
        None, "has learnt which of two images a text belongs to, to start reasoning from",
        loss="the cross-entropy of the two images",
    ),
}  # fmt: skip
DETECTOR = Task(None, "finds regions in images, and their features", "object-detection")
OTHER = Task(None, "is a head of this paper")


def write_card(
    model,
    directory: str | Path,
    name: str = REPOSITORY_OF_UNSAVED,
    *,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    tags: list[str] | None = None,
    licence: str | None = None,
) -> Path:
    """Write README.md into `directory`, unless a person wrote one there.

    Args:
        model: a model of this package; `config.converted_from` tells the official file it comes from.
        name: the repository it goes to, "organization/name".
        training: names and values of its recipe, as `VLPTrainer` gives them.
        metrics: values by name, as the results of `hf_vlp.evaluation` hold them.
        dataset: what the metrics were measured on, such as "RefCOCO+ val".
        tags: more tags.
        licence: in the names of the Hub; by default that of the official code for converted weights, else
            "unknown".

    Raises:
        ValueError: a metric that is no number.
    """
    path = Path(directory) / CARD
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or CARD_MARK in path.read_text(encoding="utf-8"):
        card = make_card(model, name, training, metrics, dataset, tags, licence)
        path.write_text(str(card), encoding="utf-8")
    return path


def make_card(
    model,
    name: str = REPOSITORY_OF_UNSAVED,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    tags: list[str] | None = None,
    licence: str | None = None,
) -> ModelCard:
    """The card that `write_card` writes; arguments and errors are the same."""
    config, task = model.config, _task(model)
    paper, source = PAPERS[config.model_type], getattr(config, "converted_from", None)
    metrics, start = _checked(metrics or {}), _start_of(model, name) if training else None
    data = ModelCardData(
        base_model=start,
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        license=licence or (paper.licence if source else "unknown"),
        language="en",
        tags=["hf_vlp", "vision-language", paper.name.lower(), f"arxiv:{paper.arxiv}", *(tags or [])],
        model_name=name.split("/")[-1],
        eval_results=_results(task, metrics, dataset),
    )
    parts = {
        None: f"{type(model).__name__} {task.does}. {paper.idea}",
        "Model": _facts(model, paper),
        "Use": _use(model, task, name),
        "Training": _training(task, paper, training, source),
        "Results": _table(("metric", "value"), metrics) + f"\n\non {dataset or 'rows that its author chose'}."
        if metrics
        else "",
        "Origin": _origin(paper, task, source),
        "Licence": _licence(paper, licence, source),
        "Limits": _limits(paper, task, metrics),
        "Citation": f"```bibtex\n{paper.bibtex}\n```",
    }
    sections = [f"## {title}\n\n{text}" if title else text for title, text in parts.items() if text]
    text = "\n\n".join([CARD_MARK, f"# {name.split('/')[-1]}", *sections])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}\n", ignore_metadata_errors=True)


def _start_of(model, name: str) -> str | None:
    """The repository that a trained model was loaded from."""
    loaded = model.name_or_path
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", loaded) and not Path(loaded).exists()
    return loaded if is_repository and loaded != name else None


def _task(model) -> Task:
    if model.config.model_type == "vlp_butd":
        return DETECTOR
    return TASKS.get(model.auto_class, OTHER)


def _checked(metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"metrics holds {name}={value!r}; give numbers by name")
    return {name: round(float(value), 6) for name, value in metrics.items()}


def _results(task: Task, metrics: Mapping[str, float], dataset: str | None) -> list[EvalResult] | None:
    dataset = dataset or "rows of the author"
    return [
        EvalResult(
            task_type=task.pipeline_tag or task.name or "other",
            task_name=task.name or task.does,
            dataset_type=re.sub(r"[^\w.-]+", "-", dataset.lower()),
            dataset_name=dataset,
            metric_type=re.sub(r"\W+", "_", name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ] or None


def _facts(model, paper: Paper) -> str:
    link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {paper.venue}, {paper.year}"
    facts = {
        "class": f"`hf_vlp.{type(model).__name__}`, `{model.auto_class}`",
        "paper": link,
        "official code": f"[{paper.code}](https://github.com/{paper.code})",
        "parameters": f"{model.num_parameters():,}",
        "precision": str(model.dtype).removeprefix("torch."),
    }
    vision = getattr(model.config, "vision_config", None)
    if getattr(vision, "image_size", None):
        facts["images"] = f"{vision.image_size} pixels a side, by a trunk of type {vision.model_type}"
    elif hasattr(model.config, "visual_feat_dim"):
        facts["images"] = f"regions of a detector, features of width {model.config.visual_feat_dim}"
    return _table(("", ""), facts)


def _training(task: Task, paper: Paper, training: Mapping[str, Any] | None, source: dict | None) -> str:
    is_pretraining = task is TASKS["AutoModelForPreTraining"]
    names = paper.objectives if is_pretraining else paper.task_losses.get(task.name, task.losses)
    losses = "\n".join(f"- `{name}`: {LOSSES[name]}" for name in names) or task.loss
    parts = [f"It learns by\n\n{losses}" if names else f"It learns by {losses}." if losses else ""]
    if training:
        parts.append(_table(("recipe", ""), training))
    elif source:
        parts.append(f"The paper pre-trains on {paper.data}; see it for the recipe of the official file.")
    else:
        parts.append("Nothing is known here of the rows it was trained on.")
    return "\n\n".join(part for part in parts if part)


def _origin(paper: Paper, task: Task, source: Mapping[str, Any] | None) -> str:
    if source is None:
        return ""
    facts = {
        "official file": f"`{source['file']}`",
        "SHA-256": f"`{source['sha256']}`",
        "keys": ", ".join(f"{source[f'keys_{fate}']} {fate}" for fate in ("used", "dropped", "missing")),
    }
    if task.name in paper.own_heads:
        parity = "The paper has no such head, so that there is no official number to compare with."
    else:
        parity = (
            "On the same weights the outputs of this code equal those of the official code to 1e-5, which "
            "was tested in small sizes, not on this file."
        )
    return f"The weights started from a file of the official code.\n\n{_table(('', ''), facts)}\n\n{parity}"


def _licence(paper: Paper, licence: str | None, source: Mapping[str, Any] | None) -> str:
    if licence:
        return ""
    if source and paper.licence_source:
        return (
            f"{paper.licence} is the licence of the official code, by {paper.licence_source}. Its authors "
            "give none for their weights apart, and data sets have licences of their own."
        )
    return "The author of these weights has not chosen one yet."


def _limits(paper: Paper, task: Task, metrics: Mapping[str, float]) -> str:
    lines = [
        "English only, and short texts; images unlike those of its training are read less well.",
        "It repeats the biases of the images and texts it was trained on; decide nothing about people by it.",
    ]
    if task.name in paper.own_heads:
        lines.append(f"This head is not in the {paper.name} paper, but an addition of hf_vlp.")
    if not metrics:
        lines.append("No scores were given for these weights; measure them before you rely on them.")
    return "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *((name, str(value)) for name, value in rows.items())]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _use(model, task: Task, name: str) -> str:
    """Snippets that run as they stand."""
    if task is DETECTOR:
        return _python(detect(name))
    first = read(model, name, with_package=True)
    if task.name is not None and (task is not TASKS["AutoModelForPreTraining"] or hasattr(model, "match")):
        first = predict(model, name, task.name, task.text)
    elif model.auto_class == "AutoModelForTextAssignment":
        first = start("reasoning", name)
    without = _python(read(model, name, with_package=False))
    return f"{_python(first)}\n\nWithout hf_vlp, by the code in this repository:\n\n{without}"


def _python(code: str) -> str:
    return f"```python\n{code}```"
