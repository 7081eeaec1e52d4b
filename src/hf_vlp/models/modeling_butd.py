"""The bottom-up-attention detector (Anderson et al., CVPR 2018, arXiv 1707.07998), which LXMERT looks
through.

Faster R-CNN whose fifth stage runs on each proposal, with a head for attributes. It is made to extract: its
regions are proposals as they are, unrefined, and its batch normalisation never learns. P: proposals, R:
regions chosen from them, F: width of a feature.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, roi_pool
from transformers import initialization as init

from .base import VLPPreTrainedModel
from .configuration_butd import BUTDConfig
from .image_processing_butd import BUTDImageProcessor
from .proposals import (
    apply_deltas,
    best_surviving_scores,
    choose_regions,
    clip,
    make_anchors,
    suppress,
    tile_anchors,
)
from .regions import Regions, stack_regions

_STRIDE = 16  # pixels from one cell of C4 to the next
_PROPOSALS_AT_ONCE = 64  # through C5, whose maps are large; the result is the same


def _convolution(in_size: int, size: int, kernel: int, stride: int = 1, dilation: int = 1, relu: bool = True):
    return Conv2dNormActivation(
        in_size,
        size,
        kernel,
        stride,
        norm_layer=FrozenBatchNorm2d,
        activation_layer=nn.ReLU if relu else None,
        dilation=dilation,
    )


class Bottleneck(nn.Module):
    """A residual block that strides in its first convolution, as the first ResNets did."""

    def __init__(self, in_size: int, size: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = _convolution(in_size, size // 4, 1, stride)
        self.conv2 = _convolution(size // 4, size // 4, 3, dilation=dilation)
        self.conv3 = _convolution(size // 4, size, 1, relu=False)
        self.shortcut = nn.Identity()
        if in_size != size or stride > 1:
            self.shortcut = _convolution(in_size, size, 1, stride, relu=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.conv3(self.conv2(self.conv1(hidden))) + self.shortcut(hidden)).relu()


def _stage(in_size: int, size: int, depth: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    first = Bottleneck(in_size, size, stride, dilation)
    return nn.Sequential(first, *(Bottleneck(size, size, 1, dilation) for _ in range(depth - 1)))


class ProposalNetwork(nn.Module):
    """For every anchor of every cell: the logits of background and object, and how to move the anchor."""

    def __init__(self, config: BUTDConfig, in_size: int):
        super().__init__()
        num_anchors = len(config.anchor_ratios) * len(config.anchor_scales)
        self.conv = nn.Conv2d(in_size, config.rpn_hidden_size, 3, padding=1)
        # the background of all anchors comes first
        self.objectness = nn.Conv2d(config.rpn_hidden_size, 2 * num_anchors, 1)
        self.deltas = nn.Conv2d(config.rpn_hidden_size, 4 * num_anchors, 1)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Of a map (1, C, h, w), probabilities of an object (h * w * A,) and deltas (h * w * A, 4)."""
        hidden = self.conv(feature_map).relu()
        logits = self.objectness(hidden)[0].unflatten(0, (2, -1)).float()  # (2, A, h, w)
        objectness = logits.softmax(dim=0)[1].permute(1, 2, 0).flatten()
        return objectness, self.deltas(hidden)[0].permute(1, 2, 0).reshape(-1, 4).float()


class LabelHead(nn.Module):
    """Objects and attributes of proposals; class 0 is "background" and "none".

    `box_deltas` would refine the proposals for each class. The features were made without, but the detector
    is not whole without it.
    """

    def __init__(self, config: BUTDConfig):
        super().__init__()
        in_size, num_objects = config.hidden_sizes[-1], config.num_objects + 1
        self.objects = nn.Linear(in_size, num_objects)
        self.box_deltas = nn.Linear(in_size, 4 * num_objects)
        self.object_embeddings = nn.Embedding(num_objects, config.object_embedding_size)
        self.attribute_hidden = nn.Linear(
            in_size + config.object_embedding_size, config.attribute_hidden_size
        )
        self.attributes = nn.Linear(config.attribute_hidden_size, config.num_attributes + 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of features (P, F), probabilities of objects and of attributes, (P, 1 + classes) each."""
        objects = self.objects(features)
        embeds = torch.cat([features, self.object_embeddings(objects.argmax(dim=1))], dim=1)
        attributes = self.attributes(self.attribute_hidden(embeds).relu())
        return objects.float().softmax(dim=1), attributes.float().softmax(dim=1)


class BUTDDetector(VLPPreTrainedModel):
    """Regions of images as LXMERT, and much of vision and language of its years, was trained on.

    An extractor of regions (`extract`): with converted weights its features are those of the released files.
    `forward` is the same in training mode, and has no loss: the detector is for extraction.
    """

    config_class = BUTDConfig
    input_modalities = ("image",)
    supports_gradient_checkpointing = False
    _no_split_modules = ["Bottleneck", "ProposalNetwork", "LabelHead"]
    fits_released_weights = True

    def __init__(self, config: BUTDConfig):
        super().__init__(config)
        stem, (c2, c3, c4, c5), depths = config.stem_size, config.hidden_sizes, config.depths
        self.trunk = nn.Sequential(
            OrderedDict(
                stem=_convolution(3, stem, 7, stride=2),
                pool=nn.MaxPool2d(3, stride=2, ceil_mode=True),
                res2=_stage(stem, c2, depths[0]),
                res3=_stage(c2, c3, depths[1], stride=2),
                res4=_stage(c3, c4, depths[2], stride=2),
            )
        )
        self.rpn = ProposalNetwork(config, c4)
        self.res5 = _stage(c4, c5, depths[3], dilation=2)
        self.labels = LabelHead(config)
        self.image_processor = BUTDImageProcessor(
            size={"shortest_edge": config.shortest_edge, "longest_edge": config.longest_edge},
            image_mean=config.image_mean,
        )
        self.post_init()

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.config.hidden_sizes[-1]

    @property
    def spec(self) -> str | None:
        """What `load_extractor` takes for it: where it was loaded from, None if it was not."""
        return self.name_or_path or None

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> Regions:
        """Regions of images of any size, which go through the detector one by one; on the CPU.

        Raises:
            ValueError: no images, or one in which there is no proposal, as `forward`.
        """
        rows = []
        for image in images:
            inputs = self.image_processor(image, return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.device, self.dtype)
            rows.append(self(pixels, inputs["scale"], inputs["image_size"]).row(0))
        return stack_regions([{name: value.cpu() for name, value in row.items()} for row in rows])

    def forward(self, pixel_values: Tensor, scale: Tensor, image_size: Tensor) -> Regions:
        """The regions of one image, as `BUTDImageProcessor` gives it.

        Args:
            pixel_values: (1, 3, H, W).
            scale: (1,), by which the image was scaled to H and W.
            image_size: (1, 2), height and width before.

        Returns:
            Regions with ids and scores, B = 1. Scores are those of the best class other than "background" and
            "none", which have their share of the probability.

        Raises:
            ValueError: several images, or no proposal is as large as it has to be.
        """
        _check_one(pixel_values)
        scale = float(scale)
        feature_map = self.trunk(pixel_values)  # (1, C, h, w)
        proposals = self.propose(feature_map, scale, pixel_values.shape[-2:])
        features = self.pool(feature_map, proposals)
        objects, attributes = self.labels(features)
        boxes = proposals / scale
        scores = best_surviving_scores(boxes, objects[:, 1:], self.config.nms_threshold)
        chosen = choose_regions(scores, self.config.num_regions, self.config.score_threshold)
        height, width = image_size[0].tolist()
        object_scores, object_ids = objects[chosen, 1:].max(dim=1)
        attribute_scores, attribute_ids = attributes[chosen, 1:].max(dim=1)
        return Regions(
            features=features[None, chosen],
            boxes=(boxes[chosen] / boxes.new_tensor([width, height] * 2))[None],
            mask=torch.ones_like(chosen, dtype=torch.bool)[None],
            object_ids=object_ids[None],
            object_scores=object_scores[None],
            attribute_ids=attribute_ids[None],
            attribute_scores=attribute_scores[None],
            image_sizes=image_size,
        )

    @torch.no_grad()
    def propose(self, feature_map: Tensor, scale: float, size: Sequence[int]) -> Tensor:
        """Proposals (P, 4) in a map (1, C, h, w), best first, in pixels of the scaled image of `size`."""
        config = self.config
        anchors = make_anchors(config.anchor_base_size, config.anchor_ratios, config.anchor_scales)
        anchors = tile_anchors(anchors.to(feature_map.device), *feature_map.shape[-2:], _STRIDE)
        objectness, deltas = self.rpn(feature_map)
        boxes = clip(apply_deltas(anchors, deltas), *size)
        smallest = config.min_proposal_size * scale
        large = ((boxes[:, 2:] - boxes[:, :2] + 1) >= smallest).all(dim=1)
        if not large.any():
            raise ValueError(
                f"image has no proposal with sides of {config.min_proposal_size} pixels; give one that is "
                "larger"
            )
        objectness, order = objectness[large].sort(descending=True, stable=True)
        boxes = boxes[large][order][: config.num_candidates]
        kept = suppress(boxes, objectness[: config.num_candidates], config.proposal_nms_threshold)
        return boxes[kept[: config.num_proposals]]

    def pool(self, feature_map: Tensor, proposals: Tensor) -> Tensor:
        """Features (P, F) of proposals (P, 4) of the scaled image: C5 of each, averaged."""
        coarse = feature_map.float()  # coordinates are not exact in half precision
        features = []
        for boxes in proposals.split(_PROPOSALS_AT_ONCE):
            cells = roi_pool(coarse, [boxes], self.config.roi_size, 1 / _STRIDE)  # (P, C, roi_size, roi_size)
            features.append(self.res5(cells.to(feature_map.dtype)).mean(dim=(2, 3)))
        return torch.cat(features)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, FrozenBatchNorm2d):
            for name, value in module.named_buffers():
                init.constant_(value, float(name in ("weight", "running_var")))


def _check_one(pixel_values: Tensor):
    if pixel_values.ndim != 4 or len(pixel_values) != 1:
        raise ValueError(
            f"pixel_values is {tuple(pixel_values.shape)}; give one image (1, 3, H, W), the detector reads "
            "no padded batch"
        )
