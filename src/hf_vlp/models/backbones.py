"""Image trunks: any transformers vision model, and timm's through TimmWrapper, with one token layout.

B: images, N: patches, S = 1 + N tokens, W: width of the trunk, w: window side of a Swin trunk. Images are
square.
"""

import copy
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig


class ImageTrunk(nn.Module):
    """A vision model whose tokens come as `[global; patches]`.

    The global token is the trunk's own [CLS], or the mean of the patches (X-VLM section 3).
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config)
        self.width = trunk_width(self.trunk)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images (B, 3, size, size) of the size the trunk was built for: (B, 1 + N, W)."""
        self._check_size(pixel_values)
        tokens = self.trunk(pixel_values).last_hidden_state
        if tokens.ndim == 4:  # a map: (B, height, width, W), or (B, W, height, width)
            tokens = tokens.flatten(1, 2) if tokens.shape[-1] == self.width else tokens.flatten(2).mT
        # patches fill a square; [CLS] and its like come before them
        num_patches = math.isqrt(tokens.shape[1]) ** 2
        patches = tokens[:, tokens.shape[1] - num_patches :]
        has_cls = tokens.shape[1] > num_patches
        global_token = tokens[:, :1] if has_cls else patches.mean(dim=1, keepdim=True)
        return torch.cat([global_token, patches], dim=1)

    def _check_size(self, pixel_values: Tensor):
        size = trunk_image_size(self.config)
        if size is not None and tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, but the image trunk reads {size} x {size} "
                f"pixels; resize "
                "the images with the model's processor, or give the model another size with set_image_size()"
            )


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
