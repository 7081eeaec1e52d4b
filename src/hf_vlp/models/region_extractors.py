"""What finds regions in images: object detectors, grids of cells, and boxes given beforehand.

Models run in evaluation mode, without gradients, on the device they are on; regions come back on the CPU.
None but the bottom-up-attention detector gives features that the released LXMERT weights know.

B: images, R: regions of an image, F: width of a feature, C: channels of a map.
"""

import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, box_convert, roi_align
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
)

from .backbones import ImageTrunk, trunk_image_size
from .configuration_butd import BUTDConfig
from .crops import cell_means, clip_to_image, crop_features
from .image_processing_squash import SquashImageProcessor
from .modeling_butd import BUTDDetector
from .regions import RegionExtractor, Regions, stack_regions

NUM_REGIONS = 36  # of an image, as the released LXMERT weights were trained with
GRID = 6  # cells along each side, which are as many regions
_SAMPLES = 14  # along each side of a region: 7 x 7 bins with 2 x 2 points each, averaged


def load_extractor(spec: str) -> RegionExtractor:
    """The extractor that `spec` names; what an extractor has as `spec` gives an equal one.

    - "NAME": a detector in a folder or on the Hub, the bottom-up-attention detector or one that transformers
      knows (DETR, Deformable DETR, RT-DETR, ...)
    - "torchvision:NAME": a detector of torchvision, such as "torchvision:fasterrcnn_resnet50_fpn_v2"
    - "grid:NAME": cells of the map of a vision model in a folder or on the Hub

    A number after "#", as in "NAME#20", says how many regions an image has at most (36 without), of a grid
    how many cells along each side (6 without). The bottom-up-attention detector has its number in its config.

    Raises:
        ValueError: a name of no such model.
        OSError: nothing can be read there.
    """
    if not spec:
        raise ValueError("spec is empty; give the folder or the name of a model")
    kind, name, number = re.fullmatch(r"(grid:|torchvision:|)(.+?)(?:#(\d+))?", spec, re.DOTALL).groups()
    sizes = () if number is None else (int(number),)
    if kind:
        return {"grid:": GridRegions, "torchvision:": TorchvisionRegions}[kind](name, *sizes)
    if PreTrainedConfig.get_config_dict(name)[0].get("model_type") != BUTDConfig.model_type:
        return DetectorRegions(name, *sizes)
    if sizes:
        raise ValueError(
            f"spec is {spec}, but {name} has its num_regions in its config; change it there, and leave "
            f"#{number} out"
        )
    return BUTDDetector.from_pretrained(name).eval()


class ModelRegions(ABC):
    """Regions that a model finds.

    `spec` is what `load_extractor` takes for it, None where the model is in no folder and has no name.
    """

    fits_released_weights = False

    def __init__(self, model: nn.Module, feature_dim: int, spec: str | None):
        self.model = model.eval()
        self.feature_dim = feature_dim
        self.spec = spec

    def to(self, device: torch.device | str) -> "ModelRegions":
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> Regions:
        """Regions of images of any size, as one batch for the model.

        Raises:
            ValueError: no images.
        """
        if not len(images):
            raise ValueError("images is empty; give at least one")
        rows = self.find([image.convert("RGB") for image in images])
        return stack_regions(
            [
                {name: value.cpu() for name, value in row.items()}
                | {"image_size": (image.height, image.width)}
                for row, image in zip(rows, images, strict=True)
            ]
        )

    @abstractmethod
    def find(self, images: list[Image.Image]) -> list[dict[str, Tensor]]:
        """Region rows without image sizes, of at least one image in RGB."""


class DetectorRegions(ModelRegions):
    """The regions where a detector of transformers is surest that there is an object.

    A feature is the mean of the last map of the detector's trunk inside the predicted box (RoIAlign): F is
    2048 with ResNet-50. Object ids are the detector's classes.

    Args:
        model: a detector of the DETR family with a trunk that gives maps, its folder or its name on the Hub;
            its image processor is read from the same place.
        num_regions: of an image; fewer where the detector has fewer queries.

    Raises:
        ValueError: a model of another kind, or one that was never saved.
    """

    def __init__(self, model: PreTrainedModel | str, num_regions: int = NUM_REGIONS):
        _check_positive("num_regions", num_regions)
        if isinstance(model, str):
            model = _load_detector(model)
        backbone = getattr(getattr(model, "model", model), "backbone", None)
        self.trunk = getattr(backbone, "conv_encoder", backbone)  # DAB-DETR wraps it once more
        if self.trunk is None:
            raise ValueError(
                f"model is a {type(model).__name__}, whose trunk gives no map; use one with a backbone, such "
                "as DETR or RT-DETR"
            )
        self.image_processor = _image_processor(model)
        self.num_regions = num_regions
        has_stages = hasattr(self.trunk, "intermediate_channel_sizes")
        width = self.trunk.intermediate_channel_sizes[-1] if has_stages else model.config.d_model
        super().__init__(model, width, _spec("", model.name_or_path, num_regions, NUM_REGIONS))

    def find(self, images: list[Image.Image]) -> list[dict[str, Tensor]]:
        inputs = self.image_processor(images, return_tensors="pt").to(self.model.device, self.model.dtype)
        inputs = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
        with _outputs_of(self.trunk) as outputs:
            found = self.model(**inputs)
        scores, ids, objectness = _class_scores(found.logits.float(), self.model.config.num_labels)
        chosen = objectness.topk(min(self.num_regions, objectness.shape[1])).indices  # (B, R)
        boxes = box_convert(found.pred_boxes.float(), "cxcywh", "xyxy").clamp(0, 1)
        boxes = boxes.take_along_dim(chosen[:, :, None], dim=1)
        features = _pool(_last_map(outputs[0]), boxes, **inputs)
        scores, ids = scores.gather(1, chosen), ids.gather(1, chosen)
        return [
            {"features": features[i], "boxes": boxes[i], "object_ids": ids[i], "object_scores": scores[i]}
            for i in range(len(images))
        ]


def _load_detector(name: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name)
    if type(config) not in AutoModelForObjectDetection._model_mapping:
        raise ValueError(
            f"{name} is a model of type {config.model_type}, which is no detector; give a detector, or "
            f"grid:{name} for the cells of a vision model"
        )
    return AutoModelForObjectDetection.from_pretrained(name, config=config)


def _image_processor(model: PreTrainedModel) -> Any:
    if not model.name_or_path:
        raise ValueError(
            f"model is a {type(model).__name__} without a folder; save it together with its image processor, "
            "and give the folder"
        )
    return AutoImageProcessor.from_pretrained(model.name_or_path)


def _class_scores(logits: Tensor, num_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score and id of the likeliest class, and how surely there is an object at all: (B, Q) each."""
    if logits.shape[-1] > num_labels:  # the last class is "no object"
        probabilities = logits.softmax(dim=-1)[..., :-1]
        objectness = probabilities.sum(dim=-1)
    else:
        probabilities = logits.sigmoid()
        objectness = probabilities.amax(dim=-1)
    scores, ids = probabilities.max(dim=-1)
    return scores, ids, objectness


def _last_map(output: Any) -> Tensor:
    """The last map (B, C, H, W) of a trunk: of [(map, mask), ...], or of (map, mask)."""
    feature_map, _ = output[-1] if isinstance(output, list) else output
    return feature_map.float()


def _pool(
    feature_map: Tensor, boxes: Tensor, pixel_values: Tensor, pixel_mask: Tensor | None = None
) -> list[Tensor]:
    """Means of the map (B, C, h, w) of images inside boxes (B, R, 4) in 0..1: (R, C) for each image.

    Images (B, 3, H, W) may be padded on the right and below, which `pixel_mask` (B, H, W) tells.
    """
    height, width = feature_map.shape[-2:]
    down, across = _stride(pixel_values.shape[-2], height), _stride(pixel_values.shape[-1], width)
    if pixel_mask is None:
        pixel_mask = torch.ones_like(pixel_values[:, 0])
    features = []
    for i, mask in enumerate(pixel_mask.bool()):
        rows, columns = int(mask.any(dim=1).sum()) / down, int(mask.any(dim=0).sum()) / across
        cells = feature_map[i : i + 1, :, : math.ceil(rows), : math.ceil(columns)]  # without those of padding
        places = boxes[i] * boxes.new_tensor([columns, rows, columns, rows])
        pooled = roi_align(cells, [places], output_size=1, sampling_ratio=_SAMPLES, aligned=True)
        features.append(pooled.flatten(1))
    return features


def _stride(pixels: int, cells: int) -> float:
    """Pixels of a cell: a power of two, the last cell being filled in part, or else the quotient."""
    stride = 2 ** math.ceil(math.log2(pixels / cells))
    return stride if math.ceil(pixels / stride) == cells else pixels / cells


class TorchvisionRegions(ModelRegions):
    """What a detector of torchvision finds; the whole image where it finds nothing.

    A feature of a two-stage detector (Faster, Mask, Keypoint R-CNN) is what its box head makes of the region
    (F is 1024), of RetinaNet and FCOS the mean of the level of the pyramid that suits the box (256). Object
    ids are the detector's classes, where 0 is the background.

    Args:
        model: a detector, or its name in `torchvision.models`, which is loaded with its best weights.
        num_regions: of an image at most; those of the highest scores.

    Raises:
        ValueError: a model of another kind, such as SSD, whose levels differ in width.
    """

    def __init__(self, model: nn.Module | str, num_regions: int = NUM_REGIONS):
        _check_positive("num_regions", num_regions)
        name = model if isinstance(model, str) else None
        if name is not None:
            model = torchvision.models.get_model(name, weights="DEFAULT")
        if not hasattr(model, "transform") or not hasattr(model.backbone, "out_channels"):
            raise ValueError(
                f"model is a {type(model).__name__}; give an R-CNN, RetinaNet or FCOS of torchvision"
            )
        self.num_regions = num_regions
        self.heads = getattr(model, "roi_heads", None)
        width = model.backbone.out_channels
        if self.heads is not None:
            width = self.heads.box_predictor.cls_score.in_features
        super().__init__(model, width, _spec("torchvision:", name, num_regions, NUM_REGIONS))

    def find(self, images: list[Image.Image]) -> list[dict[str, Tensor]]:
        device = next(self.model.parameters()).device
        pixels = [pil_to_tensor(image).to(device) / 255 for image in images]
        with _outputs_of(self.model.transform, self.model.backbone) as outputs:
            found = self.model(pixels)
        (resized, _), maps = outputs
        rows = [self._row(one, image) for one, image in zip(found, images, strict=True)]
        boxes = [
            row["boxes"] * row["boxes"].new_tensor([width, height, width, height])
            for row, (height, width) in zip(rows, resized.image_sizes, strict=True)
        ]
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        features = self._features(maps, boxes, resized.image_sizes).split([len(one) for one in boxes])
        return [{**row, "features": one} for row, one in zip(rows, features, strict=True)]

    def _row(self, found: dict[str, Tensor], image: Image.Image) -> dict[str, Tensor]:
        """The best detections, boxes in 0..1."""
        boxes, ids, scores = (found[name][: self.num_regions] for name in ("boxes", "labels", "scores"))
        if not len(boxes):
            boxes = boxes.new_tensor([[0, 0, image.width, image.height]])
            ids, scores = ids.new_zeros(1), scores.new_zeros(1)
        boxes = boxes / boxes.new_tensor([image.width, image.height] * 2)
        return {"boxes": boxes.clamp(0, 1), "object_ids": ids, "object_scores": scores}

    def _features(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple]) -> Tensor:
        """Features of boxes (R, 4) in the pixels of images of `sizes`: those of all images, (sum of R, F)."""
        if self.heads is not None:
            return self.heads.box_head(self.heads.box_roi_pool(maps, boxes, sizes))
        pool = MultiScaleRoIAlign(list(maps), output_size=1, sampling_ratio=_SAMPLES)
        return pool(maps, boxes, sizes).flatten(1)


class GridRegions(ModelRegions):
    """The cells of a grid over the image, each with the mean of a vision model's map inside it.

    F is the width of the model. Images are squashed to the square that the model reads.

    Args:
        trunk: a vision model of transformers (or of timm, through it), its folder or its name on the Hub; its
            image processor is read from the same place. Of a model of images and texts, such as CLIP, the
            vision model is taken.
        grid: cells along each side.

    Raises:
        ValueError: a model of another kind, or one that was never saved.
    """

    def __init__(self, trunk: PreTrainedModel | str, grid: int = GRID):
        _check_positive("grid", grid)
        if isinstance(trunk, str):
            trunk = AutoModel.from_pretrained(trunk)
        name, image_processor = trunk.name_or_path, _image_processor(trunk)
        trunk = trunk.vision_model if "vision_config" in trunk.config else trunk
        with torch.device("meta"):
            model = ImageTrunk(trunk.config)
        model.trunk = trunk
        self.image_processor = _squashing(image_processor, trunk_image_size(trunk.config))
        self.grid = grid
        super().__init__(model, model.width, _spec("grid:", name, grid, GRID))

    def find(self, images: list[Image.Image]) -> list[dict[str, Tensor]]:
        parameter = next(self.model.parameters())
        inputs = self.image_processor(images, return_tensors="pt").to(parameter.device, parameter.dtype)
        patches = self.model(inputs["pixel_values"])[:, 1:].float()  # (B, side * side, F)
        side = math.isqrt(patches.shape[1])
        whole = torch.tensor([[0.0, 0, side, side]])
        cells = [cell_means(one.unflatten(0, (side, side)), whole, self.grid)[0] for one in patches]
        return [{"features": one.flatten(0, 1), "boxes": _cell_boxes(self.grid)} for one in cells]


def _squashing(image_processor: Any, size: int | None) -> SquashImageProcessor:
    """One that normalises as `image_processor` does, but keeps the whole image: to `size`, or to its own."""
    known = getattr(image_processor, "data_config", None)  # timm's
    if known is not None:
        mean, std, sides = known["mean"], known["std"], known["input_size"][1:]
    else:
        mean, std, sides = image_processor.image_mean, image_processor.image_std, image_processor.size
        sides = [sides.get("height") or sides["shortest_edge"]]
    size = size or sides[0]
    return SquashImageProcessor(
        size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std)
    )


def _cell_boxes(grid: int) -> Tensor:
    """The cells of the image in reading order, in 0..1: (grid^2, 4)."""
    edges = torch.arange(grid + 1) / grid
    top, left = torch.meshgrid(edges[:-1], edges[:-1], indexing="ij")
    bottom, right = torch.meshgrid(edges[1:], edges[1:], indexing="ij")
    return torch.stack([left, top, right, bottom], dim=-1).flatten(0, 1)


class CropRegions:
    """The colours of boxes that are known beforehand, such as those of drawn scenes.

    F is 3 * grid^2, see `crop_features`. Boxes are not found, so no `spec` names it.
    """

    fits_released_weights = False
    spec = None

    def __init__(self, grid: int = 4):
        _check_positive("grid", grid)
        self.grid = grid
        self.feature_dim = 3 * grid**2

    def extract(
        self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Sequence[float]] | np.ndarray]
    ) -> Regions:
        """Regions at `boxes`, for each image (R, 4) x, y, width, height in pixels.

        Raises:
            ValueError: an image without boxes, or a box that holds nothing of its image.
        """
        return stack_regions(
            [
                {
                    "features": crop_features(image, of_image, self.grid),
                    "boxes": clip_to_image(of_image, image) / torch.tensor([image.width, image.height] * 2),
                    "image_size": (image.height, image.width),
                }
                for image, of_image in zip(images, boxes, strict=True)
            ]
        )


@contextlib.contextmanager
def _outputs_of(*modules: nn.Module) -> Iterator[list[Any]]:
    """What the modules put out, in the order in which they run."""
    outputs: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _spec(kind: str, name: str | None, number: int, default: int) -> str | None:
    suffix = "" if number == default else f"#{number}"
    return f"{kind}{name}{suffix}" if name else None


def _check_positive(name: str, number: int):
    if number < 1:
        raise ValueError(f"{name} is {number}; give a number of at least 1")
