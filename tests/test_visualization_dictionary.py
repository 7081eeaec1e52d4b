"""SOHO's visual dictionary in pictures: patches of entries, entries of images, usage."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_fixtures import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutput

from hf_vlp.models.configuration_soho import SOHOConfig
from hf_vlp.models.image_processing_soho import SOHOImageProcessor
from hf_vlp.models.modeling_soho import SOHOModel
from hf_vlp.models.modeling_soho_pretraining import SOHOForPreTraining
from hf_vlp.models.processing_soho import SOHOProcessor
from hf_vlp.visualization import (
    collect_entries,
    draw_entry_map,
    draw_entry_patches,
    draw_usage,
    living_entries,
)
from hf_vlp.visualization.dictionary import GAP, LABEL, PATCH

COLORS = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20], [20, 250, 250]])
BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "layer_type": "basic",
}
GRID = [[0, 1, 1], [3, 0, 2]]
UPRIGHT = [[2], [2], [1], [4]]
TILE = 64


class Pixels:
    """A processor that only pads, to multiples of 32 and to the largest image."""

    def __call__(self, images, return_tensors="pt"):
        width, height = (-(-max(sides) // 32) * 32 for sides in np.array([one.size for one in images]).T)
        pixel_values = torch.zeros(len(images), 3, height, width)
        pixel_mask = torch.zeros(len(images), height, width, dtype=torch.bool)
        for i, one in enumerate(images):
            pixel_values[i, :, : one.height, : one.width] = torch.tensor(np.array(one)).permute(2, 0, 1) / 255
            pixel_mask[i, : one.height, : one.width] = True
        return BatchFeature({"pixel_values": pixel_values, "pixel_mask": pixel_mask})


class MeanColor(nn.Module):
    """A trunk that sees the mean colour of squares of 32 pixels."""

    def forward(self, pixel_values):
        return BaseModelOutput(last_hidden_state=F.avg_pool2d(pixel_values, 32))


class Widened(nn.Module):
    """A projection that keeps the colour, and fills up with zeros."""

    def forward(self, feature_map):
        return F.pad(F.max_pool2d(feature_map, 2).movedim(1, -1), (0, 5))


def tiny_model(head=SOHOModel, **fields):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    config = SOHOConfig(backbone_config=BACKBONE, vd_size=8, vocab_size=32, **sizes | fields)
    return head(config).eval()


def color_model(head=SOHOModel, **fields):
    """Entry i is colour i; those beyond the colours are far from all."""
    model = tiny_model(head, frozen_stages=-1, **fields)
    base = model.base_model
    base.backbone, base.visual_projection = MeanColor(), Widened()
    base.visual_dictionary.embeddings.fill_(9.0)
    base.visual_dictionary.embeddings[: len(COLORS)] = F.pad(COLORS / 255, (0, 5))
    return model


def tiles(grid, side: int = TILE) -> Image.Image:
    pixels = COLORS[torch.tensor(grid)].to(torch.uint8).repeat_interleave(side, 0).repeat_interleave(side, 1)
    return Image.fromarray(pixels.numpy())


def counted(*grids) -> list[int]:
    return sum(torch.tensor(grid).flatten().bincount(minlength=8) for grid in grids).tolist()


@pytest.mark.parametrize("head", [SOHOModel, SOHOForPreTraining])
def test_every_cell_has_the_entry_of_its_tile(head):
    found = collect_entries(color_model(head), Pixels(), [tiles(GRID), tiles(UPRIGHT)])
    assert [one.entries.tolist() for one in found.maps] == [GRID, UPRIGHT]
    assert [one.size for one in found.maps] == [(128, 192), (256, 64)]
    assert found.counts.tolist() == counted(GRID, UPRIGHT)
    assert found.most_used(3) == [1, 2, 0] and found.most_used(8) == [1, 2, 0, 3, 4]
    for entry, patches in found.patches.items():
        assert len(patches) == found.counts[entry]
        for patch in patches:
            assert patch.size == (64, 64)
            assert (np.asarray(patch) == COLORS[entry].numpy()).all()


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.integers(33, 200), st.integers(33, 200)), max_size=5))
def test_batches_and_their_padding_do_not_matter(sizes):
    model = color_model()
    images = [tiles([[0, 1, 2, 3], [1, 2, 3, 4]] * 2).crop((0, 0, *size)) for size in sizes]
    apart, together = (
        collect_entries(model, Pixels(), iter(images), patches=2, batch_size=size) for size in (1, 5)
    )
    assert [one.entries.tolist() for one in apart.maps] == [one.entries.tolist() for one in together.maps]
    assert [one.size[::-1] for one in together.maps] == sizes
    assert torch.equal(apart.counts, together.counts)
    assert together.counts.sum() == sum(one.entries.numel() for one in together.maps)
    assert {entry: len(kept) for entry, kept in together.patches.items()} == {
        entry: min(count, 2) for entry, count in enumerate(together.counts.tolist()) if count
    }


def test_patches_are_of_the_scaled_image():
    size = {"shortest_edge": 128, "longest_edge": 192}
    colors = SOHOImageProcessor(size=size, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    images = [tiles(GRID, side=32), tiles(GRID, side=90)]
    found = collect_entries(color_model(), SOHOProcessor(colors, tiny_tokenizer()), images)
    assert [one.entries.tolist() for one in found.maps] == [GRID, GRID]
    assert [one.size for one in found.maps] == [(128, 192), (128, 192)]
    for patch in found.patches[2]:
        assert (np.asarray(patch)[2:, 2:] == COLORS[2].numpy()).all()


def test_a_trunk_with_another_stride_has_other_cells():
    model = color_model()
    model.backbone.forward = lambda pixels: BaseModelOutput(last_hidden_state=F.avg_pool2d(pixels, 8))
    found = collect_entries(model, Pixels(), [tiles(GRID, side=16).crop((0, 0, 48, 31))])
    assert found.maps[0].cell == 16 and found.maps[0].entries[0].tolist() == GRID[0]
    assert {patch.size for patches in found.patches.values() for patch in patches} == {(16, 16)}


def test_every_cell_has_the_same_chance():
    """Five cells of one entry, told apart by their brightness."""
    model = color_model()
    model.visual_dictionary.embeddings.fill_(0.0)  # the first of equals
    images = [Image.fromarray(np.full((64, 64, 3), 40 * i, np.uint8)) for i in range(5)]
    draws = [
        collect_entries(model, Pixels(), images, patches=1, seed=seed).patches[0][0] for seed in range(200)
    ]
    counts = np.bincount([patch.getpixel((0, 0))[0] // 40 for patch in draws])
    assert len(counts) == 5 and counts.min() > 20 and counts.max() < 65


def test_patches_of_chosen_entries_only():
    found = collect_entries(color_model(), Pixels(), [tiles(GRID)], entries=[2, 7])
    assert list(found.patches) == [2] and found.counts.tolist() == counted(GRID)
    assert collect_entries(color_model(), Pixels(), [tiles(GRID)], patches=0).patches == {}


def test_rows_and_paths_are_images_too(tmp_path):
    tiles(UPRIGHT).save(tmp_path / "upright.png")
    images = [{"image": tiles(GRID), "caption": "tiles"}, tmp_path / "upright.png"]
    found = collect_entries(color_model(), Pixels(), images, batch_size=1)
    assert found.counts.tolist() == counted(GRID, UPRIGHT)


def test_the_model_stays_as_it_was():
    model = tiny_model(SOHOForPreTraining).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect_entries(model, Pixels(), [tiles(GRID)])
    assert found.maps[0].entries.shape == (2, 3) and found.counts.sum() == 6
    assert model.training and model.model.visual_dictionary.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_patches_are_drawn_in_the_row_of_their_entry():
    found = collect_entries(color_model(), Pixels(), [tiles(GRID), tiles(UPRIGHT)])
    sheet = draw_entry_patches(found, [4, 1, 6], columns=2)
    step = PATCH + GAP
    assert sheet.size == (LABEL + 2 * step, GAP + 3 * step)
    middle = [
        [LABEL + j * step + PATCH // 2, GAP + i * step + PATCH // 2] for i in range(3) for j in range(2)
    ]
    white = (255, 255, 255)
    four, one = (tuple(COLORS[entry].tolist()) for entry in (4, 1))
    assert [sheet.getpixel(tuple(place)) for place in middle] == [four, white, one, one, white, white]
    assert draw_entry_patches(found).height == GAP + 5 * step, "of the entries that have cells"


def test_map_has_one_colour_for_each_entry():
    grid = [*GRID, [0, 1, 2]]
    image = tiles(grid).crop((0, 0, 192, 160))  # half of the last row
    found = collect_entries(color_model(), Pixels(), [image]).maps[0]
    assert found.entries.shape == (2, 3), "what the trunk leaves over has no cell"
    drawn = draw_entry_map(image, found, opacity=1.0)
    corners = {
        (row, col): drawn.getpixel((col * 64 + 2, row * 64 + 2)) for row in range(2) for col in range(3)
    }
    assert drawn.size == image.size
    assert corners[0, 0] == corners[1, 1] and corners[0, 1] == corners[0, 2]
    assert len(set(corners.values())) == 4
    assert drawn.getpixel((2, 150)) == image.getpixel((2, 150)), "no cell, no colour"
    assert np.asarray(drawn)[20:44, 84:108].min(-1).max() > 200, "a white number in the middle of the cell"
    bare = np.asarray(draw_entry_map(image, found, opacity=0.0))
    assert (bare[2, 2] == COLORS[0].numpy()).all()


def test_living_entries_are_those_that_did_not_fade():
    model = tiny_model().train()
    assert living_entries(model).all(), "nothing has faded before training"
    cells = model.visual_dictionary.embeddings[[2, 5]].clone()[None]
    for _ in range(3):
        model.visual_dictionary(cells[:, :1])
    assert living_entries(model).nonzero().tolist() == [[2]]
    model.visual_dictionary.embeddings[5] = cells[0, 1]
    for _ in range(20):
        model.visual_dictionary(cells[:, 1:])
    assert living_entries(model).nonzero().tolist() == [[5]]
    assert model.visual_dictionary.embeddings[2].norm() < 0.5 * cells[0, 0].norm()


def test_usage_is_drawn():
    pytest.importorskip("matplotlib")
    model = color_model()
    with pytest.raises(ValueError, match="never trained"):
        draw_usage(model)
    images = draw_usage(model, torch.tensor([5, 3, 0, 1, 0, 0, 0, 0]))
    model.visual_dictionary.usage += torch.arange(8)
    training = draw_usage(model)
    both = draw_usage(model, torch.tensor([5, 3, 0, 1, 0, 0, 0, 0]))
    assert len({one.tobytes() for one in (images, training, both)}) == 3
    assert {one.mode for one in (images, training, both)} == {"RGB"}
    with pytest.raises(ValueError, match="8 entries"):
        draw_usage(model, torch.ones(3))


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf-vlp\[viz\]"):
        draw_usage(color_model(), torch.ones(8))


def test_what_does_not_fit_is_named():
    model, image = color_model(), tiles(GRID)
    with pytest.raises(ValueError, match="visual_fusion"):
        collect_entries(tiny_model(visual_fusion="none"), Pixels(), [image])
    with pytest.raises(ValueError, match="use 0 to 7"):
        collect_entries(model, Pixels(), [image], entries=[8])
    with pytest.raises(ValueError, match="patches is -1"):
        collect_entries(model, Pixels(), [image], patches=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        collect_entries(model, Pixels(), [image], batch_size=0)
    found = collect_entries(model, Pixels(), [image])
    with pytest.raises(ValueError, match="use 0 to 7"):
        draw_entry_patches(found, [-1])
    with pytest.raises(ValueError, match="at least one"):
        draw_entry_patches(found, [])
    with pytest.raises(ValueError, match="opacity is 2"):
        draw_entry_map(image, found.maps[0], opacity=2)
