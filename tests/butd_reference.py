"""A tiny bottom-up-attention detector, and what it has to compute, written out box by box."""

import math

import numpy as np
import torch
from torch import Tensor

from hf_vlp.models.configuration_butd import BUTDConfig
from hf_vlp.models.modeling_butd import BUTDDetector


def tiny_butd_config(**fields) -> BUTDConfig:
    settings = {
        "shortest_edge": 120,
        "longest_edge": 200,
        "stem_size": 4,
        "hidden_sizes": [8, 12, 16, 24],
        "depths": [1, 2, 3, 2],
        "rpn_hidden_size": 6,
        "min_proposal_size": 4,
        "num_candidates": 300,
        "num_proposals": 80,
        "roi_size": 4,
        "num_objects": 9,
        "num_attributes": 5,
        "object_embedding_size": 3,
        "attribute_hidden_size": 7,
    }
    return BUTDConfig(**{**settings, **fields})


def tiny_butd(**fields) -> BUTDDetector:
    """With weights that make proposals, classes and statistics differ."""
    detector = BUTDDetector(tiny_butd_config(**fields)).eval()
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            scale = 3 if name.startswith("labels.") else 0.3
            value.copy_(
                torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value) * scale
            )
        detector.rpn.deltas.weight.mul_(0.1)
    return detector


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union where 0 to 15 is 16 wide, in single precision."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return float(np.float32(width * height / (sum(areas) - width * height)))


def ranked(scores: list[float]) -> list[int]:
    """Best first, of equal ones the first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """Which boxes stay, best first."""
    boxes, kept = boxes.tolist(), []
    for i in ranked(scores.tolist()):
        if all(overlap(boxes[i], boxes[j]) < threshold for j in kept):
            kept.append(i)
    return kept


def surviving_scores(boxes: Tensor, scores: Tensor, threshold: float) -> list[float]:
    best = [0.0] * len(boxes)
    for of_class in scores.T:
        for i in suppressed(boxes, of_class, threshold):
            best[i] = max(best[i], of_class[i].item())
    return best


def proposals(detector: BUTDDetector, feature_map: Tensor, scale: float, height: int, width: int) -> Tensor:
    """What the proposal network proposes, cell by cell and anchor by anchor."""
    config = detector.config
    hidden = detector.rpn.conv(feature_map).relu()
    logits, deltas = detector.rpn.objectness(hidden)[0], detector.rpn.deltas(hidden)[0]
    anchors = [(r, s) for r in config.anchor_ratios for s in config.anchor_scales]
    boxes, scores = [], []
    for y in range(feature_map.shape[2]):
        for x in range(feature_map.shape[3]):
            for a, (ratio, anchor_scale) in enumerate(anchors):
                w = round(math.sqrt(config.anchor_base_size**2 / ratio))
                h = round(w * ratio) * anchor_scale
                w *= anchor_scale
                dx, dy, dw, dh = deltas[4 * a : 4 * a + 4, y, x].tolist()
                # the anchor is x1 = 7.5 - (w - 1) / 2 to x2 = x1 + w - 1, and its centre is x1 + w / 2
                cx = 16 * x + 7.5 - (w - 1) / 2 + w / 2 + dx * w
                cy = 16 * y + 7.5 - (h - 1) / 2 + h / 2 + dy * h
                w, h = w * math.exp(dw), h * math.exp(dh)
                xs = [min(max(v, 0), width - 1) for v in (cx - w / 2, cx + w / 2)]
                ys = [min(max(v, 0), height - 1) for v in (cy - h / 2, cy + h / 2)]
                if min(xs[1] - xs[0], ys[1] - ys[0]) + 1 >= config.min_proposal_size * scale:
                    boxes.append([xs[0], ys[0], xs[1], ys[1]])
                    background, thing = logits[a, y, x].item(), logits[len(anchors) + a, y, x].item()
                    scores.append(1 / (1 + math.exp(background - thing)))
    best = ranked(scores)[: config.num_candidates]
    boxes, scores = torch.tensor(boxes)[best], torch.tensor(scores)[best]
    return boxes[suppressed(boxes, scores, config.proposal_nms_threshold)[: config.num_proposals]]


def pooled(feature_map: Tensor, box: list[float], size: int) -> Tensor:
    """Largest values of a map (C, h, w) in size x size bins of a box, as Caffe takes them."""
    height, width = feature_map.shape[1:]
    # halves are rounded up
    x1, y1, x2, y2 = (math.floor(value / 16 + 0.5) for value in box)
    bins = torch.zeros(len(feature_map), size, size)
    for i in range(size):
        for j in range(size):
            bin_height, bin_width = max(y2 - y1 + 1, 1) / size, max(x2 - x1 + 1, 1) / size
            rows = [y1 + math.floor(i * bin_height), y1 + math.ceil((i + 1) * bin_height)]
            columns = [x1 + math.floor(j * bin_width), x1 + math.ceil((j + 1) * bin_width)]
            top, bottom = (min(max(value, 0), height) for value in rows)
            left, right = (min(max(value, 0), width) for value in columns)
            if bottom > top and right > left:
                bins[:, i, j] = feature_map[:, top:bottom, left:right].amax(dim=(1, 2))
    return bins


def resized(image: Tensor, scale: float) -> Tensor:
    """A map (H, W) at scale: each pixel between the four around the place it comes from."""
    height, width = image.shape
    result = torch.zeros(round(scale * height), round(scale * width))
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            y, x = (i + 0.5) / scale - 0.5, (j + 0.5) / scale - 0.5
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            below = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            result[i, j] = above * (1 - (y - top)) + below * (y - top)
    return result
