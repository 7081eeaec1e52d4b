"""Converting the bottom-up-attention detector from all its layouts, and refusing what is none."""

import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from butd_reference import tiny_butd
from torch import Tensor
from transformers import AutoImageProcessor

from hf_vlp.conversion.butd import convert_checkpoint, convert_state_dict
from hf_vlp.conversion.caffe import read_caffemodel
from hf_vlp.conversion.pickles import read_array_pickle
from hf_vlp.models.modeling_butd import BUTDDetector
from hf_vlp.models.proposals import make_anchors

NUM_ANCHORS = 12
SCALE_BY_SCALE = [4 * ratio + scale for scale in range(4) for ratio in range(3)]  # of ours, ratio by ratio
ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
CAFFE_HEADS = {
    "rpn.conv": "rpn_conv/3x3",
    "rpn.objectness": "rpn_cls_score",
    "rpn.deltas": "rpn_bbox_pred",
    "labels.objects": "cls_score",
    "labels.box_deltas": "bbox_pred",
    "labels.object_embeddings": "cls_embedding",
    "labels.attribute_hidden": "fc_attr",
    "labels.attributes": "attr_score",
}
FORK_HEADS = {
    "rpn.conv": "proposal_generator.rpn_head.conv",
    "rpn.objectness": "proposal_generator.rpn_head.objectness_logits",
    "rpn.deltas": "proposal_generator.rpn_head.anchor_deltas",
    "labels.objects": "roi_heads.box_predictor.cls_score",
    "labels.box_deltas": "roi_heads.box_predictor.bbox_pred",
    "labels.object_embeddings": "roi_heads.box_predictor.cls_embedding",
    "labels.attribute_hidden": "roi_heads.box_predictor.fc_attr",
    "labels.attributes": "roi_heads.box_predictor.attr_score",
}
MILVLG_NAMES = {"cls_embedding": "cls_embed", "fc_attr": "attr_linear1", "attr_score": "attr_linear2"}


@pytest.fixture
def detector():
    return tiny_butd()


def caffe_layers(detector: BUTDDetector) -> dict[str, list[Tensor]]:
    """Blobs by the names of the prototxt; sums of statistics over 3, as training leaves them."""
    layers: dict[str, list[Tensor]] = {}
    branches = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}
    for name, value in detector.state_dict().items():
        module, _, part = name.rpartition(".")
        if match := re.fullmatch(r"(?:trunk\.)?res(\d)\.(\d+)\.(\w+)\.(\d)", module):
            stage, block, conv, place = match.groups()
            letters = "a" if block == "0" else f"b{block}" if stage in "34" else "abc"[int(block)]
            suffix = f"{stage}{letters}_branch{branches[conv]}"
            conv_name = f"res{suffix}"
        elif match := re.fullmatch(r"trunk\.stem\.(\d)", module):
            place, suffix, conv_name = match[1], "_conv1", "conv1"
        else:
            layers.setdefault(CAFFE_HEADS[module], []).append(value)
            continue
        if place == "0":
            layers[conv_name] = [value]
        elif part in ("weight", "bias"):
            layers.setdefault(f"scale{suffix}", []).append(value)
        else:
            layers.setdefault(f"bn{suffix}", []).append(value * 3)
            if part == "running_var":
                layers[f"bn{suffix}"].append(torch.tensor([3.0]))
    return layers


def fork_state(detector: BUTDDetector) -> dict[str, Tensor]:
    """By the names of detectron2: background last and without deltas, one logit, anchors scale by scale."""
    state = {}
    for name, value in detector.state_dict().items():
        module, _, part = name.rpartition(".")
        if match := re.fullmatch(r"(trunk\.)?(res\d\.\d+\.\w+|stem)\.(\d)", module):
            layer = ("backbone." if match[1] else "roi_heads.") + match[2].replace("stem", "stem.conv1")
            state[f"{layer}.{'norm.' * int(match[3])}{part}"] = value
            continue
        if module == "rpn.objectness":
            background, thing = value.chunk(2)
            value = (thing - background)[SCALE_BY_SCALE]
        elif module == "rpn.deltas":
            value = value.unflatten(0, (-1, 4))[SCALE_BY_SCALE].flatten(0, 1)
        elif module == "labels.box_deltas":
            value = value[4:]
        elif module in ("labels.objects", "labels.object_embeddings", "labels.attributes"):
            value = torch.cat([value[1:], value[:1]])
        state[f"{FORK_HEADS[module]}.{part}"] = value
    return state


def milvlg_state(detector: BUTDDetector, order: list[int]) -> dict[str, Tensor]:
    """By the names of detectron2, but as Caffe has it, with the anchors in any order."""
    config, ours, state = detector.config, detector.state_dict(), {}
    for name in fork_state(detector):
        renamed = re.sub("|".join(MILVLG_NAMES), lambda match: MILVLG_NAMES[match[0]], name)
        module, _, part = name.rpartition(".")
        head = next((head for head, fork in FORK_HEADS.items() if fork == module), None)
        state[renamed] = fork_state(detector)[name] if head is None else ours[f"{head}.{part}"]
        if name.endswith("norm.running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    for part in ("weight", "bias"):
        head = "proposal_generator.rpn_head"
        deltas, logits = (f"{head}.{layer}.{part}" for layer in ("anchor_deltas", "objectness_logits"))
        state[deltas] = state[deltas].unflatten(0, (-1, 4))[order].flatten(0, 1)
        state[logits] = state[logits].unflatten(0, (2, -1))[:, order].flatten(0, 1)
    state[ANCHORS] = make_anchors(config.anchor_base_size, config.anchor_ratios, config.anchor_scales)[order]
    return state


def varint(value: int) -> bytes:
    high, low = divmod(value, 128)
    return bytes([low]) if not high else bytes([low | 128]) + varint(high)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(value: Tensor, old: bool, packed: bool) -> bytes:
    data = value.float().numpy().astype("<f4").tobytes()
    if not packed:
        numbers = b"".join(varint(5 << 3 | 5) + data[i : i + 4] for i in range(0, len(data), 4))
    else:
        numbers = field(5, data)
    if old:  # four dimensions, ones in front
        sizes = [1] * (4 - value.ndim) + list(value.shape)
        return b"".join(field(i + 1, size) for i, size in enumerate(sizes)) + numbers
    return numbers + field(7, field(1, b"".join(varint(size) for size in value.shape)))


def caffemodel(layers: dict[str, list[Tensor]], old: bool = False, packed: bool = True) -> bytes:
    message = field(1, b"ResNet-101") + field(3, b"data")
    for name, blobs in {"data": [], **layers}.items():
        encoded = [blob(value, old, packed) for value in blobs]
        if old:
            layer = field(2, b"bottom") + field(4, name.encode()) + field(5, 4)
            message += field(2, layer + b"".join(field(6, one) for one in encoded))
        else:
            layer = (
                field(1, name.encode()) + field(2, b"Convolution") + varint(5 << 3 | 5) + struct.pack("<f", 1)
            )
            message += field(100, layer + b"".join(field(7, one) for one in encoded) + field(10, 1))
    return message


def assert_same(converted: BUTDDetector, detector: BUTDDetector):
    expected, found = detector.state_dict(), converted.state_dict()
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(("old", "packed"), [(False, True), (False, False), (True, True)])
def test_caffe_file(detector, tmp_path, old, packed):
    layers = caffe_layers(detector)
    (tmp_path / "net.caffemodel").write_bytes(caffemodel(layers, old, packed))
    blobs = read_caffemodel(tmp_path / "net.caffemodel")
    assert list(blobs) == [f"{name}.{i}" for name, values in layers.items() for i in range(len(values))]
    for name, values in layers.items():
        for i, value in enumerate(values):
            assert torch.equal(blobs[f"{name}.{i}"], value), name
    before = {name: value.clone() for name, value in blobs.items()}
    converted = convert_state_dict(blobs)
    assert_same(converted.model, detector)
    assert not converted.model.training
    assert set(converted.report.used) == set(blobs) and not converted.report.dropped
    assert all(torch.equal(blobs[name], value) for name, value in before.items())


def test_caffe_statistics_that_were_never_gathered(detector):
    blobs = {
        f"{name}.{i}": value
        for name, values in caffe_layers(detector).items()
        for i, value in enumerate(values)
    }
    blobs["bn_conv1.2"] = torch.zeros(1)
    assert not convert_state_dict(blobs).model.trunk.stem[1].running_var.any()


def test_fork(detector):
    converted = convert_state_dict(fork_state(detector)).model
    features, feature_map = torch.randn(9, 24), torch.randn(1, 16, 3, 4)
    with torch.no_grad():
        for found, expected in (
            (converted.rpn(feature_map), detector.rpn(feature_map)),
            (converted.labels(features), detector.labels(features)),
        ):
            torch.testing.assert_close(found, expected)
    deltas = detector.labels.box_deltas
    assert torch.equal(converted.labels.box_deltas.weight[4:], deltas.weight[4:])
    assert not converted.labels.box_deltas.weight[:4].any()
    assert torch.equal(converted.res5[1].conv2[1].running_var, detector.res5[1].conv2[1].running_var)


def test_fork_with_anchors_of_detectron2(detector):
    state = fork_state(detector)
    boxes = []
    for size in (64, 128, 256, 512):
        for ratio in (0.5, 1, 2):
            width = (size**2 / ratio) ** 0.5
            boxes.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
    with_anchors = convert_state_dict({**state, ANCHORS: torch.tensor(boxes)})
    assert_same(with_anchors.model, convert_state_dict(state).model)
    assert with_anchors.report.dropped == {ANCHORS: "anchors, computed anew"}


@pytest.mark.parametrize("order", [list(range(NUM_ANCHORS)), SCALE_BY_SCALE])
def test_milvlg(detector, order):
    converted = convert_state_dict(milvlg_state(detector, order))
    assert_same(converted.model, detector)
    assert set(converted.report.dropped.values()) == {"anchors, computed anew", "counter of training"}


def test_file_to_folder(detector, tmp_path):
    state = fork_state(detector)
    arrays = {name: value.numpy() for name, value in state.items()}
    (tmp_path / "net.caffemodel").write_bytes(caffemodel(caffe_layers(detector)))
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "X"}))
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(arrays, protocol=2))
    torch.save({"model": state, "iteration": 9}, tmp_path / "net.pth")
    for file in ("net.caffemodel", "net.pkl", "old.pkl", "net.pth"):
        report = convert_checkpoint(tmp_path / file, tmp_path / f"{file}-out")
        assert not report.missing and not report.dropped
        loaded = BUTDDetector.from_pretrained(tmp_path / f"{file}-out")
        if file == "net.caffemodel":
            assert_same(loaded, detector)
        else:
            assert_same(loaded, convert_state_dict(state).model)
        names = {path.name for path in (tmp_path / f"{file}-out").iterdir()}
        assert {"modeling_butd.py", "preprocessor_config.json", "config.json"} <= names
    processor = AutoImageProcessor.from_pretrained(tmp_path / "net.pkl-out", trust_remote_code=True)
    assert processor.size["shortest_edge"] == 600 and processor.image_mean == (102.9801, 115.9465, 122.7717)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _cut(state, name):
    return {key: value for key, value in state.items() if key != name}


HEAD = "roi_heads.box_predictor"
BROKEN = {
    "incomplete": (lambda s: _cut(s, "roi_heads.res5.1.conv2.norm.running_var"), "misses"),
    "without classes": (lambda s: _cut(s, f"{HEAD}.cls_score.weight"), "no labels.objects.weight"),
    "with surplus": (lambda s: {**s, "extra.weight": torch.zeros(1)}, "no place for"),
    "with other deltas": (lambda s: {**s, f"{HEAD}.bbox_pred.bias": torch.zeros(4)}, "box deltas"),
    "with other anchors": (lambda s: {**s, ANCHORS: torch.rand(NUM_ANCHORS, 4).sort().values}, "other sizes"),
    "with more anchors": (lambda s: {**s, ANCHORS: torch.rand(15, 4)}, "12 anchors"),
    "retrained": (
        lambda s: {key.replace("cls_embedding", "cls_embed"): value for key, value in s.items()},
        "MILVLG trained",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_fork(detector, kind, tmp_path):
    change, message = BROKEN[kind]
    torch.save(change(fork_state(detector)), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "net.pth", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_order_of_anchors_has_to_be_known(detector):
    with pytest.raises(ValueError, match="cell_anchors"):
        convert_state_dict(_cut(milvlg_state(detector, SCALE_BY_SCALE), ANCHORS))


def test_broken_caffe_net(detector):
    blobs = {
        f"{name}.{i}": value
        for name, values in caffe_layers(detector).items()
        for i, value in enumerate(values)
    }
    with pytest.raises(ValueError, match=r"no trunk.res3.1.conv2.1.factor"):
        convert_state_dict(_cut(blobs, "bn3b1_branch2b.2"))
    with pytest.raises(ValueError, match="no place for"):
        convert_state_dict({**blobs, "conv1.2": torch.zeros(1)})
    with pytest.raises(ValueError, match="no place for"):
        convert_state_dict({**blobs, "fc1000.0": torch.zeros(1)})
    with pytest.raises(ValueError, match="misshapen"):
        convert_state_dict({**blobs, "fc_attr.0": torch.zeros(7, 5)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 50,
        b"layer { name: 'conv1' }",
        bytes(range(256)),
        b"\xff" * 30,
        field(100, field(1, 10**9)),
    ],
)
def test_no_caffemodel(tmp_path, content):
    (tmp_path / "net.caffemodel").write_bytes(content)
    with pytest.raises(ValueError, match=r"net\.caffemodel"):
        read_caffemodel(tmp_path / "net.caffemodel")


def test_truncated_caffemodel(detector, tmp_path):
    content = caffemodel(caffe_layers(detector))
    for length in (len(content) - 1, len(content) // 2):
        (tmp_path / "net.caffemodel").write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated"):
            convert_checkpoint(tmp_path / "net.caffemodel", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["net.caffemodel"]


def test_blob_of_another_size(tmp_path):
    numbers = field(5, b"\x00" * 8) + field(7, field(1, varint(3)))
    (tmp_path / "net.caffemodel").write_bytes(field(100, field(1, b"conv1") + field(7, numbers)))
    with pytest.raises(ValueError, match=r"shape \(3,\) has 8 bytes"):
        read_caffemodel(tmp_path / "net.caffemodel")


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "content",
    [
        lambda path: pickle.dumps({"model": {"conv1": _Harmful(path / "harm")}}),
        lambda path: pickle.dumps({"model": {"conv1": np.array([_Harmful(path / "harm")], dtype=object)}}),
        lambda path: pickle.dumps({"model": {"conv1": np.array([{}], dtype=object)}}),
        lambda path: pickle.dumps({"model": {"conv1": "text"}}),
        lambda path: pickle.dumps([np.zeros(3)]),
        lambda path: pickle.dumps({"conv1": np.zeros(9)})[:-9],
        lambda path: b"c_codecs\nencode\n(Vtext\nVzip\ntR.",
        lambda path: b"no pickle",
        lambda path: b"",
    ],
)
def test_no_pickle_of_arrays(tmp_path, content):
    (tmp_path / "net.pkl").write_bytes(content(tmp_path))
    with pytest.raises(ValueError, match=r"net\.pkl"):
        read_array_pickle(tmp_path / "net.pkl")
    assert not (tmp_path / "harm").exists()


def test_no_file_and_a_folder_in_use(detector, tmp_path):
    for name in ("net.caffemodel", "net.pkl", "net.pth"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            convert_checkpoint(tmp_path / name, tmp_path / "out")
    torch.save(fork_state(detector), tmp_path / "net.pth")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_checkpoint(tmp_path / "net.pth", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]
