"""The bottom-up-attention detector: every step of the way against the same written out, and the whole."""

import base64
import math

import butd_reference as reference
import numpy as np
import pytest
import torch
from butd_reference import tiny_butd, tiny_butd_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, roi_pool
from transformers import AutoImageProcessor, AutoModel

from hf_vlp.models.configuration_butd import BUTDConfig
from hf_vlp.models.image_processing_butd import BUTDImageProcessor, image_scale, resize
from hf_vlp.models.modeling_butd import BUTDDetector
from hf_vlp.models.proposals import (
    apply_deltas,
    best_surviving_scores,
    choose_regions,
    clip,
    make_anchors,
    suppress,
    tile_anchors,
)

SEEDS = st.integers(0, 2**31 - 1)


def _noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def _boxes(count: int, generator: torch.Generator, side: int = 40) -> torch.Tensor:
    """Whole numbers, so that there are equal boxes and equal overlaps."""
    corners = torch.randint(side, (count, 2), generator=generator)
    return torch.cat([corners, corners + torch.randint(side, (count, 2), generator=generator)], 1).float()


def test_anchors():
    anchors = make_anchors(16, (0.5, 1, 2), (4, 8, 16, 32))
    squares = [[-24, -24, 39, 39], [-56, -56, 71, 71], [-120, -120, 135, 135], [-248, -248, 263, 263]]
    assert anchors[4:8].tolist() == squares
    assert anchors[[1, 2, 3]].tolist() == [[-84, -40, 99, 55], [-176, -88, 191, 103], [-360, -184, 375, 199]]
    assert anchors[[9, 10, 11]].tolist() == [[-36, -80, 51, 95], [-80, -168, 95, 183], [-168, -344, 183, 359]]
    tiled = tile_anchors(anchors, 3, 5, 16)
    assert tiled.shape == (3 * 5 * 12, 4)
    assert torch.equal(tiled[(1 * 5 + 4) * 12 :][:12], anchors + torch.tensor([64, 16, 64, 16]))


def test_deltas_count_the_last_pixel():
    boxes = torch.tensor([[0.0, 0, 15, 7], [-24, -24, 39, 39]])
    assert apply_deltas(boxes, torch.zeros(2, 4)).tolist() == [[0, 0, 16, 8], [-24, -24, 40, 40]]
    moved = apply_deltas(boxes[:1], torch.tensor([[0.5, -0.25, math.log(2), 0]]))
    torch.testing.assert_close(moved, torch.tensor([[0.0, -2, 32, 6]]))
    assert clip(torch.tensor([[-3.0, 2, 200, 99.5]]), 100, 150).tolist() == [[0, 2, 149, 99]]


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 30), st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.7]))
def test_suppression(seed, count, threshold):
    generator = torch.Generator().manual_seed(seed)
    boxes = _boxes(count, generator)
    scores = torch.randint(6, (count, 7), generator=generator) / 6  # many are equal
    if threshold in (0.3, 0.7):  # no overlap is equal to these
        assert suppress(boxes, scores[:, 0], threshold).tolist() == reference.suppressed(
            boxes, scores[:, 0], threshold
        )
    best = best_surviving_scores(boxes, scores, threshold)
    assert best.tolist() == reference.surviving_scores(boxes, scores, threshold)


def test_suppression_counts_the_last_pixel():
    boxes = torch.tensor([[0.0, 0, 9, 0], [7, 0, 16, 0]])  # 3 of 17 pixels, but 2 of 16 of their lengths
    scores = torch.tensor([0.5, 0.4])
    assert suppress(boxes, scores, 0.17).tolist() == [0]
    assert best_surviving_scores(boxes, scores[:, None], 0.17).tolist() == [0.5, 0]
    assert suppress(boxes, scores, 0.18).tolist() == [0, 1]


def test_a_class_suppresses_for_itself():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 60, 60]])
    scores = torch.tensor([[0.7, 0.1], [0.2, 0.3], [0.0, 0.05]])
    assert best_surviving_scores(boxes, scores, 0.3).tolist() == pytest.approx([0.7, 0.3, 0.05])


def test_choice():
    scores = torch.tensor([0.1, 0.5, 0.3, 0.5, 0.2])
    assert choose_regions(scores, 2, 0.2).tolist() == [1, 3]  # of four
    assert choose_regions(scores, 4, 0.2).tolist() == [1, 2, 3, 4]  # exactly four, in their order
    assert choose_regions(scores, 4, 0.25).tolist() == [1, 3, 2, 4]  # of three
    assert choose_regions(scores, 9, 0.2).tolist() == [1, 3, 2, 4, 0]
    assert choose_regions(torch.rand(300), 36, 0.2).shape == (36,)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_pooling_is_that_of_caffe(seed):
    generator = torch.Generator().manual_seed(seed)
    feature_map = torch.randn(1, 2, 7, 9, generator=generator)
    boxes = torch.rand(6, 4, generator=generator) * torch.tensor([140, 110, 90, 70])
    boxes[:, 2:] += boxes[:, :2]  # some leave the map
    boxes[:3] = (boxes[:3] / 8).round() * 8  # corners on halves of cells
    cells = roi_pool(feature_map, [boxes], 5, 1 / 16)
    expected = torch.stack([reference.pooled(feature_map[0], box, 5) for box in boxes.tolist()])
    assert torch.equal(cells, expected)


@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (500, 333), (1000, 600), (1200, 300), (16, 16), (333, 1999)]
)
def test_scale(size):
    scale = image_scale(*size, 600, 1000)
    short, long = sorted(round(scale * side) for side in size)
    assert short == 600 and long <= 1000 or long == 1000 and short <= 600
    assert image_scale(480, 640, 600, 1000) == 1.25
    assert image_scale(333, 1999, 600, 1000) == 1000 / 1999


@pytest.mark.parametrize("scale", [1.0, 0.37, 1.8018018018, 3.1])
def test_resize(scale):
    image = torch.rand(2, 3, 13, 17) * 255 - 100
    result = resize(image, scale)
    expected = reference.resized(image[1, 2], scale)
    torch.testing.assert_close(result[1, 2], expected, atol=1e-3, rtol=0)
    assert (result[1, 2] - expected).abs().max() < 1e-3


def test_image_processor():
    image = _noise(50, 30)
    inputs = BUTDImageProcessor(size={"shortest_edge": 60, "longest_edge": 90})(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 54, 90)
    assert inputs["scale"].tolist() == pytest.approx([1.8]) and inputs["image_size"].tolist() == [[30, 50]]
    colours = torch.from_numpy(np.array(image)).float()[..., [2, 1, 0]]
    colours = colours - torch.tensor([102.9801, 115.9465, 122.7717])
    for channel in range(3):
        expected = reference.resized(colours[..., channel], 1.8)
        torch.testing.assert_close(inputs["pixel_values"][0, channel], expected, atol=1e-2, rtol=0)


def test_genuine_rows_end_at_the_last_pixel(butd_dir):
    rows = [line.split("\t") for line in (butd_dir / "train2014_obj36.tsv").read_text().splitlines()]
    assert len(rows) == 10
    for row in rows:
        height, width = int(row[1]), int(row[2])
        boxes = np.frombuffer(base64.b64decode(row[8]), dtype=np.float32).reshape(36, 4)
        scale = image_scale(height, width, 600, 1000)
        everything = torch.tensor([[-1e4, -1e4, 1e4, 1e4]])
        whole = clip(everything, round(scale * height), round(scale * width)) / scale
        assert boxes[:, 2].max() == pytest.approx(whole[0, 2].item(), rel=1e-6)
        assert (boxes[:, 2:] <= whole[:, 2:].numpy() * (1 + 1e-6)).all() and boxes.min() >= 0
        sides = (boxes[:, 2:] - boxes[:, :2]) * scale + 1
        assert sides.min() >= 16 * scale * (1 - 1e-5)


def test_proposals():
    detector = tiny_butd(anchor_scales=[1, 2], num_candidates=90, num_proposals=20)
    feature_map = torch.randn(1, 16, 5, 6)
    with torch.no_grad():
        expected = reference.proposals(detector, feature_map, 1.3, 80, 90)
        found = detector.propose(feature_map, 1.3, (80, 90))
    assert found.shape == (20, 4)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_features_do_not_depend_on_what_is_pooled_at_once():
    detector = tiny_butd()
    feature_map = torch.randn(1, 16, 6, 7)
    boxes = _boxes(130, torch.Generator().manual_seed(0), 90)
    features = detector.pool(feature_map, boxes)
    assert features.shape == (130, 24)
    for i in (0, 63, 64, 129):
        cells = reference.pooled(feature_map[0], boxes[i].tolist(), 4)[None]
        torch.testing.assert_close(
            features[i], detector.res5(cells).mean(dim=(2, 3))[0], rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_labels():
    detector = tiny_butd()
    features = torch.randn(40, 24)
    objects, attributes = detector.labels(features)
    head = detector.labels
    logits = head.objects(features)
    torch.testing.assert_close(objects, logits.softmax(dim=1))
    assert (logits.argmax(dim=1) == 0).any()  # the background has an embedding, too
    for i, best in enumerate(logits.argmax(dim=1)):
        joined = torch.cat([features[i], head.object_embeddings.weight[best]])
        expected = head.attributes(head.attribute_hidden(joined).relu()).softmax(dim=0)
        torch.testing.assert_close(attributes[i], expected)


@torch.no_grad()
def test_the_whole_way():
    detector = tiny_butd(num_regions=10)
    detector.labels.objects.weight.mul_(0.05)
    detector.labels.objects.bias.copy_(torch.eye(10)[0] * 2)  # the background is likely
    inputs = detector.image_processor(_noise(90, 60), return_tensors="pt")
    found = detector(**inputs)
    assert isinstance(inputs["scale"], torch.Tensor) and inputs["scale"].item() == 2
    feature_map = detector.trunk(inputs["pixel_values"])
    boxes = detector.propose(feature_map, 2.0, (120, 180))
    features = detector.pool(feature_map, boxes)
    objects, attributes = detector.labels(features)
    scores = reference.surviving_scores(boxes / 2, objects[:, 1:], 0.3)
    confident = [i for i, score in enumerate(scores) if score >= 0.2]
    assert len(boxes) > 10 and len(confident) != 10
    chosen = reference.ranked(scores)[:10]
    torch.testing.assert_close(found.features[0], features[chosen])
    torch.testing.assert_close(found.boxes[0], boxes[chosen] / 2 / torch.tensor([90, 60, 90, 60]))
    assert torch.equal(found.object_ids[0], objects[chosen, 1:].argmax(dim=1))
    torch.testing.assert_close(found.object_scores[0], objects[chosen, 1:].amax(dim=1))
    assert torch.equal(found.attribute_ids[0], attributes[chosen, 1:].argmax(dim=1))
    torch.testing.assert_close(found.attribute_scores[0], attributes[chosen, 1:].amax(dim=1))
    assert found.mask.all() and found.image_sizes.tolist() == [[60, 90]]


def test_trunk():
    trunk = tiny_butd().trunk
    for side in range(33, 66):
        halves = [(side - 1) // 2 + 1]
        halves += [halves[0] // 2]  # the pool has no padding, but takes what is left over
        for _ in range(2):
            halves.append((halves[-1] + 1) // 2)
        assert trunk(torch.randn(1, 3, side, 64)).shape == (1, 16, halves[-1], 4)
    for stage in (trunk.res3, trunk.res4):
        assert stage[0].conv1[0].stride == stage[0].shortcut[0].stride == (2, 2)
        assert stage[0].conv2[0].stride == stage[1].conv1[0].stride == (1, 1)
    res5 = tiny_butd().res5
    assert all(block.conv2[0].dilation == block.conv2[0].padding == (2, 2) for block in res5)
    assert res5(torch.randn(2, 16, 14, 14)).shape == (2, 24, 14, 14)


def test_a_batch_of_images():
    detector = tiny_butd()
    images = [_noise(90, 60), _noise(33, 140, "L"), _noise(160, 24, "RGBA"), _noise(20, 20, "P")]
    regions = detector.extract(images)
    assert regions.features.shape == (4, 36, detector.feature_dim) and regions.features.device.type == "cpu"
    assert regions.image_sizes.tolist() == [[60, 90], [140, 33], [24, 160], [20, 20]]
    for i, image in enumerate(images):
        alone = detector.extract([image.convert("RGB")])
        found = regions.row(i)
        for name, value in alone.row(0).items():
            torch.testing.assert_close(found[name], value)
    assert detector.fits_released_weights


def test_fewer_proposals_than_regions():
    detector = tiny_butd(num_proposals=5)
    assert detector.extract([_noise(60, 60)]).features.shape == (1, 5, 24)


def test_images_that_are_too_small():
    detector = tiny_butd(min_proposal_size=40)
    with pytest.raises(ValueError, match="no proposal with sides of 40 pixels"):
        detector.extract([_noise(60, 30)])
    with pytest.raises(ValueError, match="image of 900 x 4 pixels is 1 pixels wide"):
        detector.extract([_noise(900, 4)])
    with pytest.raises(ValueError, match="rows is empty"):
        detector.extract([])
    with pytest.raises(ValueError, match="one image"):
        detector(torch.zeros(2, 3, 60, 60), torch.ones(1), torch.tensor([[60, 60]]))
    with pytest.raises(ValueError, match="one at a time"):
        detector.image_processor([_noise(60, 30)] * 2)


def test_training_changes_no_statistics():
    detector = tiny_butd()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    image = _noise(60, 50)
    at_rest, found = detector.extract([image]), detector.train().extract([image])
    assert torch.equal(found.features, at_rest.features)
    detector(**detector.image_processor(image, return_tensors="pt")).features.sum().backward()
    assert detector.trunk.stem[0].weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    norms = [module for module in detector.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert norms and not any(list(norm.parameters()) for norm in norms)


def test_half_precision():
    detector, image = tiny_butd(), _noise(60, 50)
    regions = detector.to(torch.bfloat16).extract([image])
    assert regions.features.dtype == torch.float and regions.features.isfinite().all()


def test_folder(tmp_path):
    detector, image = tiny_butd(), _noise(70, 50)
    assert detector.spec is None
    detector.save_pretrained(tmp_path)
    detector.image_processor.save_pretrained(tmp_path)
    assert {"modeling_butd.py", "proposals.py", "regions.py"} <= {path.name for path in tmp_path.iterdir()}
    for load in (
        BUTDDetector.from_pretrained,
        lambda path: AutoModel.from_pretrained(path, trust_remote_code=True),
    ):
        loaded = load(tmp_path)
        assert type(loaded).__name__ == "BUTDDetector" and loaded.spec == str(tmp_path)
        for name, value in detector.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert torch.equal(loaded.extract([image]).features, detector.extract([image]).features)
    processor = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    found, expected = (p(image, return_tensors="pt") for p in (processor, detector.image_processor))
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_a_norm_that_a_folder_lacks_does_nothing(tmp_path):
    detector = tiny_butd()
    state = {name: value for name, value in detector.state_dict().items() if "res5.0.conv1.1" not in name}
    detector.save_pretrained(tmp_path, state_dict=state)
    norm = BUTDDetector.from_pretrained(tmp_path).res5[0].conv1[1]
    assert torch.equal(norm.running_var, torch.ones(6)) and torch.equal(norm.weight, torch.ones(6))
    assert not norm.running_mean.any() and not norm.bias.any()


def test_full_size():
    with torch.device("meta"):
        detector = BUTDDetector(BUTDConfig())
    assert sum(parameter.numel() for parameter in detector.parameters()) == 65_348_830
    assert sum(isinstance(module, nn.Conv2d) for module in detector.modules()) == 107  # as in the prototxt
    assert detector.feature_dim == 2048
    assert detector.labels.objects.out_features == 1601 and detector.labels.attributes.out_features == 401


@pytest.mark.parametrize(
    "fields",
    [{"depths": [1, 2, 3]}, {"hidden_sizes": [8] * 5}, {"nms_threshold": 1.5}, {"score_threshold": -1}],
)
def test_config(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        tiny_butd_config(**fields)
