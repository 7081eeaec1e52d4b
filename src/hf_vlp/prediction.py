"""Predictions for images and texts, one call per task, batched; every prediction is a dict.

    model = load_head("grounding", "my_model")
    predict("grounding", model, processor, ["photo.jpg"], ["the dog", "the man with a hat"])

Images are PIL images or paths, for LXMERT also their regions, the dict that `stack_regions` takes.
Predictions name the image by its place in `images`; those of heat maps hold a tensor, all else is what JSON
holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .evaluation.captioning import write_captions
from .evaluation.classification import pair_inputs
from .evaluation.inference import batched, evaluating, to_model, visual_inputs
from .evaluation.pairs import read_images, read_texts, scores_pairs
from .evaluation.question_answering import answer_candidates, answer_classes
from .models.image_text import MatchingHead
from .models.image_text_answering import AnsweringHead
from .models.image_text_heatmaps import HeatmapHead
from .models.image_text_sentences import EntailmentHead, ReasoningHead
from .models.modeling_lxmert_tasks import (
    LXMERTForGrounding,
    LXMERTForQuestionAnswering,
    LXMERTForRetrieval,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
)
from .models.modeling_soho_tasks import (
    SOHOForGrounding,
    SOHOForQuestionAnswering,
    SOHOForRetrieval,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
)
from .models.modeling_xvlm import XVLMForGrounding
from .models.modeling_xvlm_captioning import XVLMForCaptioning

Prediction = dict[str, Any]
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

    One text for several images, or pairs of images, is said of each of them. `options` are those of the
    function.

    Raises:
        ValueError: no such task, a model with another head, or images and texts that do not fit.
    """
    if task not in PREDICTORS:
        raise ValueError(f"task is {task!r}; the tasks are {', '.join(PREDICTORS)}")
    function, heads = PREDICTORS[task]
    if not isinstance(model, heads):
        raise ValueError(
            f"model is {type(model).__name__}, which does not do {task}; load it with load_head({task!r}, "
            "...)"
        )
    return function(model, processor, images, texts, **options)


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str],
    answers: Sequence[str] | None = None,
    top_k: int = 5,
    batch_size: int = 32,
) -> list[Prediction]:
    """The `top_k` best of the list `answers` to each question with their probabilities, best first; without a
    list the one answer that ALBEF or X-VLM writes, or the best of LXMERT's or SOHO's own `config.answers`.

    Returns:
        Of each question `image`, `text`, and `answers`: dicts of `answer` and, from a list, `probability`,
        among those that were ranked, or of LXMERT and SOHO each answer's own.

    Raises:
        ValueError: images and texts that do not fit, an empty list, or one that is not the head's own,
            `top_k` or `batch_size` below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; use a number of answers of at least 1")
    rows, found = pair(images, texts), []
    with evaluating(model):
        writes = answers is None and answer_classes(model) is None
        if not writes:
            answers, candidates = answer_candidates(model, processor, answers)
        for batch in batched(rows, batch_size):
            visual = visual_inputs(model, processor, [row["image"] for row in batch])
            questions = to_model(processor.encode_questions([row["text"] for row in batch]), model)
            inputs = {**visual.inputs, **questions, "image_index": visual.index}
            if writes:
                written = processor.decode_answers(model.generate(**inputs))
                found += [[{"answer": answer}] for answer in written]
                continue
            ranked = model.rank_answers(**inputs, **candidates, top_k=min(RANKED, len(answers)))
            for best in zip(ranked.indices.tolist(), ranked.probabilities.tolist(), strict=True):
                best = list(zip(*best, strict=True))[:top_k]
                found.append([{"answer": answers[i], "probability": p} for i, p in best])
    return [_named(row) | {"answers": answer} for row, answer in zip(rows, found, strict=True)]


def match_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str],
    batch_size: int = 32,
) -> list[Prediction]:
    """Compare every image with every text by their features (ITC), and match them (ITM).

    Returns:
        Of each pair, image by image, `image`, `text`, `cosine` of the features (not of LXMERT and SOHO, which
        have none), `probability` of a match, and by that probability `text_rank`, the text's place among all
        texts of the image, and `image_rank`, the image's among all images of the text; 1 is the best.

    Raises:
        ValueError: no images or no texts, or `batch_size` below 1.
    """
    _check_any(images, texts)
    score = _match_all if scores_pairs(model) else _compare_and_match
    with evaluating(model):
        tokens = to_model(processor(text=list(texts), return_tensors="pt"), model)
        values = score(model, processor, images, tokens, batch_size)
    probabilities = values["probability"]
    values |= {"text_rank": _ranks(probabilities, dim=1), "image_rank": _ranks(probabilities, dim=0)}
    columns = [value.flatten().tolist() for value in values.values()]
    pairs = [{"image": i, "text": text} for i in range(len(images)) for text in texts]
    return [
        row | dict(zip(values, numbers, strict=True))
        for row, numbers in zip(pairs, zip(*columns, strict=True), strict=True)
    ]


def _compare_and_match(
    model, processor, images: Sequence, tokens: dict, batch_size: int
) -> dict[str, Tensor]:
    """Cosine and probability of a match (I, T)."""
    mask, words = tokens["attention_mask"], model.get_text_features(**tokens)
    read = model.read_words(words.last_hidden_state, mask)
    cosines, probabilities = [], []
    for batch in batched(images, batch_size):
        output = model.get_image_features(**visual_inputs(model, processor, batch).repeated())
        cosines.append(output.pooler_output @ words.pooler_output.T)
        for embeds in output.last_hidden_state.split(1):
            key_values = model.project_image(embeds)
            pieces = zip(read.split(batch_size), mask.split(batch_size), strict=True)
            logits = [model.match(*piece, key_values, words_read=True) for piece in pieces]
            probabilities.append(torch.cat(logits).float().softmax(dim=1)[:, 1])
    return {"cosine": torch.cat(cosines).float(), "probability": torch.stack(probabilities)}


def _match_all(model, processor, images: Sequence, tokens: dict, batch_size: int) -> dict[str, Tensor]:
    """Probability of a match (I, T), by a model that has no features to compare."""
    mask, words = tokens["attention_mask"], read_texts(model, tokens)
    probabilities = []
    for batch in batched(images, batch_size):
        visual = visual_inputs(model, processor, batch)
        seen = read_images(model, visual.inputs)
        found = model.score_pairs(words, mask, *seen, pairs_per_call=batch_size)
        probabilities.append(found[visual.index].sigmoid())
    return {"probability": torch.cat(probabilities)}


def locate_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str],
    proposals: Sequence[Sequence[Sequence[float]]] | None = None,
    batch_size: int = 32,
) -> list[Prediction]:
    """The box of what each text refers to: predicted, or around the hot half of a heat map, or, with
    `proposals` for each image (boxes x, y, w, h in pixels), the one of them with the most heat.

    Returns:
        Of each text `image`, `text`, and `box`, x1, y1, x2, y2 in pixels; from heads with a heat map also
        `probability` of a match and `heatmap`, a tensor (grid, grid) with 1 where it is hottest; from LXMERT
        `region`, the place among the image's regions of the one whose box this is, refined, and `score`, its
        probability among them.

    Raises:
        ValueError: images and texts that do not fit, proposals for another number of images, none for an
            image, or for a head without a heat map, or `batch_size` below 1.
    """
    rows, found = pair(images, texts), []
    if proposals is not None:
        _check_proposals(model, images, proposals)
    with evaluating(model):
        for batch in batched(rows, batch_size):
            visual = visual_inputs(model, processor, [row["image"] for row in batch])
            words = to_model(processor(text=[row["text"] for row in batch], return_tensors="pt"), model)
            output = model(**visual.inputs, **words, region_image_index=visual.index)
            boxes = processor.post_process_boxes(output.pred_boxes, visual.sizes).tolist()
            if proposals is not None:
                candidates = [proposals[row["place"]] for row in batch]
                scores = processor.rank_proposals(output.heatmap, candidates, visual.sizes)
                chosen = [boxes[int(heat.argmax())] for boxes, heat in zip(candidates, scores, strict=True)]
                boxes = [[x, y, x + w, y + h] for x, y, w, h in chosen]
            found += [{"box": box} for box in boxes]
            if isinstance(model, LXMERTForGrounding):
                best = output.region_logits.float().softmax(dim=1).max(dim=1)
                chosen = zip(found[-len(batch) :], best.indices.tolist(), best.values.tolist(), strict=True)
                for prediction, region, score in chosen:
                    prediction |= {"region": region, "score": score}
            if output.heatmap is not None:
                matches = output.itm_logits.float().softmax(dim=1)[:, 1].tolist()
                heat = output.heatmap.float().cpu()
                heatmaps = heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
                for prediction, match, heat in zip(found[-len(batch) :], matches, heatmaps, strict=True):
                    prediction |= {"probability": match, "heatmap": heat}
    return [_named(row) | prediction for row, prediction in zip(rows, found, strict=True)]


def judge_entailment(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str],
    batch_size: int = 32,
) -> list[Prediction]:
    """Does an image entail a sentence, by the classes of `config.id2label`.

    Returns:
        Of each sentence `image`, `text`, `label`, and `probabilities` by label.

    Raises:
        ValueError: images and texts that do not fit, or `batch_size` below 1.
    """
    rows, logits = pair(images, texts), []
    with evaluating(model):
        for batch in batched(rows, batch_size):
            visual = visual_inputs(model, processor, [row["image"] for row in batch])
            sentences = to_model(processor(text=[row["text"] for row in batch]), model)
            logits.append(model(**visual.inputs, **sentences, image_index=visual.index).logits)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return _judged(rows, torch.cat(logits), labels)


def judge_pairs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str],
    batch_size: int = 32,
) -> list[Prediction]:
    """Is a sentence true of two images: `images` holds the left and the right one of each pair in turn.

    Returns:
        Of each sentence `images`, `text`, `label` ("true" or "false"), and `probabilities` by label.

    Raises:
        ValueError: images and texts that do not fit, or `batch_size` below 1.
    """
    rows, logits = pair(images, texts, images_per_text=2), []
    with evaluating(model):
        for batch in batched(rows, batch_size):
            pairs, sentences = [row["image"] for row in batch], [row["text"] for row in batch]
            logits.append(model(**pair_inputs(model, processor, pairs, sentences)).logits)
    return _judged(rows, torch.cat(logits), ["false", "true"])


def describe_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str] = (),
    num_beams: int = 3,
    max_length: int = 20,
    min_length: int = 5,
    batch_size: int = 32,
) -> list[Prediction]:
    """Write a caption of each image, by the settings and the rule of X-VLM's code; `texts` may hold a prompt
    in place of the processor's own.

    Returns:
        Of each image `image` and `caption`, without the prompt.

    Raises:
        ValueError: no images, several prompts, or `num_beams` or `batch_size` below 1.
    """
    if not len(images) or isinstance(texts, str) or len(texts) > 1:
        raise ValueError(
            f"images is {images!r} and texts {texts!r}; give at least one image, and no text but one prompt "
            "for all"
        )
    prompt, captions = (texts[0] if len(texts) else None), []
    with evaluating(model):
        for batch in batched(images, batch_size):
            captions += write_captions(model, processor, batch, num_beams, max_length, min_length, prompt)
    return [{"image": place, "caption": caption} for place, caption in enumerate(captions)]


PREDICTORS: dict[str, tuple[Callable[..., list[Prediction]], tuple[type, ...]]] = {
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
}


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


def _ranks(scores: Tensor, dim: int) -> Tensor:
    """The place of each score along `dim`, 1 for the highest."""
    return scores.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim) + 1


def _judged(rows: list[dict], logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
    found = []
    for row, shares in zip(rows, logits.float().softmax(dim=1).tolist(), strict=True):
        probabilities = dict(zip(labels, shares, strict=True))
        label = max(probabilities, key=probabilities.get)
        found.append(_named(row) | {"label": label, "probabilities": probabilities})
    return found


def _named(row: dict) -> Prediction:
    """Which image and text a prediction is of."""
    key = "images" if isinstance(row["place"], tuple) else "image"
    return {key: row["place"], "text": row["text"]}
