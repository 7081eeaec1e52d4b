"""Heads that match images with texts as ONNX files, one of each part, for any number and length of texts.

B: images, R: texts, and pairs of both; L: text length, S: image tokens, P: projection width, H x W: an image
of SOHO, N: its cells, G: regions of LXMERT, F: width of their features.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .folders import new_folder
from .models.backbones import trunk_image_size
from .models.image_text import MatchingHead
from .models.modeling_lxmert_tasks import LXMERTForRetrieval
from .models.modeling_soho import VisualTokens
from .models.modeling_soho_tasks import SOHOForRetrieval

_ROWS, _LENGTH, _REGIONS, _CANVAS = 3, 7, 5, (96, 160)  # what is traced; a file takes any others
_ANY_TRUNK = 224  # pixels a side, for trunks that read any size


class Part(NamedTuple):
    """A file: what it computes of which inputs, each an example and the names of its axes."""

    compute: Callable[..., tuple[Tensor, ...]]
    inputs: dict[str, tuple[Tensor, str]]
    outputs: tuple[str, ...]


def export_onnx(model: PreTrainedModel, folder: str | Path) -> list[str]:
    """Write a head as ONNX files into `folder`, all or none; their names.

    X-VLM and ALBEF:

    - `image.onnx`: `pixel_values` (B, 3, size, size) to `image_embeds` (B, S, W), `image_features` (B, P);
    - `text.onnx`: `input_ids`, `attention_mask` (R, L) to `text_embeds` (R, L, D), `text_features` (R, P);
    - `fusion.onnx`: `text_embeds`, `attention_mask`, `image_embeds` of R pairs to `logits` (R, 2).

    SOHO:

    - `image.onnx`: `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W) to `states`, `positions` (B, N, D) and
      `mask` (B, h, w);
    - `fusion.onnx`: `input_ids`, `attention_mask` (R, L), `states`, `positions`, `mask` to `logits` (R, 2).

    LXMERT:

    - `text.onnx`: `input_ids`, `attention_mask` (R, L) to `words` (R, L, D);
    - `regions.onnx`: `visual_feats` (B, G, F), `visual_pos` (B, G, 4), `visual_attention_mask` (B, G) to
      `regions` (B, G, D);
    - `cross.onnx`: `words`, `attention_mask`, `regions`, `visual_attention_mask` of R pairs to `logits`.

    Index 1 of the logits is for a match. The weights of a file lie beside it, in `.onnx.data`.

    Args:
        model: a head of retrieval, or of X-VLM's or ALBEF's pre-training.
        folder: does not exist yet, or is empty.

    Raises:
        ValueError: another head; a model that `torch.onnx` cannot export; a folder that is not empty.
        ImportError: without the extra `onnx`.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting to ONNX needs onnxscript: pip install 'hf-vlp[onnx]'") from error
    model = copy.deepcopy(model).cpu().eval()
    model.set_attn_implementation("eager")  # of plain products, which ONNX knows
    parts = _parts(model)
    with new_folder(folder) as unfinished:
        for name, part in parts.items():
            _export(model, name, part, unfinished / f"{name}.onnx")
    return [f"{name}.onnx" for name in parts]


class _Computation(nn.Module):
    """A part's function, with the parameters of the model that it is of."""

    def __init__(self, model: nn.Module, compute: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.compute(*inputs)


def _export(model: PreTrainedModel, name: str, part: Part, file: Path):
    examples = tuple(example for example, _ in part.inputs.values())
    axes = [{i: torch.export.Dim.DYNAMIC for i, axis in enumerate(names.split()) if axis != "_"}
            for _, names in part.inputs.values()]  # fmt: skip
    try:
        torch.onnx.export(
            _Computation(model, part.compute).eval(),
            examples,
            file,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=(tuple(axes),),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"{name} of {type(model).__name__} cannot be exported to ONNX by this torch: "
            f"{str(error.__cause__ or error).splitlines()[0]}"
        ) from error


def _parts(model: PreTrainedModel) -> dict[str, Part]:
    if isinstance(model, MatchingHead):
        return _image_text_parts(model)
    if isinstance(model, SOHOForRetrieval):
        return _soho_parts(model)
    if isinstance(model, LXMERTForRetrieval):
        return _lxmert_parts(model)
    raise ValueError(
        f"model is {type(model).__name__}, which matches no images with texts; give a head of retrieval, "
        "such as load_head('retrieval', name), which every pre-trained model has"
    )


def _words() -> dict[str, tuple[Tensor, str]]:
    mask = torch.ones(_ROWS, _LENGTH, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": (mask, "R L"), "attention_mask": (mask.clone(), "R L")}


def _image_text_parts(model: MatchingHead) -> dict[str, Part]:
    size = trunk_image_size(model.config.vision_config) or _ANY_TRUNK
    pixels = torch.zeros(_ROWS, 3, size, size, dtype=model.dtype)
    with torch.no_grad():
        image_embeds = model.get_image_features(pixels).last_hidden_state
    words = _words()
    width = model.config.text_config.hidden_size
    text_embeds = torch.zeros(_ROWS, _LENGTH, width, dtype=model.dtype)

    def see(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        image = model.get_image_features(pixel_values)
        return image.last_hidden_state, image.pooler_output

    def read(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        text = model.get_text_features(input_ids, attention_mask)
        return text.last_hidden_state, text.pooler_output

    def match(text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> tuple[Tensor]:
        return (model.match(text_embeds, attention_mask, model.project_image(image_embeds)),)

    fused = {
        "text_embeds": (text_embeds, "R L _"),
        "attention_mask": words["attention_mask"],
        "image_embeds": (image_embeds, "R _ _"),
    }
    return {
        "image": Part(see, {"pixel_values": (pixels, "B _ _ _")}, ("image_embeds", "image_features")),
        "text": Part(read, words, ("text_embeds", "text_features")),
        "fusion": Part(match, fused, ("logits",)),
    }


def _soho_parts(model: SOHOForRetrieval) -> dict[str, Part]:
    pixels = torch.zeros(_ROWS, 3, *_CANVAS, dtype=model.dtype)
    pixel_mask = torch.ones(_ROWS, *_CANVAS, dtype=torch.bool)
    with torch.no_grad():
        tokens = model.get_image_features(pixels, pixel_mask)

    def see(pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = model.get_image_features(pixel_values, pixel_mask)
        return image.states, image.positions, image.mask

    def match(input_ids: Tensor, attention_mask: Tensor, *image: Tensor) -> tuple[Tensor]:
        return (model.match(input_ids, attention_mask, VisualTokens(*image)),)

    images = {"pixel_values": (pixels, "B _ H W"), "pixel_mask": (pixel_mask, "B H W")}
    fused = _words() | {
        "states": (tokens.states, "R N _"),
        "positions": (tokens.positions, "R N _"),
        "mask": (tokens.mask, "R h w"),
    }
    return {
        "image": Part(see, images, ("states", "positions", "mask")),
        "fusion": Part(match, fused, ("logits",)),
    }


def _lxmert_parts(model: LXMERTForRetrieval) -> dict[str, Part]:
    config, words = model.config, _words()
    mask = torch.ones(_ROWS, _REGIONS, dtype=torch.long)
    mask[0, -1] = 0
    features = torch.zeros(_ROWS, _REGIONS, config.visual_feat_dim, dtype=model.dtype)
    boxes = torch.zeros(_ROWS, _REGIONS, config.visual_pos_dim, dtype=model.dtype)

    def read(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (model.get_text_features(input_ids, attention_mask).last_hidden_state,)

    def see(*regions: Tensor) -> tuple[Tensor]:
        return (model.get_image_features(*regions).last_hidden_state,)

    def match(*pairs: Tensor) -> tuple[Tensor]:
        return (model.match(*pairs),)

    seen = {
        "visual_feats": (features, "B G _"),
        "visual_pos": (boxes, "B G _"),
        "visual_attention_mask": (mask, "B G"),
    }
    crossed = {
        "words": (torch.zeros(_ROWS, _LENGTH, config.hidden_size, dtype=model.dtype), "R L _"),
        "attention_mask": words["attention_mask"],
        "regions": (torch.zeros(_ROWS, _REGIONS, config.hidden_size, dtype=model.dtype), "R G _"),
        "visual_attention_mask": (mask, "R G"),
    }
    return {
        "text": Part(read, words, ("words",)),
        "regions": Part(see, seen, ("regions",)),
        "cross": Part(match, crossed, ("logits",)),
    }
