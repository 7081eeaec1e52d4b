"""Predictions for images and texts, one call per task, batched; every prediction is a dict.

    model = load_head("grounding", "my_model")
    predict("grounding", model, processor, ["photo.jpg"], ["the dog", "the man with a hat"])

Images are whatever `load_image` takes, PIL images, arrays, paths or URLs, for LXMERT also their regions, the
dict that `stack_regions` takes. Predictions name the image by its place in `images`; heat maps and features
are tensors, all else is what JSON holds.

Each task is a function of rows, which may be a stream: they are read a batch at a time, when a prediction is
asked for. A row holds `image`, or for reasoning the two of them, its `place` among the images, and `text`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .evaluation.captioning import write_captions
from .evaluation.classification import pair_inputs
from .evaluation.inference import VisualInputs, batched, evaluating, to_model, visual_inputs
from .evaluation.pairs import read_images, read_texts, scores_pairs
from .evaluation.question_answering import answer_candidates, answer_classes
from .features import extract_features
from .models.image_text import MatchingHead
from .models.image_text_answering import AnsweringHead
from .models.image_text_heatmaps import HeatmapHead
from .models.image_text_sentences import EntailmentHead, ReasoningHead
from .models.modeling_albef import ALBEFModel
from .models.modeling_lxmert import LXMERTPreTrainedModel
from .models.modeling_lxmert_tasks import (
    LXMERTForGrounding,
    LXMERTForQuestionAnswering,
    LXMERTForRetrieval,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
)
from .models.modeling_soho import SOHOPreTrainedModel
from .models.modeling_soho_tasks import (
    SOHOForGrounding,
    SOHOForQuestionAnswering,
    SOHOForRetrieval,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
)
from .models.modeling_xvlm import XVLMForGrounding, XVLMModel
from .models.modeling_xvlm_captioning import XVLMForCaptioning

Prediction = dict[str, Any]
Rows = Iterable[Mapping[str, Any]]
WITHOUT_TEXTS = ("captioning", "features")  # tasks that images alone will do for
RANKED = 128  # answers that are scored whole, as in the official code


def predict(
    task: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str] = (),
    **options,
) -> list[Prediction]:
    """Do a task with its head (`load_head`) on images and texts.

    | task | function | images and texts |
    |---|---|---|
    | "vqa" | `answer_questions` | one image for all, or as many as texts |
    | "retrieval" | `match_texts` | every image with every text |
    | "grounding" | `locate_texts` | one image for all, or as many as texts |
    | "entailment" | `judge_entailment` | one image for all, or as many as texts |
    | "reasoning" | `judge_pairs` | two images for all, or two for each text, one after the other |
    | "captioning" | `describe_images` | images only, or one text, the prompt of all |
    | "features" | `extract_features` | one image for all, or as many as texts; none of either |

    One text for several images, or pairs of images, is said of each of them. `options` are those of the
    function, and for grounding `proposals`, a list of boxes x, y, w, h in pixels for each image.

    In retrieval, a prediction is of a pair, image by image: `image`, `text`, and what `match_texts` tells of
    it, and `image_rank`, the image's place among all images of the text; 1 is the best.

    Raises:
        ValueError: no such task, a model with another head, images and texts that do not fit, proposals for
            another number of images, none for an image, or for a head without a heat map.
    """
    predict_rows, rows = predictor(task, model), rows_of(task, images, texts)
    if task == "grounding" and (proposals := options.pop("proposals", None)) is not None:
        _check_proposals(model, images, proposals)
        rows = [row | {"proposals": proposals[row["place"]]} for row in rows]
    found = list(predict_rows(model, processor, rows, **options))
    return _every_pair(found) if task == "retrieval" else found


def predictor(task: str, model: PreTrainedModel) -> Callable[..., Iterator[Prediction]]:
    """The function of rows that does `task` with `model`, see `predict`.

    Raises:
        ValueError: no such task, or a model with another head.
    """
    if task not in PREDICTORS:
        raise ValueError(f"task is {task!r}; the tasks are {', '.join(PREDICTORS)}")
    function, heads = PREDICTORS[task]
    if not isinstance(model, heads):
        raise ValueError(
            f"model is {type(model).__name__}, which does not do {task}; load it with load_head({task!r}, "
            "...)"
        )
    return function


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Rows,
    answers: Sequence[str] | None = None,
    top_k: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """The `top_k` best of the list `answers` to each question with their probabilities, best first; without a
    list the one answer that ALBEF or X-VLM writes, or the best of LXMERT's or SOHO's own `config.answers`.

    Yields:
        Of each question `image`, `text`, and `answers`: dicts of `answer` and, from a list, `probability`,
        among those that were ranked, or of LXMERT and SOHO each answer's own.

    Raises:
        ValueError: an empty list, or one that is not the head's own, `top_k` or `batch_size` below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; use a number of answers of at least 1")
    writes = answers is None and answer_classes(model) is None
    if not writes:
        answers, candidates = answer_candidates(model, processor, answers)
    for batch in batched(rows, batch_size):
        with evaluating(model):
            visual = visual_inputs(model, processor, [row["image"] for row in batch])
            questions = to_model(processor.encode_questions([row["text"] for row in batch]), model)
            inputs = {**visual.inputs, **questions, "image_index": visual.index}
            if writes:
                written = processor.decode_answers(model.generate(**inputs))
                found = [[{"answer": answer}] for answer in written]
            else:
                ranked = model.rank_answers(**inputs, **candidates, top_k=min(RANKED, len(answers)))
                scored = zip(ranked.indices.tolist(), ranked.probabilities.tolist(), strict=True)
                found = [
                    [
                        {"answer": answers[i], "probability": p}
                        for i, p in list(zip(*best, strict=True))[:top_k]
                    ]
                    for best in scored
                ]
        yield from (_named(row) | {"answers": best} for row, best in zip(batch, found, strict=True))


def match_texts(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Rows, batch_size: int = 32
) -> Iterator[Prediction]:
    """Compare each image with its texts by their features (ITC), and match it with them (ITM). A row's `text`
    is the list of its texts; texts that follow rows share are read once.

    Yields:
        Of each image `image`, and `texts`: dicts of `text`, `cosine` of the features (not of LXMERT and SOHO,
        which have none), `probability` of a match, and by that `text_rank`, the text's place among all texts
        of the image, 1 for the best.

    Raises:
        ValueError: no texts, or `batch_size` below 1.
    """
    score = _match_all if scores_pairs(model) else _compare_and_match

    @lru_cache(maxsize=1)
    def read(texts: tuple[str, ...]) -> tuple[Tensor | None, ...]:
        return _read_texts(model, to_model(processor(text=list(texts), return_tensors="pt"), model))

    for batch in batched(rows, batch_size):
        found = []
        with evaluating(model):
            for texts, group in groupby(batch, key=lambda row: tuple(row["text"])):
                images = [row["image"] for row in group]
                values = score(model, visual_inputs(model, processor, images), *read(texts), batch_size)
                values["text_rank"] = _ranks(values["probability"], dim=1)
                of_pairs = torch.stack([value.double() for value in values.values()], dim=-1).tolist()
                found += [
                    [
                        {"text": text, **dict(zip(values, numbers, strict=True))}
                        for text, numbers in zip(texts, of_image, strict=True)
                    ]
                    for of_image in of_pairs
                ]
        yield from ({"image": row["place"], "texts": each} for row, each in zip(batch, found, strict=True))


def _read_texts(model: PreTrainedModel, tokens: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """What is made of T texts once: states of words, their mask, and features (T, P), None without."""
    mask = tokens["attention_mask"]
    if scores_pairs(model):
        return read_texts(model, tokens), mask, None
    words = model.get_text_features(**tokens)
    return model.read_words(words.last_hidden_state, mask), mask, words.pooler_output


def _compare_and_match(
    model, visual: VisualInputs, read: Tensor, mask: Tensor, features: Tensor, batch_size: int
) -> dict[str, Tensor]:
    """Cosine and probability of a match (I, T)."""
    output, probabilities = model.get_image_features(**visual.repeated()), []
    for embeds in output.last_hidden_state.split(1):
        key_values = model.project_image(embeds)
        pieces = zip(read.split(batch_size), mask.split(batch_size), strict=True)
        logits = [model.match(*piece, key_values, words_read=True) for piece in pieces]
        probabilities.append(torch.cat(logits).float().softmax(dim=1)[:, 1])
    cosines = output.pooler_output @ features.T
    return {"cosine": cosines.float(), "probability": torch.stack(probabilities)}


def _match_all(
    model, visual: VisualInputs, words: Tensor, mask: Tensor, _, batch_size: int
) -> dict[str, Tensor]:
    """Probability of a match (I, T), by a model that has no features to compare."""
    seen = read_images(model, visual.inputs)
    found = model.score_pairs(words, mask, *seen, pairs_per_call=batch_size)
    return {"probability": found[visual.index].float().sigmoid()}


def locate_texts(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Rows, batch_size: int = 32
) -> Iterator[Prediction]:
    """The box of what each text refers to: predicted, or around the hot half of a heat map, or, where a row
    has `proposals` (boxes x, y, w, h in pixels), the one of them with the most heat.

    Yields:
        Of each text `image`, `text`, and `box`, x1, y1, x2, y2 in pixels; from heads with a heat map also
        `probability` of a match and `heatmap`, a tensor (grid, grid) with 1 where it is hottest; from LXMERT
        `region`, the place among the image's regions of the one whose box this is, refined, and `score`, its
        probability among them.

    Raises:
        ValueError: proposals for a head without a heat map, or none in some rows, or `batch_size` below 1.
    """
    for batch in batched(rows, batch_size):
        with evaluating(model):
            visual = visual_inputs(model, processor, [row["image"] for row in batch])
            words = to_model(processor(text=[row["text"] for row in batch], return_tensors="pt"), model)
            output = model(**visual.inputs, **words, region_image_index=visual.index)
        boxes = processor.post_process_boxes(output.pred_boxes, visual.sizes).tolist()
        if "proposals" in batch[0]:
            candidates = [row.get("proposals", ()) for row in batch]
            _check_proposals(model, batch, candidates)
            scores = processor.rank_proposals(output.heatmap, candidates, visual.sizes)
            chosen = [boxes[int(heat.argmax())] for boxes, heat in zip(candidates, scores, strict=True)]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in chosen]
        found = {"box": boxes}
        if isinstance(model, LXMERTForGrounding):
            best = output.region_logits.float().softmax(dim=1).max(dim=1)
            found |= {"region": best.indices.tolist(), "score": best.values.tolist()}
        if output.heatmap is not None:
            found["probability"] = output.itm_logits.float().softmax(dim=1)[:, 1].tolist()
            heat = output.heatmap.float().cpu()
            tiny = torch.finfo(heat.dtype).tiny
            found["heatmap"] = heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=tiny)
        for row, *values in zip(batch, *found.values(), strict=True):
            yield _named(row) | dict(zip(found, values, strict=True))


def judge_entailment(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Rows, batch_size: int = 32
) -> Iterator[Prediction]:
    """Does an image entail a sentence, by the classes of `config.id2label`.

    Yields:
        Of each sentence `image`, `text`, `label`, and `probabilities` by label.

    Raises:
        ValueError: `batch_size` below 1.
    """
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    for batch in batched(rows, batch_size):
        with evaluating(model):
            visual = visual_inputs(model, processor, [row["image"] for row in batch])
            sentences = to_model(processor(text=[row["text"] for row in batch]), model)
            logits = model(**visual.inputs, **sentences, image_index=visual.index).logits
        yield from _judged(batch, logits, labels)


def judge_pairs(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Rows, batch_size: int = 32
) -> Iterator[Prediction]:
    """Is a sentence true of two images, `image` of a row being the left and the right one.

    Yields:
        Of each sentence `images`, `text`, `label` ("true" or "false"), and `probabilities` by label.

    Raises:
        ValueError: `batch_size` below 1.
    """
    for batch in batched(rows, batch_size):
        with evaluating(model):
            pairs, sentences = [row["image"] for row in batch], [row["text"] for row in batch]
            logits = model(**pair_inputs(model, processor, pairs, sentences)).logits
        yield from _judged(batch, logits, ["false", "true"])


def describe_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Rows,
    num_beams: int = 3,
    max_length: int = 20,
    min_length: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """Write a caption of each image, by the settings and the rule of X-VLM's code; a row's `text` may be a
    prompt in place of the processor's own.

    Yields:
        Of each image `image` and `caption`, without the prompt.

    Raises:
        ValueError: `num_beams` or `batch_size` below 1.
    """
    for batch in batched(rows, batch_size):
        captions = []
        with evaluating(model):
            for prompt, group in groupby(batch, key=lambda row: row["text"]):
                images = [row["image"] for row in group]
                captions += write_captions(
                    model, processor, images, num_beams, max_length, min_length, prompt
                )
        yield from (
            {"image": row["place"], "caption": caption} for row, caption in zip(batch, captions, strict=True)
        )


PREDICTORS: dict[str, tuple[Callable[..., Iterator[Prediction]], tuple[type, ...]]] = {
    "vqa": (
        answer_questions,
        (AnsweringHead, LXMERTForQuestionAnswering, SOHOForQuestionAnswering),
    ),
    "retrieval": (match_texts, (MatchingHead, LXMERTForRetrieval, SOHOForRetrieval)),
    "grounding": (locate_texts, (HeatmapHead, LXMERTForGrounding, SOHOForGrounding, XVLMForGrounding)),
    "entailment": (
        judge_entailment,
        (EntailmentHead, LXMERTForVisualEntailment, SOHOForVisualEntailment),
    ),
    "reasoning": (judge_pairs, (ReasoningHead, LXMERTForVisualReasoning, SOHOForVisualReasoning)),
    "captioning": (describe_images, (XVLMForCaptioning,)),
    "features": (
        extract_features,
        (ALBEFModel, XVLMModel, MatchingHead, LXMERTPreTrainedModel, SOHOPreTrainedModel),
    ),
}


def rows_of(task: str, images: Sequence, texts: Sequence[str]) -> list[dict]:
    """Which images go with which texts in `task`, as `predict` tells: rows of `image`, its `place`, and
    `text`.

    Raises:
        ValueError: numbers that do not fit, or none of either.
    """
    if task == "retrieval":
        _check_any(images, texts)
        return [{"image": image, "place": i, "text": texts} for i, image in enumerate(images)]
    if task == "captioning" and (not len(images) or isinstance(texts, str) or len(texts) > 1):
        raise ValueError(
            f"images is {images!r} and texts {texts!r}; give at least one image, and no text but one prompt "
            "for all"
        )
    if task in WITHOUT_TEXTS and len(images) and not len(texts):
        return [{"image": image, "place": i, "text": None} for i, image in enumerate(images)]
    if task == "features" and not len(images) and not isinstance(texts, str):
        return [{"image": None, "place": None, "text": text} for text in texts]
    return pair(images, texts, images_per_text=2 if task == "reasoning" else 1)


def pair(images: Sequence, texts: Sequence[str], images_per_text: int = 1) -> list[dict]:
    """Which image, or pair of images, goes with which text: rows of `image`, its `place`, and `text`.

    As many of one as of the other, or one for all.

    Raises:
        ValueError: numbers that do not fit, or none of either.
    """
    _check_any(images, texts)
    places = list(range(len(images)))
    units = list(zip(images, places, strict=True))
    if images_per_text == 2:
        halves = zip(images[::2], images[1::2], strict=False), zip(places[::2], places[1::2], strict=False)
        units = list(zip(*halves, strict=True))
    if len(images) % images_per_text or len({len(units), len(texts)} - {1}) > 1:
        raise ValueError(
            f"{len(images)} images and {len(texts)} texts do not fit; give "
            + ("two images" if images_per_text == 2 else "one image")
            + " for each text or for all texts, or one text"
        )
    rows = max(len(units), len(texts))
    units, texts = units * (rows // len(units)), list(texts) * (rows // len(texts))
    return [
        {"image": image, "place": place, "text": text}
        for (image, place), text in zip(units, texts, strict=True)
    ]


def _check_any(images: Sequence, texts: Sequence[str]):
    if isinstance(texts, str) or not len(images) or not len(texts):
        raise ValueError(
            f"images is {images!r} and texts {texts!r}; give lists of at least one image and one text"
        )


def _check_proposals(model: PreTrainedModel, images: Sequence, proposals: Sequence):
    if not isinstance(model, HeatmapHead):
        raise ValueError(f"proposals is given, but {type(model).__name__} predicts boxes; leave it out")
    if len(proposals) != len(images) or not all(len(boxes) for boxes in proposals):
        raise ValueError(
            f"proposals has {[len(boxes) for boxes in proposals]} boxes for {len(images)} images; give a "
            "list of at least one box x, y, w, h for each image"
        )


def _every_pair(found: list[Prediction]) -> list[Prediction]:
    """One for each image (`match_texts`) → one for each pair, with the image's place among the images."""
    ranks = _ranks(torch.tensor([[text["probability"] for text in one["texts"]] for one in found]), dim=0)
    return [
        {"image": one["image"]} | text | {"image_rank": rank}
        for one, row in zip(found, ranks.tolist(), strict=True)
        for text, rank in zip(one["texts"], row, strict=True)
    ]


def _ranks(scores: Tensor, dim: int) -> Tensor:
    """The place of each score along `dim`, 1 for the highest."""
    return scores.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim) + 1


def _judged(rows: Rows, logits: Tensor, labels: Sequence[str]) -> Iterator[Prediction]:
    for row, shares in zip(rows, logits.float().softmax(dim=1).tolist(), strict=True):
        probabilities = dict(zip(labels, shares, strict=True))
        label = max(probabilities, key=probabilities.get)
        yield _named(row) | {"label": label, "probabilities": probabilities}


def _named(row: Mapping[str, Any]) -> Prediction:
    """Which image and text a prediction is of."""
    key = "images" if isinstance(row["place"], tuple) else "image"
    return {key: row["place"], "text": row["text"]}
