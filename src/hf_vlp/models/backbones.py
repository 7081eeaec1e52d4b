"""Image trunks: any transformers vision model, and timm's through TimmWrapper, with one token layout.

B: images, R: regions, N: patches, S = 1 + N tokens, M: tokens of the largest region, W: width of the trunk,
w: window side of a Swin trunk. Images are square.
"""

import copy
import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from .checks import check_regions

LOCAL_ATTENTION = ("vit", "deit", "clip_vision_model")  # trunks whose last layers can attend within regions


class RegionTokens(NamedTuple):
    """What regions are made of, after one pass over the images.

    - image_index (R,): the image of each region
    - tokens (R, M, W): tokens of its own, the global one first; `mask` (R, M) tells them from padding
    - patch_mask (R, N): patches of the image that join them, None where its own tokens are all there is
    """

    image_index: Tensor
    tokens: Tensor
    mask: Tensor
    patch_mask: Tensor | None


class ImageTrunk(nn.Module):
    """A vision model whose tokens come as `[global; patches]`.

    The global token is the trunk's own [CLS], or the mean of the patches (X-VLM section 3).
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config)
        self.width = trunk_width(self.trunk)
        self.is_clip = config.model_type == "clip_vision_model"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images (B, 3, size, size) of the size the trunk was built for: (B, 1 + N, W)."""
        self._check_size(pixel_values)
        tokens = self.trunk(pixel_values).last_hidden_state
        if self.is_clip:
            tokens = self.trunk.post_layernorm(tokens)  # transformers does so with [CLS] only
        if tokens.ndim == 4:  # a map: (B, height, width, W), or (B, W, height, width)
            tokens = tokens.flatten(1, 2) if tokens.shape[-1] == self.width else tokens.flatten(2).mT
        # patches fill a square; [CLS] and its like come before them
        num_patches = math.isqrt(tokens.shape[1]) ** 2
        patches = tokens[:, tokens.shape[1] - num_patches :]
        has_cls = tokens.shape[1] > num_patches
        global_token = tokens[:, :1] if has_cls else patches.mean(dim=1, keepdim=True)
        return torch.cat([global_token, patches], dim=1)

    def encode_regions(
        self, pixel_values: Tensor, image_index: Tensor, patch_mask: Tensor, local_depth: int = 0
    ) -> tuple[Tensor, RegionTokens]:
        """Encode images (B, 3, size, size) once: (B, 1 + N, W), and what regions of them are made of.

        `image_index` (R,) tells the image of each region and `patch_mask` (R, N) the patches it covers. The
        global token of a region is their mean. With `local_depth`, a region parts from its image before the
        last `local_depth` layers, where it is [CLS] and its patches, which see nothing else. X-VLM section 3,
        the latter by the specification of the official code.

        Raises:
            ValueError: the masks do not fit the patches, or the regions name more images than there are.
        """
        if local_depth:
            return self._encode_locally(pixel_values, image_index, patch_mask, local_depth)
        images = self(pixel_values)
        check_regions(images, image_index, patch_mask)
        weights = patch_mask.to(images.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        means = torch.einsum("rn,rnw->rw", weights, images[image_index, 1:]).to(images.dtype)[:, None]
        mask = torch.ones_like(image_index, dtype=torch.bool)[:, None]
        return images, RegionTokens(image_index, means, mask, patch_mask)

    def _encode_locally(
        self, pixel_values: Tensor, image_index: Tensor, patch_mask: Tensor, depth: int
    ) -> tuple[Tensor, RegionTokens]:
        self._check_size(pixel_values)
        images, (layers, norm) = self._embed(pixel_values), self._layers_and_norm()
        prefix = images.shape[1] - math.isqrt(images.shape[1]) ** 2  # [CLS], and DeiT's distillation token
        check_regions(images[:, prefix - 1 :], image_index, patch_mask)
        for layer in layers[:-depth]:
            images = layer(images, None)
        slots, mask = _pack(F.pad(patch_mask.bool(), (prefix, 0), value=True))
        regions = self._attend_within(layers[-depth:], images[image_index[:, None], slots], mask)
        for layer in layers[-depth:]:
            images = layer(images, None)
        images, regions = (_without_prefix(norm(states), prefix) for states in (images, regions))
        return images, RegionTokens(image_index, regions, mask[:, prefix - 1 :], None)

    def _attend_within(self, layers: nn.ModuleList, regions: Tensor, mask: Tensor) -> Tensor:
        """Regions (R, M, W) through layers in which they see the tokens of `mask` (R, M) only.

        Many of them pass in four groups from small to large, so that small ones are padded less.
        """
        if not len(regions):
            return regions
        counts = mask.sum(dim=1)
        groups = counts.argsort().chunk(4 if len(regions) >= 32 else 1)
        longest = counts[torch.stack([rows[-1] for rows in groups])].tolist()
        done = torch.zeros_like(regions)
        for rows, length in zip(groups, longest, strict=True):
            states, keys = regions[rows, :length], mask[rows, :length]
            keys = create_bidirectional_mask(self.trunk.config, inputs_embeds=states, attention_mask=keys)
            for layer in layers:
                states = layer(states, keys)
            done[rows, :length] = states.to(done.dtype)
        return done

    def _embed(self, pixel_values: Tensor) -> Tensor:
        states = self.trunk.embeddings(pixel_values.to(self.trunk.dtype))
        return self.trunk.pre_layrnorm(states) if self.is_clip else states

    def _layers_and_norm(self) -> tuple[nn.ModuleList, nn.LayerNorm]:
        if self.is_clip:
            return self.trunk.encoder.layers, self.trunk.post_layernorm
        return self.trunk.layers, self.trunk.layernorm

    def _check_size(self, pixel_values: Tensor):
        size = trunk_image_size(self.config)
        if size is not None and tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, but the image trunk reads {size} x {size} "
                f"pixels; resize "
                "the images with the model's processor, or give the model another size with set_image_size()"
            )


def _pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of the tokens that `mask` (R, S) marks, in order, and which are no padding: both (R, M)."""
    counts = mask.sum(dim=1)
    longest = int(counts.max()) if len(counts) else 1
    slots = mask.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return slots, torch.arange(longest, device=mask.device) < counts[:, None]


def _without_prefix(states: Tensor, prefix: int) -> Tensor:
    return torch.cat([states[:, :1], states[:, prefix:]], dim=1)  # only [CLS] stays


def trunk_image_size(config: PreTrainedConfig) -> int | None:
    """Side in pixels of the images a trunk reads; None for trunks that read any size (CNNs)."""
    if config.model_type == "timm_wrapper":
        return (config.model_args or {}).get("img_size")
    size = getattr(config, "image_size", None)  # a vision config without the field has no position table
    return size[0] if isinstance(size, (list, tuple)) else size


def trunk_stride(config: PreTrainedConfig) -> int:
    """Side in pixels of the square that one token of a trunk stands for.

    Raises:
        ValueError: the config does not tell, as that of timm models and CNNs.
    """
    if "patch_size" not in config:
        raise ValueError(
            f"vision_config of type {config.model_type} does not tell its stride; give it as patch_size"
        )
    return config.patch_size * 2 ** (len(config.depths) - 1 if config.model_type == "swin" else 0)


def build_trunk(config: PreTrainedConfig) -> nn.Module:
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"vision_config is a {type(config).__name__}, for which transformers has no model; use the "
            "config of a vision model such as SwinConfig, ViTConfig or TimmWrapperConfig"
        )
    accepts_pooling = (
        "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    )
    trunk = AutoModel.from_config(config, **({"add_pooling_layer": False} if accepts_pooling else {}))
    if config.model_type == "swin":
        _shrink_windows(trunk)
    return trunk


def _shrink_windows(swin: nn.Module):
    """Give stages whose map is smaller than the window one window, as the official Swin does."""
    for stage, heads in zip(swin.encoder.layers, swin.config.num_heads, strict=True):
        for layer in stage.blocks:
            side, width = min(layer.input_resolution), layer.layernorm_before.normalized_shape[0]
            if side < layer.window_size:
                layer.attention = type(layer.attention)(swin.config, width, heads, side)


def trunk_width(trunk: nn.Module) -> int:
    if trunk.config.model_type == "timm_wrapper":
        return trunk.timm_model.num_features
    return trunk.config.hidden_sizes[-1] if "hidden_sizes" in trunk.config else trunk.config.hidden_size


# Another resolution


def resize_trunk(trunk: ImageTrunk, image_size: int) -> ImageTrunk:
    """The same trunk for images of `image_size` pixels a side, its position tables resampled.

    ViT tables are interpolated bicubically, Swin's relative tables by `resample_relative_table` with the
    window scaled like the image (7 at 224 pixels is 12 at 384 and 15 at 480). Specification of the official
    code: X-VLM, appendix.

    Raises:
        ValueError: the size does not divide into whole patches or windows, or the trunk has no known position
        tables.
    """
    if trunk_image_size(trunk.config) == image_size:
        return trunk
    config = _resized_config(trunk.config, image_size)
    resized = ImageTrunk(config)
    target = resized.state_dict()
    resized.load_state_dict(
        {name: _resample(name, value, target[name]) for name, value in trunk.state_dict().items()}
    )
    return resized


def _resized_config(config: PreTrainedConfig, image_size: int) -> PreTrainedConfig:
    old_size = trunk_image_size(config)
    if config.model_type == "timm_wrapper" or old_size is None:
        raise ValueError(
            f"image_size={image_size} asks to resample a {config.model_type} trunk, which is done for "
            "transformers' own vision models only; build the model with the wanted size instead"
        )
    resized = copy.deepcopy(config)
    resized.image_size, stride = image_size, trunk_stride(config)
    if config.model_type == "swin":
        resized.window_size, rest = divmod(config.window_size * image_size, old_size)
        if rest:
            raise ValueError(
                f"image_size={image_size} gives no whole window: the trunk has windows of "
                f"{config.window_size} at "
                f"{old_size} pixels; use a multiple of {old_size // math.gcd(config.window_size, old_size)}"
            )
    if image_size <= 0 or image_size % stride:
        raise ValueError(
            f"image_size={image_size} is no multiple of the trunk's patches of {stride} pixels; use one"
        )
    return resized


def _resample(name: str, value: Tensor, target: Tensor) -> Tensor:
    if value.shape == target.shape:
        return value
    if name.endswith("relative_position_bias_table"):
        return resample_relative_table(value, _side(target) // 2 + 1)
    if value.ndim == 2:  # CLIP's, the weight of an embedding
        return resample_position_embeddings(value[None], len(target))[0]
    return resample_position_embeddings(value, target.shape[1])


def _side(table: Tensor) -> int:
    return math.isqrt(len(table))


def resample_position_embeddings(table: Tensor, num_tokens: int) -> Tensor:
    """A ViT's table (1, prefix + N, W) resampled bicubically to (1, num_tokens, W), prefix kept."""
    old_grid, new_grid = math.isqrt(table.shape[1]), math.isqrt(num_tokens)
    prefix = table.shape[1] - old_grid**2
    patches = table[:, prefix:].mT.unflatten(2, (old_grid, old_grid))  # (1, W, grid, grid)
    patches = F.interpolate(patches.float(), size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], patches.flatten(2).mT.to(table.dtype)], dim=1)


def resample_relative_table(table: Tensor, window: int) -> Tensor:
    """Resample Swin's relative position biases ((2w-1)^2, heads) to another window: ((2*window-1)^2, heads).

    BEiT's recipe: the old offsets are spread on a geometric scale that spans the new ones, and a not-a-knot
    cubic spline is read at each new offset, first along rows, then along columns.
    """
    source, target = _side(table), 2 * window - 1
    if source == target:
        return table
    matrix = _spline_matrix(_geometric_offsets(source, target), torch.arange(target).double() - target // 2)
    matrix = matrix.to(table.device)
    grid = table.double().unflatten(0, (source, source))
    grid = torch.einsum("ar,bc,rch->abh", matrix, matrix, grid)
    return grid.flatten(0, 1).to(table.dtype)


def _geometric_offsets(source: int, target: int) -> Tensor:
    """0, ±1, ±(1 + q), ±(1 + q + q^2), ...; BEiT finds q by bisection, the last to reach target // 2."""

    def reach(q: float) -> float:
        return sum(q**i for i in range(source // 2))

    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        left, right = (left, q) if reach(q) > target // 2 else (q, right)
    steps = torch.tensor([q**i for i in range(source // 2)], dtype=torch.double).cumsum(0)
    return torch.cat([-steps.flip(0), torch.zeros(1).double(), steps])


def _spline_matrix(knots: Tensor, points: Tensor) -> Tensor:
    """Matrix (points, knots) that takes values at `knots` to their not-a-knot cubic spline at `points`."""
    n, h = len(knots), knots.diff()
    if n == 1:
        return torch.ones(len(points), 1, dtype=knots.dtype)
    values = torch.eye(n, dtype=knots.dtype)
    slopes = values.diff(dim=0) / h[:, None]
    system, right = torch.zeros_like(values), torch.zeros_like(values)  # of the second derivatives
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        right[i] = 6 * (slopes[i] - slopes[i - 1])
    if n == 3:  # one parabola
        system[0, 0], system[0, 1], system[-1, -2], system[-1, -1] = 1, -1, 1, -1
    else:  # third derivative continuous at the second knot and at the last but one
        system[0, :3] = torch.stack([h[1], -(h[0] + h[1]), h[0]])
        system[-1, -3:] = torch.stack([h[-1], -(h[-2] + h[-1]), h[-2]])
    curvature = torch.linalg.solve(system, right)
    left = torch.searchsorted(knots, points, right=True).sub(1).clamp(0, n - 2)  # the interval of each point
    step, width = (points - knots[left])[:, None], h[left][:, None]
    slope = slopes[left] - width * (2 * curvature[left] + curvature[left + 1]) / 6
    cubic = (curvature[left + 1] - curvature[left]) / (6 * width)
    return values[left] + slope * step + curvature[left] / 2 * step**2 + cubic * step**3
