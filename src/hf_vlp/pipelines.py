"""One line from the name of a model to its predictions, for single images, lists and streams.

    pipe = hf_vlp.pipeline("visual-question-answering", model="org/albef-vqa")
    pipe("photo.jpg", "what is on the table?")

Importing the package registers them with transformers, as `vlp-visual-question-answering` and so on, since
transformers 5 has no task of that name any more: `transformers.pipeline("vlp-visual-grounding", model=...)`.
Their results are those of `hf_vlp.predict`.
"""

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from .heads import load_head
from .loading import load_processor, place_extractor
from .models.processing_lxmert import LXMERTProcessor

# pipeline: the task of `predict`, and what its rows call the text
TASKS = {
    "visual-question-answering": ("vqa", ("question", "text")),
    "image-text-retrieval": ("retrieval", ("caption", "text")),
    "visual-grounding": ("grounding", ("text",)),
    "visual-reasoning": ("reasoning", ("sentence", "text")),
    "visual-entailment": ("entailment", ("sentence", "text")),
    "image-captioning": ("captioning", ("prompt",)),  # a row's text is what people wrote
    "feature-extraction": ("features", ("text", "caption")),
}
PREFIX = "vlp-"  # of the names in transformers


def pipeline(
    task: str,
    model: str | PathLike | PreTrainedModel,
    processor: ProcessorMixin | None = None,
    device: int | str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    extractor: str | None = None,
    hub: Mapping[str, Any] | None = None,
    **options: Any,
) -> "VLPPipeline":
    """A pipeline for one of `TASKS`.

    Args:
        model: folder or Hub name of a model with the weights of the head, see `load_head`, or such a head.
        processor: that of a model which is given as an object.
        device: where to compute; without it a GPU if there is one, or where a given model is.
        dtype: of the weights, if another than the one they were saved in.
        batch_size: rows at a time.
        extractor: what finds LXMERT's regions in images, in place of the model's own.
        hub: what `from_pretrained` takes for models on the Hub: `revision`, `token`, `cache_dir`, ...
        options: of the task, for every call, see `VLPPipeline`.

    Raises:
        ValueError: no such task, a model or weights without its head, options of other tasks, or a model
            without its processor.
    """
    name = task.removeprefix(PREFIX)
    if name not in TASKS:
        raise ValueError(f"task is {task!r}; the tasks are {', '.join(TASKS)}")
    hub = dict(hub or {})
    if isinstance(model, PreTrainedModel):
        if processor is None or extractor is not None:
            raise ValueError("model is an object; give its processor too, which holds LXMERT's extractor")
        device = model.device if device is None else device
        model = (
            model if dtype is None else model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        )
    else:
        folder = str(model)
        model = load_head(TASKS[name][0], folder, dtype=dtype, **hub)
        processor = processor or load_processor(folder, extractor, **hub)
    return VLPPipeline(
        model=model, processor=processor, task=PREFIX + name, device=device, batch_size=batch_size, **options
    )


class VLPPipeline(Pipeline):
    """What `pipeline` makes: called with images and texts it gives predictions, see `hf_vlp.predict`.

    | task | options | of each row |
    |---|---|---|
    | visual-question-answering | `answers`, `top_k` | `answers` |
    | image-text-retrieval | `top_k` | `texts`, the best `top_k` of the image's texts, best first |
    | visual-grounding | | `box` in pixels, and what the head tells of it |
    | visual-reasoning, visual-entailment | | `label`, `probabilities` |
    | image-captioning | `num_beams`, `max_length`, `min_length` | `caption` |
    | feature-extraction | | `image_features`, `text_features`, `features` |
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False

    def __call__(
        self,
        images: Any = None,
        texts: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        return_heatmap: bool = False,
        **options: Any,
    ) -> dict | list[dict] | Iterator[dict]:
        """Predict.

        Args:
            images: an image, whatever `load_image` takes, or LXMERT's regions of one; a list of them, for
                reasoning left and right ones in turn; a row, a list of rows, or a stream of rows or images: a
                generator, a `datasets` dataset, streaming or not, a DataLoader's dataset. A row holds `image`
                (or `images`, `regions`), and the text as the task's data sets call it, see `TASKS`.
            texts: one for each image or for all, or several for one; in retrieval for every image.
            batch_size: rows at a time, those of the pipeline without it. A stream is read that far ahead.
            return_heatmap: add `heatmap`, a tensor (g, g) of where the head looks, 1 where it is hottest;
                of reasoning (2, g, g), of retrieval one for each text.
            options: of the task.

        Returns:
            A dict for an image and a text or a row, else a list of them, for a stream an iterator that
            computes as it goes.

        Raises:
            ValueError: images and texts that do not fit, rows without what the task reads, options of other
                tasks, or a heat map of a head that has none.
        """
        options = {**self._forward_params, **self._sanitize_parameters(**options)[1]}
        if batch_size is None:
            batch_size = 32 if self._batch_size is None else self._batch_size
        if return_heatmap:
            self._check_heatmap()
        if _is_stream(images):
            rows = (self._row(item, texts, place) for place, item in enumerate(images))
            return self._run(rows, batch_size, return_heatmap, options)
        rows, is_single = self._given(images, texts)
        found = list(self._run(rows, batch_size, return_heatmap, options))
        return found[0] if is_single else found

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        """transformers asks for options of three stages; here there is one."""
        from .prediction import predictor

        allowed = set(inspect.signature(predictor(self._task, self.model)).parameters)
        allowed -= {"model", "processor", "rows", "batch_size"}
        allowed |= {"top_k"} if self._task == "retrieval" else set()
        if unknown := options.keys() - allowed:
            takes = ", ".join(sorted(allowed)) or "no options"
            raise ValueError(f"options are {', '.join(sorted(unknown))}, but {self.task} takes {takes}")
        return {}, options, {}

    @property
    def _task(self) -> str:
        """As `predict` calls it."""
        return TASKS[self.task.removeprefix(PREFIX)][0]

    def _given(self, images: Any, texts: str | Sequence[str] | None) -> tuple[list[dict], bool]:
        """Rows, and whether one prediction is asked for."""
        from .prediction import rows_of

        if _is_row(images):
            return [self._row(images, texts, 0)], True
        if isinstance(images, (list, tuple)) and images and _is_row(images[0]):
            return [self._row(row, texts, place) for place, row in enumerate(images)], False
        one_image, one_text = _is_image(images) or images is None, isinstance(texts, str) or texts is None
        if self._task == "reasoning" and not one_image:
            images = [image for one in images for image in ([one] if _is_image(one) else one)]
            one_image = len(images) == 2
        images = [] if images is None else [images] if _is_image(images) else list(images)
        texts = [] if texts is None else [texts] if isinstance(texts, str) else list(texts)
        is_single = one_image and (one_text or self._task == "retrieval")
        return rows_of(self._task, images, texts), is_single

    def _row(self, item: Any, text: str | Sequence[str] | None, place: int) -> dict:
        """A row, or an image with the text for all, as the functions of `prediction` read it."""
        from .evaluation.inference import visual_of
        from .prediction import WITHOUT_TEXTS

        task, names = TASKS[self.task.removeprefix(PREFIX)]
        image = item
        if _is_row(item):
            text = next((item[name] for name in names if item.get(name)), text)
            column = "images" if task == "reasoning" else "image"
            has_none = all(item.get(each) is None for each in (column, "regions"))
            image = None if task == "features" and has_none else visual_of(item, self.processor, column)
        if task == "retrieval":
            text = [text] if isinstance(text, str) else text
        elif text is not None and not isinstance(text, str):
            raise ValueError(f"texts are {text!r}; give one for all of the stream, or rows with their own")
        if not text and task not in WITHOUT_TEXTS:
            raise ValueError(f"row {place} has no text; give it `{names[0]}`, or the pipeline texts")
        row = {"image": image, "place": None if image is None else place, "text": text}
        if task == "reasoning":
            if _is_image(image) or len(image) != 2:
                raise ValueError(f"row {place} is not of two images; give it the left and the right one")
            row["place"] = 2 * place, 2 * place + 1
        if task == "grounding" and _is_row(item) and "proposals" in item:
            row["proposals"] = item["proposals"]
        return row

    def _run(
        self, rows: Iterable[dict], batch_size: int, return_heatmap: bool, options: dict
    ) -> Iterator[dict]:
        from .prediction import predictor

        options, waiting = dict(options), deque()
        top_k = options.pop("top_k", None) if self._task == "retrieval" else None
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; use a number of texts of at least 1")
        predict_rows = predictor(self._task, self.model)
        rows = self._remembered(rows, waiting, return_heatmap)
        for found in predict_rows(self.model, self.processor, rows, batch_size=batch_size, **options):
            row = waiting.popleft()
            if self._task == "retrieval":
                found["texts"] = sorted(found["texts"], key=lambda text: text["text_rank"])[:top_k]
            if not return_heatmap:
                found.pop("heatmap", None)
            elif "heatmap" not in found:
                self._add_heatmaps(row, found)
            yield found

    def _remembered(self, rows: Iterable[dict], waiting: deque, keep_images: bool) -> Iterator[dict]:
        """The rows, each held until its prediction comes, where that needs the image again."""
        from .evaluation.inference import is_region_row
        from .images import load_image

        is_placed = not isinstance(self.processor, LXMERTProcessor) or self.processor.extractor is None
        for row in rows:
            pictures = row["image"] if self._task == "reasoning" else [row["image"]]
            if not is_placed and not all(map(is_region_row, pictures)):
                place_extractor(self.processor, self.device)
                is_placed = True
            if keep_images:
                pictures = [load_image(picture) for picture in pictures]
                row = row | {"image": pictures if self._task == "reasoning" else pictures[0]}
            waiting.append(row if keep_images else None)
            yield row

    def _check_heatmap(self) -> None:
        from .visualization.gradcam import HEADS

        if self._task == "features" or not isinstance(self.model, HEADS):
            raise ValueError(
                f"return_heatmap is True, but {self.task} with {type(self.model).__name__} has none; "
                "leave it out"
            )

    def _add_heatmaps(self, row: dict, found: dict) -> None:
        """Grad-CAM of what was predicted, over all words (`word_heatmaps`)."""
        from .visualization import word_heatmaps

        if self._task == "retrieval":
            texts, images = [each["text"] for each in found["texts"]], [row["image"]] * len(found["texts"])
            maps = word_heatmaps(self.model, self.processor, images, texts)
            for each, heat in zip(found["texts"], maps, strict=True):
                each["heatmap"] = _scaled(heat.sentence)
            return
        targets = [found["answers"][0]["answer"]] if self._task == "vqa" else None
        maps = word_heatmaps(self.model, self.processor, [row["image"]], [row["text"]], targets)
        heat = [_scaled(each.sentence) for each in maps]
        found["heatmap"] = torch.stack(heat) if self._task == "reasoning" else heat[0]

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save the model with its code, and the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload the model with its code and card, and the processor; `options` are those of the model's
        `push_to_hub`."""
        self.model.push_to_hub(repo_id, **options)
        return self.processor.push_to_hub(repo_id, **options)

    def preprocess(self, inputs: Any, **options: Any) -> Any:
        """Not used: rows go through the model as in `predict`, images and texts of a batch together."""
        raise NotImplementedError("call the pipeline")

    _forward = postprocess = preprocess


class HeadLoader:
    """What transformers' `pipeline` loads a model with: `load_head`, which refuses heads that are new."""

    task: str

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> PreTrainedModel:
        known = ("revision", "token", "local_files_only", "cache_dir", "dtype")
        return load_head(cls.task, name, **{option: kwargs[option] for option in known if option in kwargs})


def register() -> None:
    """Make transformers' `pipeline` know the tasks."""
    for name, (task, _) in TASKS.items():
        loader = type("HeadLoader", (HeadLoader,), {"task": task})
        PIPELINE_REGISTRY.register_pipeline(PREFIX + name, VLPPipeline, pt_model=loader, type="multimodal")


def _is_image(item: Any) -> bool:
    """Whether this is one image, or LXMERT's regions of one."""
    is_mapping = isinstance(item, Mapping) and not _is_row(item)
    return is_mapping or isinstance(item, (str, PathLike, Image.Image, np.ndarray, Tensor))


def _is_row(item: Any) -> bool:
    """Whether this names its parts, and is neither regions nor an undecoded image."""
    return isinstance(item, Mapping) and "features" not in item and not item.keys() <= {"bytes", "path"}


def _is_stream(item: Any) -> bool:
    return (
        item is not None and not isinstance(item, (list, tuple)) and not _is_image(item) and not _is_row(item)
    )


def _scaled(heat: Tensor) -> Tensor:
    """A map with 1 where it is hottest; all 0 stays."""
    return heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)
