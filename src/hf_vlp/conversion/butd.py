"""Weights of the bottom-up-attention detector: Caffe's, those of detectron2 forks, and Hugging Face's.

All are copies of the Caffe model, which is what `BUTDDetector` computes. The copies run it differently, so
the same weights give other regions there: they return refined boxes, suppress across classes, centre anchors
at 0 instead of 7.5, which shifts every proposal by eight pixels of the scaled image, and take the attributes'
probabilities without "none". What differs in the files is undone here:

| | Caffe, MILVLG (`caffe` mode) | py-bottom-up-attention, Hugging Face |
|---|---|---|
| first class, first attribute | background, none | last ones |
| box deltas | of all classes | not of the background |
| objectness | background and object of each anchor | one logit, their difference |
| order of anchors | ratio by ratio; MILVLG's file says | scale by scale |
| batch normalisation | sums with their divisor, and a Scale layer | one layer |
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..cards import write_card
from ..folders import new_folder
from ..models.configuration_butd import BUTDConfig
from ..models.modeling_butd import BUTDDetector
from ..models.proposals import make_anchors
from .bert import count_layers
from .caffe import read_caffemodel
from .checkpoints import Conversion, OfficialWeights
from .keys import KeyReport, load_into, read_state_dict, rename_keys
from .pickles import read_array_pickle

_CONV = r"(conv[123]|shortcut)"
_NORM = r"norm\.(weight|bias|running_mean|running_var|factor)"
_RPN, _HEAD = r"proposal_generator\.rpn_head\.", r"roi_heads\.box_predictor\."
_KEYS = {
    r"backbone\.stem\.conv1\.weight": "trunk.stem.0.weight",
    r"backbone\.stem\.conv1\." + _NORM: r"trunk.stem.1.\1",
    rf"backbone\.(res[234]\.\d+)\.{_CONV}\.weight": r"trunk.\1.\2.0.weight",
    rf"backbone\.(res[234]\.\d+)\.{_CONV}\.{_NORM}": r"trunk.\1.\2.1.\3",
    rf"roi_heads\.(res5\.\d+)\.{_CONV}\.weight": r"\1.\2.0.weight",
    rf"roi_heads\.(res5\.\d+)\.{_CONV}\.{_NORM}": r"\1.\2.1.\3",
    _RPN + r"conv\.(weight|bias)": r"rpn.conv.\1",
    _RPN + r"objectness_logits\.(weight|bias)": r"rpn.objectness.\1",
    _RPN + r"anchor_deltas\.(weight|bias)": r"rpn.deltas.\1",
    _HEAD + r"cls_score\.(weight|bias)": r"labels.objects.\1",
    _HEAD + r"bbox_pred\.(weight|bias)": r"labels.box_deltas.\1",
    _HEAD + r"(?:cls_embedding|cls_embed)\.weight": "labels.object_embeddings.weight",
    _HEAD + r"(?:fc_attr|attr_linear1)\.(weight|bias)": r"labels.attribute_hidden.\1",
    _HEAD + r"(?:attr_score|attr_linear2)\.(weight|bias)": r"labels.attributes.\1",
}
_ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
_ANCHOR_TOLERANCE = 0.1  # of sides: detectron2 does not round those of ratios
_DROPPED = {
    re.escape(_ANCHORS): "anchors, computed anew",
    r".*\.num_batches_tracked": "counter of training",
    r"pixel_(mean|std)": "constants of the image processor",
}

# Names of Caffe's layers, in those of detectron2
_CAFFE_BLOCK = re.compile(r"(res|bn|scale)(\d)([a-z])(\d*)_branch(\w+)\.(\d)")
_CAFFE_STEM = re.compile(r"(|bn_|scale_)conv1\.(\d)")
_CAFFE_CONVS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE_BLOBS = {
    "bn": ("norm.running_mean", "norm.running_var", "norm.factor"),
    "scale": ("norm.weight", "norm.bias"),
}
_CAFFE_HEADS = {
    "rpn_conv/3x3": "proposal_generator.rpn_head.conv",
    "rpn_cls_score": "proposal_generator.rpn_head.objectness_logits",
    "rpn_bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    **{
        name: f"roi_heads.box_predictor.{name}"
        for name in ("cls_score", "bbox_pred", "cls_embedding", "fc_attr", "attr_score")
    },
}


def convert_state_dict(official: Mapping[str, Tensor]) -> Conversion:
    """Weights of any of the layouts to our model; depths, widths and numbers of classes are read from them.

    Args:
        official: by the names of detectron2, or `layer.index` of Caffe.

    Raises:
        ValueError: the weights are of another model, incomplete, or do not fit.
    """
    renamed, report = rename_keys(official, _KEYS, _DROPPED, _name)
    weights = OfficialWeights({name: value.float() for name, value in renamed.items()})
    if "bn_conv1.0" in official:
        _divide_statistics(weights)
    else:
        _sort_anchors(weights, official)
    _put_background_first(weights)
    model = BUTDDetector(_read_config(weights))
    load_into(model, weights, report)
    return Conversion(model.eval(), report)


def convert_checkpoint(checkpoint: str | Path, output_dir: str | Path) -> KeyReport:
    """Convert a file into a folder with detector, image processor and code, or write nothing.

    Args:
        checkpoint: a `.caffemodel` (of the original `resnet101_faster_rcnn_final_iter_320000.caffemodel`), a
            `.pkl` of arrays, or a file of torch or safetensors.
        output_dir: a folder that does not exist yet, or is empty.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: as `convert_state_dict`; a file that cannot be read; a folder that is not empty.
    """
    with new_folder(output_dir) as folder:
        read = {".caffemodel": read_caffemodel, ".pkl": read_array_pickle}.get(
            Path(checkpoint).suffix, read_state_dict
        )
        converted = convert_state_dict(read(checkpoint))
        converted.model.config.converted_from = converted.report.provenance(checkpoint)
        converted.model.save_pretrained(folder)
        write_card(converted.model, folder)
        converted.model.image_processor.save_pretrained(folder)
    return converted.report


def _name(key: str) -> str:
    """A key of Caffe in the names of detectron2; others as they are."""
    if match := _CAFFE_BLOCK.fullmatch(key):
        kind, stage, letter, number, branch, blob = match.groups()
        block = int(number or ord(letter) - ord("a"))  # a, b, c or a, b1, b2, ...
        part = "roi_heads" if stage == "5" else "backbone"
        layer = f"{part}.res{stage}.{block}.{_CAFFE_CONVS.get(branch, branch)}"
    elif match := _CAFFE_STEM.fullmatch(key):
        kind, blob = match[1].removesuffix("_"), match[2]
        layer = "backbone.stem.conv1"
    else:
        layer, _, blob = key.rpartition(".")
        if layer not in _CAFFE_HEADS:
            return key
        kind, layer = "", _CAFFE_HEADS[layer]
    names = _CAFFE_BLOBS.get(kind, ("weight", "bias"))
    return f"{layer}.{names[int(blob)]}" if int(blob) < len(names) else key


def _divide_statistics(weights: OfficialWeights):
    """Caffe stores sums of means and of variances, and what to divide them by."""
    for mean in [name for name in weights if name.endswith(".running_mean")]:
        norm = mean.removesuffix("running_mean")
        divisor = weights[f"{norm}factor"]
        for name in (mean, f"{norm}running_var"):
            weights[name] = weights[name] / divisor if divisor else torch.zeros_like(weights[name])
        del weights[f"{norm}factor"]


def _sort_anchors(weights: OfficialWeights, official: Mapping[str, Tensor]):
    """Anchors in our order, ratio by ratio, and two logits of each."""
    anchors = official.get(_ANCHORS)
    num_anchors = len(weights["rpn.deltas.bias"]) // 4
    has_two_logits = len(weights["rpn.objectness.bias"]) == 2 * num_anchors
    if has_two_logits and anchors is None:
        raise ValueError(f"the checkpoint has no {_ANCHORS}, which tells their order; it is incomplete")
    if not has_two_logits and any(".cls_embed." in key for key in official):
        raise ValueError(
            "the checkpoint is a detector that MILVLG trained with detectron2, which is another network; "
            "give one that was converted from Caffe, such as bua-caffe-frcn-r101-k36.pth"
        )
    order = _anchor_order(num_anchors, anchors)
    for part in ("weight", "bias"):
        objectness, deltas = weights[f"rpn.objectness.{part}"], weights[f"rpn.deltas.{part}"]
        if not has_two_logits:  # sigmoid(x) = softmax(0, x)
            objectness = torch.cat([torch.zeros_like(objectness), objectness])
        weights[f"rpn.objectness.{part}"] = objectness.unflatten(0, (2, -1))[:, order].flatten(0, 1)
        weights[f"rpn.deltas.{part}"] = deltas.unflatten(0, (-1, 4))[order].flatten(0, 1)


def _anchor_order(num_anchors: int, anchors: Tensor | None) -> Tensor:
    """Where each of our anchors is among those of a file, scale by scale where it does not say: (A,)."""
    config = BUTDConfig()
    ours = make_anchors(config.anchor_base_size, config.anchor_ratios, config.anchor_scales)
    if num_anchors != len(ours) or (anchors is not None and anchors.shape != ours.shape):
        raise ValueError(
            f"the checkpoint has {num_anchors} anchors of a cell, where the detector has {len(ours)}; it "
            "belongs to another model"
        )
    if anchors is None:
        return torch.arange(num_anchors).reshape(len(config.anchor_scales), -1).T.flatten()
    sides, others = ((boxes[:, 2:] - boxes[:, :2]).log() for boxes in (ours, anchors.float()))
    distances, order = (sides[:, None] - others).abs().amax(dim=2).min(dim=1)
    if len(order.unique()) != len(ours) or not distances.max() < _ANCHOR_TOLERANCE:
        raise ValueError(
            "the checkpoint has anchors of other sizes than the detector; it belongs to another model"
        )
    return order


def _put_background_first(weights: OfficialWeights):
    num_objects = len(weights["labels.objects.bias"])
    num_deltas = len(weights["labels.box_deltas.bias"])
    if num_deltas == 4 * num_objects:
        return
    if num_deltas != 4 * (num_objects - 1):
        raise ValueError(
            f"the checkpoint has {num_deltas} box deltas for {num_objects} classes, which is not four of "
            "each; it belongs to another detector"
        )
    for part in ("weight", "bias"):
        deltas = weights[f"labels.box_deltas.{part}"]
        weights[f"labels.box_deltas.{part}"] = torch.cat([torch.zeros_like(deltas[:4]), deltas])
        for classes in ("labels.objects", "labels.attributes"):
            weights[f"{classes}.{part}"] = weights[f"{classes}.{part}"].roll(1, dims=0)
    weights["labels.object_embeddings.weight"] = weights["labels.object_embeddings.weight"].roll(1, dims=0)


def _read_config(weights: OfficialWeights) -> BUTDConfig:
    stages = ("trunk.res2.", "trunk.res3.", "trunk.res4.", "res5.")
    return BUTDConfig(
        stem_size=len(weights["trunk.stem.0.weight"]),
        hidden_sizes=[len(weights[f"{stage}0.conv3.0.weight"]) for stage in stages],
        depths=[count_layers(weights, stage) for stage in stages],
        rpn_hidden_size=len(weights["rpn.conv.weight"]),
        num_objects=len(weights["labels.objects.weight"]) - 1,
        num_attributes=len(weights["labels.attributes.weight"]) - 1,
        object_embedding_size=weights["labels.object_embeddings.weight"].shape[1],
        attribute_hidden_size=len(weights["labels.attribute_hidden.weight"]),
    )
