"""Grad-CAM of every head, and its pictures."""

import numpy as np
import pytest
import torch
from data_fixtures import picture
from heads import ALBEF, XVLM, make_head
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from hf_vlp import (
    ALBEFForGrounding,
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    SOHOForRetrieval,
    SOHOForVisualReasoning,
    XVLMForGrounding,
    XVLMForRetrieval,
    XVLMForVisualReasoning,
    XVLMForWeakGrounding,
)
from hf_vlp.visualization import (
    WordHeatmaps,
    draw_heatmap,
    draw_sheet,
    draw_word_heatmaps,
    stack,
    word_heatmaps,
)
from hf_vlp.visualization.gradcam import LABEL, MARGIN, PANEL, _merge_pieces

IMAGES = [picture(0), picture(1)]
TEXTS = ["a red circle", "the blue square left of the green triangle"]
PAIRS = (ALBEFForVisualReasoning, XVLMForVisualReasoning)
WORDS = [["[CLS]", *text.split()] for text in TEXTS]


def images_for(head) -> list:
    return [IMAGES, IMAGES[::-1]] if head in PAIRS else IMAGES


@pytest.mark.parametrize("head", [*ALBEF, *XVLM])
def test_every_head_has_maps_of_every_word(head):
    model, processor = make_head(head)
    found = word_heatmaps(model.train(), processor, images_for(head), TEXTS)
    per_text = 2 if head in PAIRS else 1
    assert [one.words for one in found] == [words for words in WORDS for _ in range(per_text)]
    for one in found:
        assert one.maps.shape == (len(one.words), 2, 2) and one.sentence.shape == (2, 2)
        assert one.maps.isfinite().all() and (one.maps >= 0).all() and one.sentence.max() > 0
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("head", [ALBEFForGrounding, *PAIRS, XVLMForGrounding, XVLMForWeakGrounding])
def test_padding_and_batches_make_no_difference(head):
    model, processor = make_head(head)
    arguments = (model, processor, images_for(head), TEXTS)
    for one, other in zip(word_heatmaps(*arguments), word_heatmaps(*arguments, batch_size=1), strict=True):
        torch.testing.assert_close(one.maps, other.maps)
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize("head", [ALBEFForGrounding, XVLMForWeakGrounding])
def test_maps_are_those_that_the_head_points_with(head):
    model, processor = make_head(head)
    batch = dict(processor(images=IMAGES[:1], text=TEXTS[:1]))
    expected, logits = model.word_heatmaps(**batch)
    with torch.inference_mode():
        (found,) = word_heatmaps(model, processor, IMAGES[:1], TEXTS[:1])
    torch.testing.assert_close(found.maps, expected[0])
    torch.testing.assert_close(found.sentence, model(**batch).heatmap[0])
    assert found.score == pytest.approx(logits[0, 1].item(), abs=1e-5)


def test_scores_are_what_the_heads_decide_by():
    model, processor = make_head(ALBEFForQuestionAnswering)
    batch = processor(images=IMAGES) | processor.encode_questions(TEXTS)
    answers = ["left", "the blue square"]
    found = word_heatmaps(model, processor, IMAGES, TEXTS, targets=answers)
    with torch.no_grad():
        losses = model(**batch, **processor.encode_answers(answers)).answer_losses
    assert [one.score for one in found] == pytest.approx((-losses).tolist(), abs=1e-4)

    model, processor = make_head(ALBEFForVisualEntailment)
    with torch.no_grad():
        logits = model(**processor(images=IMAGES, text=TEXTS)).logits
    found = word_heatmaps(model, processor, IMAGES, TEXTS, targets=[0, 2])
    assert [one.score for one in found] == pytest.approx([logits[0, 0].item(), logits[1, 2].item()], abs=1e-5)
    found = word_heatmaps(model, processor, IMAGES, TEXTS)
    assert [one.score for one in found] == pytest.approx(logits.amax(dim=1).tolist(), abs=1e-5)

    model, processor = make_head(ALBEFForVisualReasoning)
    batch = processor(images=IMAGES, text=TEXTS[:1])
    with torch.no_grad():
        logits = model(**batch | {"pixel_values": batch["pixel_values"][None]}).logits
    left, right = word_heatmaps(model, processor, [IMAGES], TEXTS[:1], targets=[1])
    assert left.score == right.score == pytest.approx(logits[0, 1].item(), abs=1e-6)

    model, processor = make_head(XVLMForGrounding)
    with torch.no_grad():
        boxes = model(**processor(images=IMAGES, text=TEXTS)).pred_boxes
    found = word_heatmaps(model, processor, IMAGES, TEXTS)
    assert [one.score for one in found] == pytest.approx(
        (boxes.logit().square().sum(1) / 2).tolist(), abs=1e-4
    )


def test_each_image_of_a_pair_has_its_own_layer():
    """A cut of what the layers for the right image add leaves no gradient to them, only to the left."""
    model, processor = make_head(ALBEFForVisualReasoning)
    for layer in model.model.fusion_model.second_layer:
        nn.init.zeros_(layer.crossattention.output.dense.weight)
    left, right = word_heatmaps(model, processor, [IMAGES], TEXTS[:1])
    assert left.score == right.score and left.maps.max() > 0 and right.maps.max() == 0


def test_other_layers_can_be_looked_at():
    model, processor = make_head(XVLMForRetrieval)
    (last,) = word_heatmaps(model, processor, IMAGES[:1], TEXTS[:1], layer=1)
    assert last.maps[0].max() > 0 and last.maps[1:].max() == 0  # of the last states only [CLS] counts
    with pytest.raises(ValueError, match="layer is 2; use 0 to 1"):
        word_heatmaps(model, processor, IMAGES[:1], TEXTS[:1], layer=2)


def test_soho_looks_at_the_cells_of_its_image():
    model, processor = make_head(SOHOForRetrieval)
    images = [Image.new("RGB", (160, 80), "red"), IMAGES[1]]
    with torch.inference_mode():
        found = word_heatmaps(model, processor, images, TEXTS)
    batch = dict(processor(images=images, text=TEXTS, return_tensors="pt"))
    expected, logits = model.word_heatmaps(**batch)
    sizes = []
    for i, one in enumerate(found):
        height, width = (int(batch["pixel_mask"][i].any(dim=dim).sum()) for dim in (1, 0))
        down, right = (round(side / 64) for side in (height, width))
        sizes.append((down, right))
        assert one.words == WORDS[i][:1] + TEXTS[i].split() + ["[SEP]"]
        torch.testing.assert_close(one.maps, expected[i, : len(one.words), :down, :right])
        assert one.score == pytest.approx(logits[i, 1].item(), abs=1e-5)
    assert sizes[0] != sizes[1] and found[0].maps.max() > 0
    torch.testing.assert_close(model.heatmaps(**batch)[1], expected[1].sum(0) / len(found[1].words))
    (first,) = word_heatmaps(model, processor, images[1:], TEXTS[1:], layer=0)
    assert not torch.equal(first.maps, found[1].maps)
    with pytest.raises(ValueError, match="layer is 7; use 0 to"):
        word_heatmaps(model, processor, images, TEXTS, layer=7)
    with pytest.raises(ValueError, match="SOHOForVisualReasoning"):
        word_heatmaps(make_head(SOHOForVisualReasoning)[0], processor, IMAGES, TEXTS)


def test_what_does_not_fit_is_named():
    model, processor = make_head(ALBEFForPreTraining)
    with pytest.raises(ValueError, match="1 images, 2 texts and 2 targets"):
        word_heatmaps(model, processor, IMAGES[:1], TEXTS)
    with pytest.raises(ValueError, match="ALBEFForTextAssignment"):
        word_heatmaps(ALBEFForTextAssignment(model.config), processor, IMAGES, TEXTS)
    model, processor = make_head(ALBEFForVisualReasoning)
    with pytest.raises(ValueError, match="3 images for 1 texts"):
        word_heatmaps(model, processor, [[*IMAGES, IMAGES[0]]], TEXTS[:1])


def test_pieces_of_a_word_are_one_word():
    maps = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 2)
    words, merged = _merge_pieces(["[CLS]", "play", "##ing", "cat"], maps)
    assert words == ["[CLS]", "playing", "cat"]
    assert merged[:, 0, 0].tolist() == [0, 3, 3]


# Pictures


def brightness(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")).astype(float)


@given(row=st.integers(0, 2), column=st.integers(0, 3))
def test_the_hot_cell_is_the_brightest_place(row, column):
    heatmap = torch.zeros(3, 4)
    heatmap[row, column] = 5
    image = Image.new("RGB", (80, 60), "gray")
    drawn = brightness(draw_heatmap(image, heatmap))
    assert drawn.shape == (60, 80)
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (y // 20, x // 20) == (row, column)
    assert drawn.min() < brightness(image).min() and np.unique(brightness(image)).size == 1


def test_scale_makes_no_difference_and_no_heat_is_cold():
    heatmap = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert draw_heatmap(IMAGES[0], heatmap).tobytes() == draw_heatmap(IMAGES[0], 1e-6 * heatmap).tobytes()
    cold = draw_heatmap(IMAGES[0], torch.zeros(2, 2), opacity=1)
    assert len(cold.getcolors()) == 1
    assert draw_heatmap(IMAGES[0], heatmap, opacity=0).tobytes() == IMAGES[0].tobytes()


@pytest.mark.parametrize("heatmap", [torch.zeros(4), torch.full((2, 2), torch.nan)])
def test_bad_heat_maps_are_named(heatmap):
    with pytest.raises(ValueError, match="heatmap"):
        draw_heatmap(IMAGES[0], heatmap)
    with pytest.raises(ValueError, match="opacity"):
        draw_heatmap(IMAGES[0], torch.zeros(2, 2), opacity=2)


def test_a_sheet_has_a_panel_for_each_word():
    heatmaps = WordHeatmaps(["[CLS]", "a", "cat"], torch.rand(3, 2, 2), 1.0)
    image = Image.new("RGB", (40, 20), "red")
    sheet = draw_word_heatmaps(image, heatmaps, "a cat, and a title that is far too long for its line " * 9)
    cell = LABEL + PANEL // 2 + MARGIN
    assert sheet.size == (MARGIN + 4 * (PANEL + MARGIN), MARGIN + LABEL + 2 * cell)  # five panels
    assert sheet.getpixel((MARGIN + 9, MARGIN + 2 * LABEL + 9)) == (255, 0, 0)
    assert brightness(sheet)[:, -MARGIN:].min() == 255, "nothing may run over the edge"
    assert stack([sheet, sheet]).size == (sheet.width, 2 * sheet.height + MARGIN)


@pytest.mark.parametrize("call", [lambda: draw_sheet([]), lambda: stack([])])
def test_no_pictures_are_refused(call):
    with pytest.raises(ValueError, match="at least one"):
        call()
