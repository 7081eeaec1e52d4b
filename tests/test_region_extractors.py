"""Extractors: what they promise, where features come from, and what is refused."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_extractors import DETECTORS, TinyBackbone, TinyPyramid, noise, save_detector, save_trunk
from torch.nn.functional import avg_pool2d
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from transformers import YolosConfig, YolosForObjectDetection

from hf_vlp.models.configuration_butd import BUTDConfig
from hf_vlp.models.crops import crop_features
from hf_vlp.models.modeling_butd import BUTDDetector
from hf_vlp.models.region_extractors import (
    CropRegions,
    DetectorRegions,
    GridRegions,
    TorchvisionRegions,
    load_extractor,
)

IMAGES = [noise(64, 40), noise(50, 70), noise(31, 30)]
NUM_CLASSES = 5


def faster_rcnn(**options) -> FasterRCNN:
    return FasterRCNN(
        TinyBackbone(8),
        num_classes=NUM_CLASSES,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=2, sampling_ratio=2),
        min_size=64,
        max_size=128,
        **options,
    ).eval()


def retina_net(**options) -> RetinaNet:
    anchors = AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    return RetinaNet(
        TinyPyramid(3), NUM_CLASSES, anchor_generator=anchors, min_size=64, max_size=128, **options
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def make(kind: str, folder):
    if kind in DETECTORS:
        return load_extractor(save_detector(kind, folder / kind) + "#7")
    if kind in ("vit", "clip", "resnet", "timm"):
        return load_extractor(f"grid:{save_trunk(kind, folder / kind)}#3")
    model = faster_rcnn(box_score_thresh=0.0) if kind == "two stages" else retina_net(score_thresh=0.0)
    return TorchvisionRegions(model, num_regions=7)


@pytest.mark.parametrize("kind", [*DETECTORS, "two stages", "one stage", "vit", "clip", "resnet", "timm"])
def test_every_extractor_keeps_the_contract(kind, folder):
    extractor = make(kind, folder)
    regions = extractor.extract(IMAGES)
    count = 9 if (extractor.spec or "").startswith("grid:") else 7
    assert regions.features.shape == (3, count, extractor.feature_dim)
    assert regions.mask.all() and regions.image_sizes.tolist() == [[40, 64], [70, 50], [30, 31]]
    for value in (regions.features, regions.boxes):
        assert value.isfinite().all() and value.dtype == torch.float and not value.requires_grad
    assert regions.boxes.min() >= 0 and regions.boxes.max() <= 1
    assert (regions.boxes[..., 2:] >= regions.boxes[..., :2]).all()
    if regions.object_ids is not None:
        assert 0 <= regions.object_ids.min() and regions.object_ids.max() < NUM_CLASSES
        assert 0 <= regions.object_scores.min() and regions.object_scores.max() <= 1
    assert extractor.fits_released_weights is False
    again = extractor.extract([image.convert("RGBA") for image in IMAGES])
    assert torch.equal(regions.features, again.features)  # evaluation mode
    if extractor.spec is not None:
        torch.testing.assert_close(load_extractor(extractor.spec).extract(IMAGES).boxes, regions.boxes)
    with pytest.raises(ValueError, match="images is empty"):
        extractor.extract([])


# Detectors of transformers


def detr_of_one_box(folder, *box: float) -> DetectorRegions:
    """DETR that predicts nothing but this box, cx, cy, w, h in 0..1."""
    extractor = DetectorRegions(save_detector("detr", folder / "detr"), num_regions=20)
    last = extractor.model.bbox_predictor.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(box).logit())
    return extractor


def test_features_are_means_of_the_last_map_inside_the_box(folder):
    detr = detr_of_one_box(folder, 0.25, 0.5, 0.5, 1 - 1e-6)
    image = noise(128, 64)  # as large as the detector reads it: a map of 2 x 4
    regions = detr.extract([image])
    torch.testing.assert_close(regions.boxes[0, 0], torch.tensor([0.0, 0, 0.5, 1]), atol=1e-4, rtol=0)
    pixels = detr.image_processor([image], return_tensors="pt")
    with torch.no_grad():
        [(feature_map, _)] = detr.trunk(pixels["pixel_values"], pixels["pixel_mask"])
    columns = feature_map[0].mean(dim=1).numpy()  # (F, 4)
    points = 2 * (np.arange(14) + 0.5) / 14 - 0.5  # of the left half, counted from the first column's centre
    expected = [np.interp(points, range(4), values).mean() for values in columns]
    np.testing.assert_allclose(regions.features[0, 0], expected, atol=1e-4, rtol=1e-3)


def test_padding_of_a_batch_changes_nothing(folder):
    detr = detr_of_one_box(folder, 0.6, 0.4, 0.2, 0.2)  # away from the padding, which convolutions see
    detr.image_processor.size = {"shortest_edge": 250, "longest_edge": 500}
    image, tall = noise(80, 66), noise(66, 80)  # the last cells are filled in part, and differently
    alone, beside = detr.extract([image]), detr.extract([image, tall])
    torch.testing.assert_close(alone.features[0], beside.features[0], atol=1e-3, rtol=1e-3)


def test_boxes_that_leave_the_image_are_clipped(folder):
    boxes = detr_of_one_box(folder, 0.9, 0.2, 0.6, 0.6).extract([IMAGES[0]]).boxes[0, 0]
    torch.testing.assert_close(boxes, torch.tensor([0.6, 0, 1, 0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_regions_are_where_an_object_is_likeliest(kind, folder):
    extractor = DetectorRegions(save_detector(kind, folder / kind), num_regions=4)
    if kind == "detr":  # untrained, it sees the same everywhere
        made_up = 2 * torch.randn(1, 20, NUM_CLASSES + 1)
        extractor.model.class_labels_classifier.register_forward_hook(lambda *_: made_up)
    inputs = extractor.image_processor([IMAGES[0]], return_tensors="pt")
    with torch.no_grad():
        logits = extractor.model(inputs["pixel_values"]).logits[0]
    if kind == "detr":  # the last class says that there is none
        scores = logits.softmax(-1)[:, :-1]
        objectness = 1 - logits.softmax(-1)[:, -1]
    else:
        scores, objectness = logits.sigmoid(), logits.sigmoid().amax(-1)
    best = objectness.topk(4).indices
    regions = extractor.extract([IMAGES[0]])
    torch.testing.assert_close(regions.object_scores[0], scores[best].amax(-1), atol=1e-4, rtol=1e-3)
    assert regions.object_ids[0].tolist() == scores[best].argmax(-1).tolist()


def test_detectors_that_do_not_fit_are_refused(folder, tmp_path):
    yolos = YolosForObjectDetection(
        YolosConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            image_size=[32, 32],
        )
    )
    with pytest.raises(ValueError, match="YolosForObjectDetection, whose trunk gives no map"):
        DetectorRegions(yolos)
    with pytest.raises(ValueError, match="without a folder; save it"):
        DetectorRegions(DETECTORS["detr"].model())
    trunk = save_trunk("vit", folder / "vit")
    with pytest.raises(ValueError, match=f"type vit, which is no detector.*grid:{trunk}"):
        load_extractor(trunk)
    with pytest.raises(ValueError, match="num_regions is 0"):
        DetectorRegions(save_detector("detr", folder / "detr"), num_regions=0)
    with pytest.raises(OSError):
        load_extractor(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="spec is empty"):
        load_extractor("")


def test_the_bottom_up_attention_detector_is_told_by_its_config(tmp_path):
    config = BUTDConfig(
        stem_size=4, hidden_sizes=(8, 8, 8, 16), depths=(1, 1, 1, 1), rpn_hidden_size=8, shortest_edge=48,
        num_objects=6, num_attributes=4, object_embedding_size=4, attribute_hidden_size=8, num_proposals=5,
    )  # fmt: skip
    BUTDDetector(config).save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path))
    assert isinstance(extractor, BUTDDetector) and not extractor.training
    assert extractor.fits_released_weights and extractor.spec == str(tmp_path)
    assert extractor.feature_dim == 16
    with pytest.raises(ValueError, match="leave #5 out"):
        load_extractor(f"{tmp_path}#5")


# Detectors of torchvision


def test_without_detections_the_whole_image_is_the_region():
    extractor = TorchvisionRegions(retina_net(score_thresh=1.0))
    colours = [(255, 0, 0), (20, 90, 200)]
    regions = extractor.extract([Image.new("RGB", (96, 64), colour) for colour in colours])
    assert regions.mask.tolist() == [[True], [True]]
    assert regions.boxes.tolist() == [[[0, 0, 1, 1]]] * 2
    assert regions.object_scores.tolist() == [[0], [0]]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor(colours) / 255 - mean) / std  # the backbone averages pixels
    assert regions.features.shape == (2, 1, 3)
    torch.testing.assert_close(regions.features[:, 0], expected, atol=1e-4, rtol=0)


def test_images_without_detections_stand_beside_others():
    model = faster_rcnn(box_score_thresh=0.0)
    detections = model.roi_heads.postprocess_detections

    def none_in_the_first(*args):
        boxes, scores, labels = detections(*args)
        return [boxes[0][:0], *boxes[1:]], [scores[0][:0], *scores[1:]], [labels[0][:0], *labels[1:]]

    model.roi_heads.postprocess_detections = none_in_the_first
    regions = TorchvisionRegions(model, num_regions=4).extract(IMAGES[:2])
    assert regions.mask.sum(1).tolist() == [1, 4]
    assert regions.boxes[0, 0].tolist() == [0, 0, 1, 1]
    assert (regions.object_scores[1].diff() <= 0).all()  # the best come first


def test_torchvision_detectors_go_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights: asked.append((name, weights)) or faster_rcnn()
    )
    extractor = load_extractor("torchvision:fasterrcnn_resnet50_fpn_v2#12")
    assert asked == [("fasterrcnn_resnet50_fpn_v2", "DEFAULT")]
    assert (extractor.num_regions, extractor.spec) == (12, "torchvision:fasterrcnn_resnet50_fpn_v2#12")
    assert load_extractor("torchvision:some").spec == "torchvision:some"


def test_other_models_of_torchvision_are_refused():
    for name in ("resnet18", "ssdlite320_mobilenet_v3_large"):
        options = {"weights_backbone": None} if name.startswith("ssd") else {}
        model = torchvision.models.get_model(name, weights=None, **options)
        with pytest.raises(ValueError, match="R-CNN, RetinaNet or FCOS"):
            TorchvisionRegions(model)
    with pytest.raises(ValueError, match="nonsense"):
        load_extractor("torchvision:nonsense")


# Grids


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_cells_of_the_map_are_the_features(kind, folder):
    extractor = GridRegions(save_trunk(kind, folder / kind), grid=4 if kind == "vit" else 2)
    pixels = extractor.image_processor(IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        patches = extractor.model(pixels)[:, 1:]
    torch.testing.assert_close(extractor.extract(IMAGES).features, patches, atol=1e-5, rtol=1e-4)
    coarse = GridRegions(save_trunk(kind, folder / kind), grid=3)  # cells cut patches, but their mean stays
    means = coarse.extract(IMAGES).features.mean(dim=1)
    torch.testing.assert_close(means, patches.mean(dim=1), atol=1e-5, rtol=1e-4)


def test_cells_cover_the_image_in_reading_order(folder):
    boxes = GridRegions(save_trunk("vit", folder / "vit"), grid=3).extract(IMAGES[:1]).boxes[0]
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.prod(dim=1).sum() == pytest.approx(1)
    assert boxes[:2, 0].tolist() == pytest.approx([0, 1 / 3]) and boxes[:2, 1].tolist() == [0, 0]
    assert boxes[-1].tolist() == pytest.approx([2 / 3, 2 / 3, 1, 1])


def test_nothing_of_a_wide_image_is_cropped_away(folder):
    extractor = GridRegions(save_trunk("clip", folder / "clip"))
    image = Image.new("RGB", (120, 30), (10, 200, 90))
    marked = image.copy()
    marked.paste((255, 0, 0), (112, 0, 120, 30))
    before, after = (extractor.extract([one]).features[0] for one in (image, marked))
    assert not torch.allclose(before, after, atol=1e-4)


# Boxes given beforehand


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5), st.floats(0, 20), st.floats(0, 10), st.floats(0.01, 10), st.floats(0.01, 10),
    st.integers(0, 9),
)  # fmt: skip
def test_cells_of_crops_average_what_they_cover(grid, x, y, width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    features = crop_features(Image.fromarray(pixels), [[x, y, width, height]], grid)
    assert features.shape == (1, 3 * grid**2)

    def covered(start, length, pixels):  # of each pixel of a line
        ends = np.minimum(start + length, np.arange(pixels) + 1.0)
        return np.clip(ends - np.maximum(start, np.arange(pixels)), 0, None) / length

    whole = np.einsum("h,hwc,w->c", covered(y, height, 20), pixels / 255, covered(x, width, 30))
    np.testing.assert_allclose(features.view(-1, 3).mean(0), whole, atol=2e-3)


def test_cells_that_are_whole_pixels_are_their_means():
    image = noise(30, 20)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    expected = avg_pool2d(pixels[:, 4:16, 6:14], (3, 2)).permute(1, 2, 0).flatten()
    features = crop_features(image, [[0, 0, 30, 20], [6, 4, 8, 12]], grid=4)
    torch.testing.assert_close(features[1], expected)


def test_crops_are_regions():
    image, boxes = noise(40, 20), [[10, 5, 20, 10], [-4, 0, 14, 30]]
    extractor = CropRegions(grid=2)
    regions = extractor.extract([image, image], [boxes, np.array(boxes[:1])])
    assert regions.features.shape == (2, 2, extractor.feature_dim) == (2, 2, 12)
    assert regions.mask.tolist() == [[True, True], [True, False]]
    expected = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0, 0, 0.25, 1]])
    torch.testing.assert_close(regions.boxes[0], expected)
    assert torch.equal(regions.features[0], crop_features(image, boxes, 2))
    assert (extractor.fits_released_weights, extractor.spec) == (False, None)


@pytest.mark.parametrize("box", [[5, 5, 0, 3], [50, 0, 4, 4], [3, 3, -1, 2]])
def test_boxes_that_hold_nothing_are_refused(box):
    with pytest.raises(ValueError, match="boxes has .* holds nothing of an image of 40 x 20"):
        crop_features(noise(40, 20), [[0, 0, 10, 10], box])
