"""Two-stage retrieval: a shortlist by contrastive similarity, re-ranked by matching. X-VLM section 4.

I: images, T: texts, L: text length, D: text width, S: image tokens, k: length of the shortlist. Each image's
keys and values are projected once, for a block of images at a time; an image's texts are scored side by side
and without padding, from the first self-attention on, which is done once per text.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .inference import batched, evaluating, number_of, to_model, visual_inputs, visual_of
from .metrics import retrieval_recall
from .pairs import read_images, read_texts, scores_pairs

UNSCORED = -100.0  # score of a pair outside the shortlist, as in the official code
VALUES_PER_CALL = {
    "cpu": 2**20,
    "gpu": 2**24,
}  # numbers in the text states of a call; few enough for a CPU's caches


@dataclass
class RetrievalResult:
    """Scores of both stages and their recall; tensors are float32 on the CPU.

    `itc_scores` (I, T) are cosines over all pairs. `image_to_text` (I, T) and `text_to_image` (T, I) are
    match logits of the shortlist of each image and of each text, -100 elsewhere. `text_image` (T,) is the
    image of each text. `itc_metrics` and `metrics` (re-ranked) are those of `retrieval_recall`.

    Of LXMERT and SOHO, which have no features to compare, `itc_scores` and `itc_metrics` are None, and
    the others hold the log-odds of a match of all pairs.
    """

    itc_scores: Tensor | None
    image_to_text: Tensor
    text_to_image: Tensor
    text_image: Tensor
    itc_metrics: dict[str, float] | None
    metrics: dict[str, float]


def evaluate_retrieval(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[dict],
    top_k: int = 128,
    batch_size: int = 32,
    progress: bool = False,
) -> RetrievalResult:
    """Score images against texts in two stages; rows hold `image` (or LXMERT's `regions`) and `caption`, the
    list of its texts.

    `top_k` texts per image and images per text are re-ranked (official: 256 on COCO, 128 on Flickr30K), all
    where there are fewer. `batch_size` images are encoded, or held with keys and values, at a time. LXMERT
    and SOHO score all pairs, whatever `top_k`.

    Raises:
        ValueError: no rows, an image without captions, a caption that is not in a list, `top_k` or
        `batch_size` below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; use a length of the shortlist of at least 1")
    if scores_pairs(model):
        return _by_matching_all(model, processor, rows, batch_size, progress)
    with evaluating(model):
        images, image_features, captions = _encode_images(model, processor, rows, batch_size, progress)
        texts, text_features = _encode_texts(
            model, processor, [text for texts in captions for text in texts], batch_size, progress
        )
        itc_scores = image_features.float() @ text_features.float().T  # (I, T)
        for_image, for_text = shortlists(itc_scores, top_k)
        scores = rerank(model, images, texts, for_image | for_text, batch_size, progress)
    itc_scores = itc_scores.cpu().clone()
    image_to_text = scores.where(for_image, UNSCORED).cpu()
    text_to_image = scores.where(for_text, UNSCORED).T.contiguous().cpu()
    text_image = _image_of_texts(captions)
    return RetrievalResult(
        itc_scores=itc_scores,
        image_to_text=image_to_text,
        text_to_image=text_to_image,
        text_image=text_image,
        itc_metrics=retrieval_recall(itc_scores, itc_scores.T, text_image),
        metrics=retrieval_recall(image_to_text, text_to_image, text_image),
    )


def _by_matching_all(model, processor, rows, batch_size: int, progress: bool) -> RetrievalResult:
    """Every pair scored, by a model that has no features to compare."""
    encoded, captions = [], []
    with evaluating(model):
        for texts, inputs in _image_inputs(model, processor, rows, batch_size, progress):
            captions += texts
            encoded.append(read_images(model, inputs))  # padded alike within a batch only
        tokens = to_model(processor(text=[text for texts in captions for text in texts]), model)
        mask = tokens["attention_mask"]
        batches = zip(*(value.split(batch_size) for value in tokens.values()), strict=True)
        words = torch.cat([read_texts(model, dict(zip(tokens, batch, strict=True))) for batch in batches])
        blocks = tqdm(encoded, desc="pairs", unit="block", disable=not progress)
        scores = torch.cat([model.score_pairs(words, mask, *block) for block in blocks])  # (I, T)
    scores, text_image = scores.cpu().clone(), _image_of_texts(captions)
    return RetrievalResult(
        itc_scores=None,
        image_to_text=scores,
        text_to_image=scores.T.contiguous(),
        text_image=text_image,
        itc_metrics=None,
        metrics=retrieval_recall(scores, scores.T, text_image),
    )


def _image_of_texts(captions: list[list[str]]) -> Tensor:
    return torch.tensor([i for i, texts in enumerate(captions) for _ in texts])


def shortlists(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` best texts of each image and images of each text, as two masks like `scores` (I, T)."""
    images, texts = scores.shape
    best_texts = scores.topk(min(top_k, texts), dim=1).indices
    best_images = scores.topk(min(top_k, images), dim=0).indices
    empty = torch.zeros_like(scores, dtype=torch.bool)
    return empty.scatter(1, best_texts, True), empty.scatter(0, best_images, True)


@dataclass
class ReadTexts:
    """Texts after `model.read_words`, one after the other without padding.

    `embeds` (sum of lengths, D), `starts` and `lengths` (T,).
    """

    embeds: Tensor
    starts: Tensor
    lengths: Tensor

    def calls(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """The texts of one image at index (n,), shortest first, cut into what one call to the model takes."""
        words = self.lengths[chosen].cumsum(0)
        values = VALUES_PER_CALL["cpu" if chosen.device.type == "cpu" else "gpu"]
        call = words.sub(1) // max(values // self.embeds.shape[1], 1)
        return chosen.split(call.unique_consecutive(return_counts=True)[1].tolist())

    def padded(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds (n, L, D) and attention mask (n, L) of the texts at index (n,), L being the longest."""
        lengths = self.lengths[texts, None]  # (n, 1)
        slots = torch.arange(int(lengths.max()), device=texts.device)
        mask = slots < lengths
        rows = self.starts[texts, None] + slots.minimum(lengths - 1)  # padding repeats the last piece, masked
        return self.embeds[rows], mask.long()


def _encode_images(
    model, processor, rows, batch_size: int, progress: bool
) -> tuple[Tensor, Tensor, list[list[str]]]:
    embeds, features, captions = [], [], []
    for texts, inputs in _image_inputs(model, processor, rows, batch_size, progress):
        captions += texts
        output = model.get_image_features(**inputs)
        embeds.append(output.last_hidden_state)
        features.append(output.pooler_output)
    return torch.cat(embeds), torch.cat(features), captions


def _image_inputs(
    model, processor, rows, batch_size: int, progress: bool
) -> Iterator[tuple[list[list[str]], dict[str, Tensor]]]:
    """Captions of images, and what the model reads of these, batch by batch."""
    seen = 0
    with tqdm(total=number_of(rows), desc="images", disable=not progress) as bar:
        for batch in batched(rows, batch_size):
            captions = [_captions(row, seen + i) for i, row in enumerate(batch)]
            inputs = visual_inputs(model, processor, [visual_of(row, processor) for row in batch]).repeated()
            yield captions, inputs
            seen += len(batch)
            bar.update(len(batch))
    if not seen:
        raise ValueError("rows is empty; give at least one row with `image` and `caption`")


def _captions(row: dict, index: int) -> list[str]:
    captions = row["caption"]
    if isinstance(captions, str) or not captions:
        raise ValueError(
            f"rows[{index}]['caption'] is {captions!r}; give one row per image with the list of its captions"
        )
    return captions


def _encode_texts(
    model, processor, texts: list[str], batch_size: int, progress: bool
) -> tuple[ReadTexts, Tensor]:
    tokens = to_model(processor(text=texts, return_tensors="pt"), model)
    lengths = tokens["attention_mask"].sum(dim=1)
    order = lengths.argsort(descending=True)
    embeds, features = [], []
    for batch in tqdm(order.split(8 * batch_size), desc="texts", disable=not progress):
        length = int(lengths[batch[0]])
        mask = tokens["attention_mask"][batch, :length]
        output = model.get_text_features(input_ids=tokens["input_ids"][batch, :length], attention_mask=mask)
        read = model.read_words(output.last_hidden_state, mask)
        embeds.append(read[mask.bool()])  # (B, L, D) -> (sum of lengths, D)
        features.append(output.pooler_output)
    sorted_lengths = lengths[order]
    starts = torch.empty_like(lengths)
    starts[order] = sorted_lengths.cumsum(0) - sorted_lengths
    return ReadTexts(torch.cat(embeds), starts, lengths), torch.cat(features)[order.argsort()]


def rerank(
    model: PreTrainedModel,
    images: Tensor,
    texts: ReadTexts,
    wanted: Tensor,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """Match logits (I, T), float32, of the pairs marked in `wanted` (I, T), -100 elsewhere.

    `images` are their embeds (I, S, W); keys and values of `batch_size` images are held at a time.
    """
    scores = torch.full(wanted.shape, UNSCORED, device=wanted.device)
    by_length = texts.lengths.argsort()
    with tqdm(total=int(wanted.sum()), desc="pairs", unit="pair", disable=not progress) as bar:
        for block in torch.arange(len(images), device=wanted.device).split(batch_size):
            key_values = model.project_image(images[block])
            for i, image in enumerate(block):
                of_image = [(keys[i : i + 1], values[i : i + 1]) for keys, values in key_values]
                for chosen in texts.calls(by_length[wanted[image, by_length]]):
                    logits = model.match(*texts.padded(chosen), of_image, words_read=True)
                    scores[image, chosen] = logits[:, 1].float()
            bar.update(int(wanted[block].sum()))
    return scores
