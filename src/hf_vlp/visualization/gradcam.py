"""Where a head looks: Grad-CAM of its cross-attention, word by word, drawn over the image (ALBEF section 6).

R: texts, L: tokens, n: words of a text, g: patches along a side, B: images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from ..evaluation.inference import batched, evaluating, to_model
from ..images import load_image
from ..models.gradcam import gradcam
from ..models.image_text import MatchingHead
from ..models.image_text_answering import AnsweringHead
from ..models.image_text_sentences import EntailmentHead, ReasoningHead
from ..models.modeling_soho_tasks import SOHOForRetrieval
from ..models.modeling_xvlm import XVLMForGrounding
from .dictionary import on_images

# Cold to hot: dark purple over red to light yellow, ordered by brightness too
RAMP = np.array([(12, 7, 34), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
PANEL = 224  # pixels that the longer side of a panel's image has
MARGIN = 8  # pixels between panels
LABEL = 24  # pixels of the line above a panel


@dataclass
class WordHeatmaps:
    """What one text, or answer to it, looks at in one image: `maps` (n, g, g) of its `words`, [CLS] first,
    not negative, in SOHO's (n, h, w) of the cells on the image, and the `score` that they explain."""

    words: list[str]
    maps: Tensor
    score: float

    @property
    def sentence(self) -> Tensor:
        """The mean over all words (g, g)."""
        return self.maps.mean(dim=0)


def word_heatmaps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence,
    texts: Sequence[str],
    targets: Sequence | None = None,
    layer: int | None = None,
    batch_size: int = 16,
) -> list[WordHeatmaps]:
    """Grad-CAM of each text's cross-attention to its image, by what the head decides:

    | head | score |
    |---|---|
    | pre-training, retrieval, grounding by heat maps | logit of a match |
    | X-VLM's grounding by boxes, which has no confidence | half the squared length of the box's four logits: what draws the box away from the middle one (0.5, 0.5, 0.5, 0.5), which logits of 0 mean |
    | visual entailment, reasoning | logit of the class in `targets`, without it of the predicted one |
    | question answering | log-probability of the answer in `targets`, without it of the one the model writes |

    Args:
        images: one PIL image or path for each text; for reasoning a list of two.
        texts: R texts.
        targets: a class (int) or an answer (str) for each text, where the head has a choice.
        layer: fusion layer to look at, from 0; the config's `gradcam_layer` without it, in SOHO the last of
            the transformer.
        batch_size: texts at a time.

    Returns:
        One for each text; for reasoning two, of the left image and of the right one.

    Raises:
        ValueError: a head without such a score, images or targets that do not fit the texts, or no such
            layer.
    """  # noqa: E501
    if not isinstance(model, HEADS):
        raise ValueError(
            f"model is {type(model).__name__}; give one of {', '.join(head.__name__ for head in HEADS)}"
        )
    targets = [None] * len(texts) if targets is None else targets
    if isinstance(texts, str) or not len(images) == len(texts) == len(targets):
        raise ValueError(
            f"{len(images)} images, {len(texts)} texts and {len(targets)} targets: give one of each per text"
        )
    layers = _layers(model, layer)
    found = []
    with evaluating(model):
        for rows in batched(zip(images, texts, targets, strict=True), batch_size):
            inputs = to_model(_inputs(model, processor, *zip(*rows, strict=True)), model)
            per_image = [_token_maps(model, one, inputs) for one in layers]
            for r, ids in enumerate(inputs["input_ids"]):
                tokens = processor.tokenizer.convert_ids_to_tokens(ids[inputs["attention_mask"][r].bool()])
                for maps, scores in per_image:
                    found.append(WordHeatmaps(*_merge_pieces(tokens, maps[r]), scores[r].item()))
    return found


def draw_heatmap(image: Image.Image, heatmap: Tensor, opacity: float = 0.6) -> Image.Image:
    """A copy of `image` under its heat map (g, g'): cold parts get dark, the hottest light yellow.

    Raises:
        ValueError: a map that is not two-dimensional or finite, or an opacity outside 0..1.
    """
    heat = torch.as_tensor(heatmap).detach().float().cpu()
    if heat.ndim != 2 or not heat.isfinite().all():
        raise ValueError(f"heatmap is {tuple(heat.shape)}; give two dimensions of finite numbers")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}; use 0 to 1")
    heat = heat.clamp(min=0)
    heat = (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)).numpy()
    pixels = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(RAMP))
    colors = np.stack([np.interp(pixels, stops, channel) for channel in RAMP.T], axis=-1)
    return Image.blend(image.convert("RGB"), Image.fromarray(colors.round().astype(np.uint8)), opacity)


def draw_word_heatmaps(image: Image.Image, heatmaps: WordHeatmaps, title: str) -> Image.Image:
    """A sheet with the image, the map of the whole text, and one for each word, each in its own scale."""
    image = _scaled(image)  # first, so that the heat of a small image is smooth
    words = zip(heatmaps.words, heatmaps.maps, strict=True)
    panels = [
        ("image", image),
        ("all words", draw_heatmap(image, heatmaps.sentence)),
        *((word, draw_heatmap(image, heatmap)) for word, heatmap in words),
    ]
    return draw_sheet(panels, title)


def draw_sheet(panels: Sequence[tuple[str, Image.Image]], title: str = "", columns: int = 4) -> Image.Image:
    """Labelled images side by side, `columns` in a row, on white; each is scaled to a panel.

    Raises:
        ValueError: no panels, or no columns.
    """
    if not panels or columns < 1:
        raise ValueError(f"{len(panels)} panels in {columns} columns; give at least one of each")
    font = ImageFont.load_default(size=14)
    columns = min(columns, len(panels))
    pictures = [_scaled(image) for _, image in panels]
    header = MARGIN + (LABEL if title else 0)
    cell = LABEL + max(picture.height for picture in pictures) + MARGIN
    width, height = MARGIN + columns * (PANEL + MARGIN), header + -(-len(panels) // columns) * cell
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, left: int, top: int, room: int):
        draw.text((left, top + LABEL // 2), _shortened(text, font, room), "black", font, anchor="lm")

    write(title, MARGIN, MARGIN, width - 2 * MARGIN)
    for i, ((label, _), picture) in enumerate(zip(panels, pictures, strict=True)):
        row, column = divmod(i, columns)
        left, top = MARGIN + column * (PANEL + MARGIN), header + row * cell
        write(label, left, top, PANEL)
        sheet.paste(picture, (left, top + LABEL))
    return sheet


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below one another, on white.

    Raises:
        ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("pictures is empty; give at least one")
    height = sum(picture.height + MARGIN for picture in pictures) - MARGIN
    page = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height + MARGIN
    return page


# Scores

HEADS = (
    MatchingHead,
    XVLMForGrounding,
    EntailmentHead,
    ReasoningHead,
    AnsweringHead,
    SOHOForRetrieval,
)


def _layers(model: PreTrainedModel, layer: int | None) -> list[torch.nn.Module]:
    """The layer at this height; where texts read two images, one for each."""
    base = model.model
    if isinstance(model, SOHOForRetrieval):
        stacks, usual = [base.layer], len(base.layer) - 1
    else:
        fusion, usual = base.fusion_model, model.config.gradcam_layer
        stacks = [fusion.layer] if fusion.second_layer is None else [fusion.layer, fusion.second_layer]
    layer = usual if layer is None else layer
    if not 0 <= layer < len(stacks[0]):
        raise ValueError(f"layer is {layer}; use 0 to {len(stacks[0]) - 1}")
    return [one[layer] for one in stacks]


def _inputs(model, processor, images: Sequence, texts: Sequence[str], targets: Sequence) -> dict[str, Any]:
    """What `_scores` reads: pixel_values (R, 3, H, W) or (R, 2, 3, H, W), texts (R, L), targets."""
    is_pair = isinstance(model, ReasoningHead)
    pictures = [load_image(image) for one in images for image in (one if is_pair else [one])]
    batch = dict(processor(images=pictures, return_tensors="pt"))
    if is_pair:
        if len(pictures) != 2 * len(texts):
            raise ValueError(f"{len(pictures)} images for {len(texts)} texts; give a list of two for each")
        batch["pixel_values"] = batch["pixel_values"].unflatten(0, (-1, 2))
    if isinstance(model, AnsweringHead):
        batch |= processor.encode_questions(texts)
        if targets[0] is None:
            targets = processor.decode_answers(model.generate(**to_model(batch, model)))
        nothing = processor.tokenizer.unk_token  # what a model writes that ends at once
        return batch | processor.encode_answers([target or nothing for target in targets])
    batch |= processor(text=list(texts), return_tensors="pt")
    if targets[0] is not None:
        batch["labels"] = torch.tensor(targets)
    return batch


def _token_maps(
    model: PreTrainedModel, layer: torch.nn.Module, inputs: dict[str, Tensor]
) -> tuple[Sequence[Tensor], Tensor]:
    """Maps of one layer, R times (L, g, g), or of SOHO's cells (L, h, w), and the scores (R,)."""
    if isinstance(model, SOHOForRetrieval):
        maps, logits = model.word_heatmaps(**inputs, layer=layer)
        cells = on_images(maps.float().cpu(), inputs["pixel_mask"])
        return [of_image for of_image, _, _ in cells], logits[:, 1].float().cpu()

    def score() -> Tensor:
        return _scores(model, **{name: value.clone() for name, value in inputs.items()})

    maps, scores = gradcam(model, layer.crossattention.self, model.config.text_config, score)
    maps = maps[..., 1:].mean(dim=1)  # (R, H, L, 1 + N) -> (R, L, N), without the global token
    grid = math.isqrt(maps.shape[-1])
    return maps.unflatten(-1, (grid, grid)).float().cpu(), scores.float().cpu()


def _scores(
    model: PreTrainedModel,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None = None,
    answer_input_ids: Tensor | None = None,
    answer_attention_mask: Tensor | None = None,
) -> Tensor:
    """What the head decides by (R,); see `word_heatmaps`."""
    base = model.model
    key_values = base.project_image(base.vision_model(pixel_values.flatten(0, -4)))
    if base.fusion_model.second_layer is not None:  # left and right images in turn
        key_values = [(keys[side::2], values[side::2]) for keys, values in key_values for side in (0, 1)]
    fused = base.fuse(base.text_model(input_ids, attention_mask), attention_mask, key_values)  # (R, L, D)
    if isinstance(model, AnsweringHead):
        context = model.decoder.read_context(fused, attention_mask)
        logits = model.decoder.lm_head(model.decoder.decode(answer_input_ids[:, :-1], context))
        of_words = logits.float().log_softmax(dim=-1).gather(2, answer_input_ids[:, 1:, None])[..., 0]
        return (of_words * answer_attention_mask[:, 1:]).sum(dim=1)
    if isinstance(model, XVLMForGrounding):
        return model.bbox_head(fused[:, 0]).square().sum(dim=1) / 2
    if isinstance(model, MatchingHead):
        return model.itm_head(fused[:, 0])[:, 1]
    logits = model.cls_head(fused[:, 0])
    labels = logits.argmax(dim=1) if labels is None else labels
    return logits.gather(1, labels[:, None])[:, 0]


def _merge_pieces(tokens: Sequence[str], maps: Tensor) -> tuple[list[str], Tensor]:
    """Words, and the sum of the maps (L, g, g) of the pieces of each: (n, g, g)."""
    words, word_of_token = [], []
    for token in tokens:
        if token.startswith("##") and words:
            words[-1] += token[2:]
        else:
            words.append(token)
        word_of_token.append(len(words) - 1)
    merged = maps.new_zeros(len(words), *maps.shape[1:])
    return words, merged.index_add(0, torch.tensor(word_of_token), maps[: len(tokens)])


# Layout


def _scaled(image: Image.Image) -> Image.Image:
    share = PANEL / max(image.size)
    size = tuple(max(1, round(side * share)) for side in image.size)
    resampling = Image.Resampling.NEAREST if share > 3 else Image.Resampling.BICUBIC
    return image.convert("RGB").resize(size, resampling)


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """As much of a text as `room` pixels hold."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"
