"""The page: a tab for every task that the models have a head with weights for."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from os import PathLike
from typing import Any

import gradio as gr
from transformers import AutoConfig

from ..loading import place_extractor
from ..papers import PAPERS
from ..pipelines import PREFIX, TASKS, VLPPipeline, pipeline
from .panels import NOTE, PANELS, Panel

FONT = ["ui-sans-serif", "system-ui", "sans-serif"]
CSS = ".gallery .grid-wrap { padding-top: 40px; }"  # else the label lies on the first picture
TASK_NAMES = {TASKS[name][0]: name for name in PANELS}  # "vqa": "visual-question-answering"


def build(
    models: str | PathLike | Sequence[str | PathLike],
    tasks: Sequence[str] | None = None,
    extractor: str | None = None,
    device: int | str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> gr.Blocks:
    """A page with a tab for each model and task; `launch` shows it.

    Args:
        models: a folder or Hub name, or several.
        tasks: some of "grounding", "vqa", "retrieval", "captioning", "entailment", "reasoning"; without them
            every one that a model has a head with weights for.
        extractor: what finds the regions of LXMERT models, in place of their own.
        device: where to compute; without it a GPU if there is one.
        hub: what `from_pretrained` takes for models on the Hub: `revision`, `token`, ...

    Raises:
        ValueError: no models, no such task, a model without such a head, LXMERT without an extractor, or an
            extractor without LXMERT.
    """
    names = [str(name) for name in ([models] if isinstance(models, (str, PathLike)) else models)]
    if not names:
        raise ValueError("models is empty; give at least one folder or Hub name")
    if unknown := set(tasks or ()) - TASK_NAMES.keys():
        raise ValueError(f"tasks has {', '.join(sorted(unknown))}; the tasks are {', '.join(TASK_NAMES)}")
    hub = dict(hub or {})
    found = _load_all(list(dict.fromkeys(names)), tasks, extractor, device, hub)
    shown = _short_names(names)
    times = Counter(task for pipes in found.values() for task in pipes)
    title = f"Try {next(iter(shown.values())) if len(shown) == 1 else f'{len(shown)} models'}"
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\n\n{_about(found)}")
        with gr.Tabs():
            for task, panel_class in PANELS.items():
                for name, pipes in found.items():
                    if task in pipes:
                        _add_tab(panel_class(pipes[task]), shown[name], is_alone=times[task] == 1)
    return page


def launch(page: gr.Blocks, **options: Any) -> None:
    """Show a page: `page.launch` without a public link, without anything from another server, and with the
    fonts of the machine."""
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    plain = {
        "theme": theme,
        "css": CSS,
        "share": False,
        "ssr_mode": False,
        "footer_links": ["api", "gradio", "settings"],
    }
    page.launch(**plain | options)


def _load_all(
    names: Sequence[str], tasks: Sequence[str] | None, extractor: str | None, device, hub: dict
) -> dict[str, dict[str, VLPPipeline]]:
    """Pipelines by model and task."""
    types = {name: AutoConfig.from_pretrained(name, **hub).model_type for name in names}
    if extractor is not None and "vlp_lxmert" not in types.values():
        raise ValueError(f"extractor is {extractor}, but no model reads regions; leave it out")
    found = {}
    for name in names:
        finds_regions = {"extractor": extractor} if types[name] == "vlp_lxmert" else {}
        found[name], reasons = _load(name, tasks, device=device, hub=hub, **finds_regions)
        if not found[name]:
            raise ValueError(f"{name} has nothing to try: {'; '.join(dict.fromkeys(reasons))}")
    if missing := [
        task for task in tasks or () if not any(TASK_NAMES[task] in one for one in found.values())
    ]:
        raise ValueError(f"tasks has {', '.join(missing)}, for which no model has a head with weights")
    return found


def _load(name: str, tasks: Sequence[str] | None, **options) -> tuple[dict[str, VLPPipeline], list[str]]:
    """Pipelines by task, and why there is none of the others."""
    pipes, reasons = {}, []
    for task in (TASK_NAMES[one] for one in tasks or TASK_NAMES):
        if pipes:  # what finds regions is loaded once
            options |= {"processor": next(iter(pipes.values())).processor}
        try:
            pipes[task] = pipeline(task, model=name, **options)
        except ValueError as error:
            reasons.append(str(error))
    for pipe in list(pipes.values())[:1]:
        try:
            place_extractor(pipe.processor, pipe.device)
        except ValueError as error:
            raise ValueError(
                f"extractor is None, but {name} reads regions of images and names nothing that finds them; "
                "give a detector's folder or name"
            ) from error
    return pipes, reasons


def _add_tab(panel: Panel, model: str, is_alone: bool):
    """A tab that is named after its task, and after its model too where others do the same."""
    label = panel.title if is_alone else f"{panel.title} · {model}"
    task = TASKS[panel.pipe.task.removeprefix(PREFIX)][0]
    api_name = task if is_alone else re.sub(r"\W+", "_", f"{task}_{model}")
    examples = panel.examples()
    with gr.Tab(label):
        gr.Markdown(f"`{model}` ({type(panel.pipe.model).__name__}) {panel.does}.")
        with gr.Row():
            with gr.Column():
                inputs = panel.inputs(*examples[0])
                button = gr.Button(panel.button, variant="primary")
            with gr.Column():
                outputs = panel.outputs()
        gr.Examples(
            examples, inputs[: len(examples[0])], label="Examples: drawn scenes", cache_examples=False
        )
    asked = gr.on(
        [button.click, *(one.submit for one in inputs if isinstance(one, gr.Textbox) and one.lines == 1)],
        _told(panel.run),
        inputs,
        outputs,
        api_name=api_name,
        concurrency_limit=1,
        concurrency_id="models",
    )
    return asked


def _told(run: Callable) -> Callable:
    """What a person can mend is told on the page."""

    @wraps(run)
    def told(*values):
        try:
            found = run(*values)
        except (ValueError, OSError) as error:
            raise gr.Error(
                escape(str(error), quote=False), duration=None, title=NOTE, print_exception=False
            ) from error
        return found if len(found) > 1 else found[0]

    return told


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """What to call models: the last part of their names, unless two have the same."""
    last = {name: name.rstrip("/").split("/")[-1] for name in names}
    times = Counter(last.values())
    return {name: short if times[short] == 1 else name for name, short in last.items()}


def _about(found: Mapping[str, Mapping[str, VLPPipeline]]) -> str:
    """The papers of the models."""
    types = {pipe.model.config.model_type: None for pipes in found.values() for pipe in pipes.values()}
    papers = [PAPERS[model_type] for model_type in types]
    return " ".join(
        f"{paper.name}: [{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {paper.venue}, {paper.year}."
        for paper in papers
    )
