"""Regions of ViT, DeiT and CLIP trunks, whose last layers attend within each region."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_SIZE, TRUNKS, region_batch, tiny_config
from transformers import CLIPVisionModel, DeiTConfig, DeiTModel, ViTModel

import hf_vlp
from hf_vlp.models.backbones import ImageTrunk, resize_trunk

DEPTH = 2  # local layers, of four
GRID = 4
PATCHES = GRID**2


def _config(name: str):
    """A trunk of four layers and 16 patches, "deit" with its distillation token."""
    if name == "deit":
        config = DeiTConfig(hidden_size=16, num_attention_heads=2, intermediate_size=32)
    else:
        config = TRUNKS[name]()
    config.update({"patch_size": IMAGE_SIZE // GRID, "image_size": IMAGE_SIZE, "num_hidden_layers": 4})
    return config


@pytest.fixture(scope="module", params=["vit", "deit", "clip"])
def trunk(request) -> ImageTrunk:
    torch.manual_seed(0)
    trunk = ImageTrunk(_config(request.param)).eval()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return trunk


def _images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def masked_reference(trunk: ImageTrunk, pixel_values, image_index, patch_mask):
    """The official rule, written out: copies of whole images in front of the images, and additive masks."""
    inner = trunk.trunk
    is_clip = isinstance(inner, CLIPVisionModel)
    states = inner.embeddings(pixel_values)
    states = inner.pre_layrnorm(states) if is_clip else states
    layers = inner.encoder.layers if is_clip else inner.layers
    for layer in layers[:-DEPTH]:
        states = layer(states, None)
    seen = torch.cat(
        [torch.ones(len(patch_mask), states.shape[1] - PATCHES, dtype=torch.bool), patch_mask], 1
    )
    seen = torch.cat([seen, torch.ones(len(states), states.shape[1], dtype=torch.bool)])
    states = torch.cat([states[image_index], states])
    for layer in layers[-DEPTH:]:
        states = layer(states, (~seen)[:, None, None] * -10000.0)
    states = (inner.post_layernorm if is_clip else inner.layernorm)(states)
    states = torch.cat([states[:, :1], states[:, -PATCHES:]], dim=1)
    return states[len(patch_mask) :], states[: len(patch_mask)]


def _whole(regions) -> torch.Tensor:
    return F.pad(regions, (1, 0), value=True)


def _assert_is_reference(trunk, images, index, patches):
    with torch.no_grad():
        whole, regions = trunk.encode_regions(images, index, patches, DEPTH)
        expected_whole, expected = masked_reference(trunk, images, index, patches)
    torch.testing.assert_close(whole, expected_whole, atol=1e-5, rtol=1e-5)
    assert regions.patch_mask is None and torch.equal(regions.mask.sum(1), patches.sum(1) + 1)
    torch.testing.assert_close(regions.tokens[regions.mask], expected[_whole(patches)], atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.booleans(), min_size=PATCHES, max_size=PATCHES).filter(any)),
        min_size=1,
        max_size=5,
    )
)
def test_packed_regions_equal_masked_ones(trunk, regions):
    index, patches = (torch.tensor(column) for column in zip(*regions, strict=True))
    _assert_is_reference(trunk, _images(), index, patches)


def test_many_regions_in_groups_of_like_size_equal_masked_ones(trunk):
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(40, 1, generator=generator)
    patches = torch.rand(40, PATCHES, generator=generator) < share
    _assert_is_reference(trunk, _images(), torch.arange(40) % 2, patches)


def test_the_image_is_that_of_the_plain_forward_and_so_is_a_region_of_all_patches(trunk):
    images, patches = _images(), torch.ones(3, PATCHES, dtype=torch.bool)
    patches[1, 3:] = False
    with torch.no_grad():
        whole, regions = trunk.encode_regions(images, torch.tensor([1, 0, 0]), patches, DEPTH)
        plain = trunk(images)
    torch.testing.assert_close(whole, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(regions.tokens[[0, 2]], plain[[1, 0]], atol=1e-6, rtol=1e-5)
    assert (regions.tokens[1, 0] - plain[0, 0]).abs().max() > 1e-3


def test_what_a_region_does_not_cover_reaches_it_only_before_the_local_layers(trunk):
    images, patches = _images(1).requires_grad_(), torch.zeros(1, PATCHES, dtype=torch.bool)
    patches[0, 0] = True
    for depth, reaches in ((DEPTH, True), (4, False)):
        _, regions = trunk.encode_regions(images, torch.tensor([0]), patches, depth)
        (gradient,) = torch.autograd.grad(regions.tokens[:, 0].sum(), images)
        outside = gradient[..., IMAGE_SIZE // GRID :, :]
        assert bool(outside.any()) is reaches


def test_no_regions(trunk):
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, PATCHES, dtype=torch.bool)
    whole, regions = trunk.encode_regions(_images(), *nothing, DEPTH)
    assert whole.shape == (2, 1 + PATCHES, 16) and len(regions.tokens) == len(regions.mask) == 0


# Trunks of transformers


@pytest.mark.parametrize(
    ("name", "model_class"), [("vit", ViTModel), ("deit", DeiTModel), ("clip", CLIPVisionModel)]
)
def test_trunks_are_those_of_transformers(name, model_class):
    model = model_class(_config(name)).eval()
    trunk = ImageTrunk(model.config).eval()
    trunk.trunk.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pooler")})
    with torch.no_grad():
        ours, theirs = trunk(_images()), model(_images())
    expected = theirs.last_hidden_state[:, -PATCHES:]
    if name == "clip":
        expected = model.post_layernorm(expected)
        torch.testing.assert_close(ours[:, 0], theirs.pooler_output)
    torch.testing.assert_close(ours[:, 1:], expected)


def test_clip_is_resampled_to_another_size(trunk):
    larger = resize_trunk(trunk, 2 * IMAGE_SIZE)
    images = F.interpolate(_images(), scale_factor=2)
    with torch.no_grad():
        ours = larger(images)
        theirs = trunk.trunk(images, interpolate_pos_encoding=True).last_hidden_state
        theirs = trunk.trunk.post_layernorm(theirs) if trunk.is_clip else theirs
    assert ours.shape == (2, 1 + 4 * PATCHES, 16)
    torch.testing.assert_close(ours[:, 1:], theirs[:, -4 * PATCHES :], atol=1e-5, rtol=1e-5)


# The models


def test_a_region_in_the_model():
    """Feature and fused text of a region are what its tokens alone give."""
    torch.manual_seed(0)
    model = hf_vlp.XVLMModel(tiny_config("clip")).eval()
    assert model.config.local_attn_depth == 2
    batch = region_batch()
    regions = {name: batch[name] for name in ("pixel_values", "region_image_index", "region_patch_mask")}
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features, output = model.get_region_features(**regions), model(**regions, **texts)
        torch.testing.assert_close(features.pooler_output, output.image_features)
        for r, (image, mask) in enumerate(
            zip(batch["region_image_index"], batch["region_patch_mask"], strict=True)
        ):
            states = features.last_hidden_state[r, _whole(mask)][None]
            text = {name: value[r : r + 1] for name, value in texts.items()}
            embeds = model.get_text_features(**text).last_hidden_state
            fused = model.fuse(embeds, text["attention_mask"], model.project_image(states))
            kept = text["attention_mask"].bool()
            torch.testing.assert_close(
                output.last_hidden_state[r : r + 1][kept], fused[kept], atol=1e-5, rtol=1e-5
            )
            whole = output.image_embeds[image, 1:][~mask]
            assert torch.equal(features.last_hidden_state[r, 1:][~mask], whole)


def test_depth_0_takes_means():
    model = hf_vlp.XVLMModel(tiny_config("vit", local_attn_depth=0)).eval()
    batch = region_batch()
    with torch.no_grad():
        features = model.get_region_features(
            batch["pixel_values"], batch["region_image_index"], batch["region_patch_mask"]
        ).last_hidden_state
        patches = model.vision_model(batch["pixel_values"])[:, 1:]
    torch.testing.assert_close(features[1, 0], patches[0, 1:3].mean(dim=0))
    torch.testing.assert_close(features[:, 1:], patches[batch["region_image_index"]])


@pytest.mark.parametrize("trunk", ["swin", "vit", "clip"])
def test_features_in_bf16(trunk):
    model, batch = hf_vlp.XVLMModel(tiny_config(trunk)).eval(), region_batch()
    arguments = [batch[name] for name in ("pixel_values", "region_image_index", "region_patch_mask")]
    with torch.no_grad():
        expected = model.get_region_features(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model.get_region_features(*arguments)
        whole = model.to(torch.bfloat16).get_region_features(arguments[0].bfloat16(), *arguments[1:])
    for ours in (autocast, whole):
        for name in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(ours[name].float(), expected[name], atol=0.06, rtol=0.06)


def test_depths():
    assert tiny_config("swin").local_attn_depth == tiny_config("timm").local_attn_depth == 0
    assert hf_vlp.XVLMConfig(vision_config=DeiTConfig()).local_attn_depth == 4
    for trunk, depth in (("vit", 3), ("vit", -1), ("swin", 1)):
        with pytest.raises(ValueError, match=f"local_attn_depth={depth}"):
            tiny_config(trunk, local_attn_depth=depth)


def test_masks_that_do_not_fit():
    model, batch = hf_vlp.XVLMModel(tiny_config("clip")), region_batch()
    with pytest.raises(ValueError, match="region_patch_mask"):
        model(batch["pixel_values"], region_image_index=batch["region_image_index"])
    with pytest.raises(ValueError, match="region_image_index"):
        model(
            batch["pixel_values"],
            region_image_index=batch["region_image_index"] + 1,
            region_patch_mask=batch["region_patch_mask"],
        )
