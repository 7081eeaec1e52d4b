"""SOHO: seeing out of the box, end-to-end pre-training for vision-language representation (arXiv 2104.03135).

A CNN sees whole images. Each cell of its map is looked up in a visual dictionary that moves with the cells,
and words and cells pass one transformer.

B: images, R = B * S texts, those of an image next to one another, L: text length, C: width of the trunk's
map, N: cells of an image, D: hidden width, K: entries of the dictionary.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .backbones import build_trunk, trunk_width
from .base import VLPPreTrainedModel
from .checks import check_index
from .configuration_soho import SOHOConfig
from .distributed import num_processes
from .layers_bert import BertEmbeddings, BertLayer, key_mask
from .public_weights import load_public_weights, shared_fields


class VisualDictionary(nn.Module):
    """Entries that follow the cells that are nearest to them, by moving averages (section 3).

    `embeddings` (K, D) are the entries, `ema_sum` (K, D) and `ema_count` (K,) the averages that they are the
    ratio of, `usage` (K,) how many cells each was nearest to in all training.
    """

    def __init__(self, config: SOHOConfig):
        super().__init__()
        self.decay, self.eps = config.vd_decay, config.vd_eps
        self.starts_from_entries, self.revive_below = config.vd_start_from_entries, config.vd_revive_below
        self.register_buffer("embeddings", torch.zeros(config.vd_size, config.hidden_size))
        self.register_buffer("ema_sum", torch.zeros(config.vd_size, config.hidden_size))
        self.register_buffer("ema_count", torch.zeros(config.vd_size))
        self.register_buffer("usage", torch.zeros(config.vd_size))

    @torch.no_grad()
    def reset(self):
        """Random entries, the same in every process."""
        generator = torch.Generator("cpu").manual_seed(0)
        entries = torch.randn(self.embeddings.shape, generator=generator, dtype=torch.float32, device="cpu")
        init.copy_(self.embeddings, entries)
        init.copy_(self.ema_sum, entries if self.starts_from_entries else torch.zeros_like(entries))
        init.constant_(self.ema_count, float(self.starts_from_entries))
        init.constant_(self.usage, 0.0)

    @torch.no_grad()
    def nearest(self, cells: Tensor) -> Tensor:
        """The nearest entry of each cell (M, D): (M,); of equally near ones the first."""
        with torch.autocast(cells.device.type, enabled=False):
            cells, entries = cells.float(), self.embeddings.float()
            # less the square of the cell
            distances = torch.addmm(entries.square().sum(dim=1), cells, entries.T, alpha=-2)
            return distances.argmin(dim=1)

    @torch.no_grad()
    def follow(self, cells: Tensor, nearest: Tensor, copies: int = 1):
        """Move the entries towards the cells (M, D) of all processes that are nearest to them, each counted
        `copies` times."""
        sums = torch.zeros(len(self.embeddings), cells.shape[1] + 1, device=cells.device)
        counted = F.pad(cells.float(), (0, 1), value=1.0) * copies  # the last column counts
        sums.index_add_(0, nearest, counted)
        if num_processes() > 1:
            dist.all_reduce(sums)
        counts = sums[:, -1]
        self.ema_count.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.ema_sum.mul_(self.decay).add_(sums[:, :-1], alpha=1 - self.decay)
        self.usage.add_(counts)
        total = self.ema_count.sum()
        smoothed = (self.ema_count + self.eps) / (total + len(counts) * self.eps) * total
        self.embeddings.copy_(self.ema_sum / smoothed[:, None])
        if self.revive_below:
            self.revive(cells, (counts == 0) & (self.ema_count < self.revive_below))

    @torch.no_grad()
    def revive(self, cells: Tensor, dead: Tensor):
        """Let the `dead` (K,) among the entries become random cells (M, D), different ones while there are
        enough, offered by all processes in turn."""
        entries = torch.arange(len(dead), device=dead.device)
        offered = cells[torch.randperm(len(cells), device=cells.device)[entries % len(cells)]].float()
        if num_processes() > 1:
            offered = offered * (entries % num_processes() == dist.get_rank())[:, None]
            dist.all_reduce(offered)
        self.embeddings.copy_(torch.where(dead[:, None], offered, self.embeddings))
        self.ema_sum.copy_(torch.where(dead[:, None], offered, self.ema_sum))
        self.ema_count.masked_fill_(dead, 1.0)

    def forward(self, cells: Tensor, counted: Tensor | None = None, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Cells (B, N, D) to their entries (B, N, D), through which the gradient goes straight to the cells,
        and the numbers of these (B, N). In training the entries move first, by the cells that are `counted`
        (B, N).
        """
        nearest = self.nearest(cells.flatten(0, 1))
        if self.training:
            chosen = slice(None) if counted is None else counted.flatten()
            self.follow(cells.detach().flatten(0, 1)[chosen], nearest[chosen], copies)
        nearest = nearest.view(cells.shape[:2])
        entries = F.embedding(nearest, self.embeddings).to(cells.dtype)
        return cells + (entries - cells).detach(), nearest


class VisualProjection(nn.Module):
    """The map of the trunk (B, C, ...) to cells of the transformer's width, half as many along each side:
    (B, h, w, D)."""

    def __init__(self, config: SOHOConfig, width: int):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.convolution = nn.Conv2d(width, config.hidden_size, 1, bias=False)
        self.normalization = nn.BatchNorm1d(config.hidden_size)

    def forward(self, feature_map: Tensor) -> Tensor:
        projected = self.convolution(self.pool(feature_map))  # (B, D, h, w)
        # As a sequence: torch's BatchNorm2d gets gradients wrong of a single map that come transposed
        cells = self.normalization(projected.flatten(2)).mT
        return cells.unflatten(1, projected.shape[2:])


class VisualGate(nn.Module):
    """Mixes entries and cells (B, N, D) by shares that each cell chooses."""

    def __init__(self, config: SOHOConfig):
        super().__init__()
        self.convolution = nn.Conv1d(2 * config.hidden_size, 2, 1, bias=False)
        self.normalization = nn.BatchNorm1d(2)

    def forward(self, entries: Tensor, cells: Tensor) -> Tensor:
        both = torch.cat([entries, cells], dim=-1).mT  # (B, 2D, N)
        shares = self.normalization(self.convolution(both)).softmax(dim=1)[..., None]  # (B, 2, N, 1)
        return shares[:, 0] * entries + shares[:, 1] * cells


def sine_positions(mask: Tensor, width: int) -> Tensor:
    """Position of each cell of masks (B, h, w) in the part that is True: (B, h, w, width), rows first.

    Half of the channels are sines and cosines of the row, over the number of rows, half of the column.
    """
    channels = torch.arange(width // 2, device=mask.device)
    periods = 10_000 ** (2 * channels.div(2, rounding_mode="floor") / (width // 2))
    encoded = []
    for dim in (1, 2):
        place = mask.cumsum(dim, dtype=torch.float32)
        last = place[:, -1:] if dim == 1 else place[:, :, -1:]
        angles = (2 * torch.pi * place / (last + 1e-6))[..., None] / periods
        waves = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)
        encoded.append(waves.flatten(-2))
    return torch.cat(encoded, dim=-1)


def cell_mask(pixel_mask: Tensor, rows: int, columns: int, mode: str) -> Tensor:
    """Which cells (B, rows, columns) lie on the image, of masks of pixels (B, H, W): the nearest pixel tells.

    With "square_legacy" the canvas is H x H.
    """
    height, width = pixel_mask.shape[1:]
    canvas = pixel_mask
    if mode == "square_legacy":
        canvas = F.pad(pixel_mask, (0, height - width)) if width < height else pixel_mask[:, :, :height]
    canvas = canvas[:, None].float()
    return F.interpolate(canvas, size=(rows, columns), mode="nearest")[:, 0].bool()


@dataclass
class VisualTokens(ModelOutput):
    """What the transformer reads of images: `states` (B, N, D) before positions, `positions` (B, N, D),
    `mask` (B, N) of cells on the image, and `entries` (B, N), the dictionary's entry of each, None without
    it."""

    states: Tensor | None = None
    positions: Tensor | None = None
    mask: Tensor | None = None
    entries: Tensor | None = None

    def select(self, index: Tensor) -> "VisualTokens":
        """The images at `index`, which may repeat."""
        return VisualTokens(**{name: value[index] for name, value in self.items()})


@dataclass
class SOHOModelOutput(ModelOutput):
    """`last_hidden_state` (R, L, D) of words, `image_hidden_state` (R, N, D) of cells, and the `image_mask`
    (R, N) of cells that lie on the image."""

    last_hidden_state: Tensor | None = None
    image_hidden_state: Tensor | None = None
    image_mask: Tensor | None = None


class SOHOPreTrainedModel(VLPPreTrainedModel):
    """Common parent of the SOHO classes."""

    config: SOHOConfig
    config_class = SOHOConfig
    _no_split_modules = ["BertEmbeddings", "BertLayer", "ResNetBasicLayer", "ResNetBottleNeckLayer"]
    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)(itm_head|answer_head|cls_head|bbox_head)\.",
        r"visual_(dictionary|gate|mask_embedding)",  # of heads without a dictionary, or without masked cells
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VisualDictionary):
            module.reset()
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @classmethod
    def from_backbones(cls, vision: str, text: str, **config_fields):
        """Start from a public CNN and the lower layers of a public BERT, as the official code does. All else
        is new (`new_parameters`).

        Args:
            vision: name or folder of a CNN, such as a ResNet.
            text: name or folder of a BERT.
            config_fields: further fields of the config, such as `num_hidden_layers`, 3 without it, or those
                of `SOHOConfig.paper()`.

        Raises:
            ValueError: the BERT has fewer layers than `num_hidden_layers`.
        """
        trunk, bert = AutoModel.from_pretrained(vision), AutoModel.from_pretrained(text)
        fields = shared_fields(cls.config_class, bert.config) | config_fields
        config = cls.config_class(**fields | {"backbone_config": trunk.config})
        if config.num_hidden_layers > bert.config.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={config.num_hidden_layers}, but {text} has "
                f"{bert.config.num_hidden_layers} layers; use fewer"
            )
        model = cls(config)
        state = {f"backbone.{name}": value for name, value in trunk.state_dict().items()}
        for name, value in bert.state_dict().items():
            name = name.removeprefix("encoder.")
            state["text_" + name if name.startswith("embeddings.") else name] = value
        model.new_parameters = load_public_weights(model, state)
        return model.eval()

    def tie_weights(self, *args, **kwargs):
        """As in transformers, which calls it after loading, when every parameter is to be trained again."""
        super().tie_weights(*args, **kwargs)
        for model in self.modules():
            for frozen in model.frozen_modules() if isinstance(model, SOHOModel) else ():
                frozen.requires_grad_(False)

    def set_image_size(self, image_size: int):
        """SOHO reads images of any size.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"image_size is {image_size}, but SOHO reads images of any size; leave it out")


class SOHOModel(SOHOPreTrainedModel):
    """The trunk, the visual dictionary, and the transformer that reads words and cells."""

    def __init__(self, config: SOHOConfig):
        super().__init__(config)
        self.backbone = build_trunk(config.backbone_config)
        self.visual_projection = VisualProjection(config, trunk_width(self.backbone))
        self.visual_dictionary = self.visual_dictionary_projection = self.visual_gate = None
        if config.visual_fusion != "none":
            self.visual_dictionary = VisualDictionary(config)
            self.visual_dictionary_projection = nn.Linear(config.hidden_size, config.hidden_size)
        if config.visual_fusion == "gate":
            self.visual_gate = VisualGate(config)
        self.visual_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.visual_layer_norm_eps)
        self.text_embeddings = BertEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(config, fuses=False) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.text_embeddings.word_embeddings = value

    def train(self, mode: bool = True) -> "SOHOModel":
        """As in torch, but what is frozen stays as it is, its batch normalisation included."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        if self.config.backbone_norm_eval:
            self.backbone.eval()
        return self

    def frozen_modules(self) -> list[nn.Module]:
        """The trunk's stem and stages that are never trained."""
        frozen = self.config.frozen_stages
        if frozen < 0:
            return []
        if self.config.backbone_config.model_type != "resnet":
            raise ValueError(
                f"frozen_stages={frozen}, but backbone_config is of type "
                f"{self.config.backbone_config.model_type}, whose stages are not known; use -1"
            )
        return [self.backbone.embedder, *self.backbone.encoder.stages[:frozen]]

    def get_image_features(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, copies: int = 1
    ) -> VisualTokens:
        """Images (B, 3, H, W), of which `pixel_mask` (B, H, W) marks the part that is no padding, to tokens.

        In training the dictionary follows their cells, each counted `copies` times.
        """
        feature_map = self.backbone(pixel_values).last_hidden_state  # (B, C, H / 32, W / 32)
        cells = self.visual_projection(feature_map)  # (B, h, w, D)
        _, rows, columns, width = cells.shape
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.bool)
        mask = cell_mask(pixel_mask, rows, columns, self.config.padding_mask_mode)
        positions = sine_positions(mask, width).flatten(1, 2).to(cells.dtype)
        states, entries = self._look_up(cells.flatten(1, 2), mask.flatten(1), copies)
        return VisualTokens(states, positions, mask, entries)

    def _look_up(self, cells: Tensor, mask: Tensor, copies: int) -> tuple[Tensor, Tensor | None]:
        if self.visual_dictionary is None:
            return cells, None
        counted = None if self.config.vd_update_on_padding else mask
        looked_up, entries = self.visual_dictionary(cells, counted, copies)
        looked_up = self.visual_dictionary_projection(looked_up)
        if self.visual_gate is not None:
            return self.visual_gate(looked_up, cells), entries
        return (looked_up + cells if self.config.visual_fusion == "add" else looked_up), entries

    def fuse(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: VisualTokens,
        masked_cells: Tensor | None = None,
    ) -> SOHOModelOutput:
        """Words (R, L) and the cells of one image for each, of which `masked_cells` (R, N) are not to be
        seen."""
        states = images.states
        if masked_cells is not None:
            masked = self.visual_mask_embedding.to(states.dtype)
            states = torch.where(masked_cells[..., None], masked, states)
        cells = self.visual_layer_norm(states + images.positions)
        words = self.text_embeddings(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_states = torch.cat([words, cells], dim=1)  # (R, L + N, D)
        mask = torch.cat([attention_mask.bool(), images.mask.flatten(1)], dim=1)
        mask = key_mask(self.config, hidden_states, mask)
        for layer in self.layer:
            hidden_states = layer(hidden_states, mask)
        length = input_ids.shape[1]
        return SOHOModelOutput(hidden_states[:, :length], hidden_states[:, length:], images.mask)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> SOHOModelOutput | tuple:
        """Read texts with their images.

        Args:
            pixel_values: images (B, 3, H, W).
            input_ids, attention_mask: texts (R, L), the R / B texts of an image next to one another.
            pixel_mask: (B, H, W) True on the image, False on padding.
            image_index: (R,) the image of each text instead.

        Raises:
            ValueError: R is no multiple of B, or `image_index` names an image that is not there.
        """
        images = self.get_image_features(pixel_values, pixel_mask)
        images = images.select(images_of_texts(len(pixel_values), input_ids, image_index))
        output = self.fuse(input_ids, attention_mask, images)
        return output if return_dict else output.to_tuple()


def images_of_texts(images: int, input_ids: Tensor, image_index: Tensor | None) -> Tensor:
    """The image of each text (R,): that of `image_index`, or with R a multiple of B the same for R / B
    texts."""
    if image_index is not None:
        check_index(image_index, images)
        return image_index
    if len(input_ids) % images:
        raise ValueError(
            f"input_ids has {len(input_ids)} texts for {images} images; give as many for each, next to one "
            "another, or tell the image of each with image_index"
        )
    return torch.arange(images, device=input_ids.device).repeat_interleave(len(input_ids) // images)
