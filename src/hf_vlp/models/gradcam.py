"""Grad-CAM: where attention and the gradient of a score agree (ALBEF section 6).

R: texts, H: heads, Q: queries, S: keys.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .attention_maps import recording


def gradcam(
    model: PreTrainedModel, attention: nn.Module, config: PreTrainedConfig, score: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention maps (R, H, Q, S) times what of their gradient is positive, and the scores (R,).

    `score` computes the scores with `model`, whose module `attention` (of `config`) makes the maps. The
    gradient is taken from the sum of the scores to the maps and no further, so that neither the image trunk
    nor any parameter costs a backward pass; it works within `torch.inference_mode()`, if `score` reads
    no tensor made there.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _frozen(model),
        recording([attention], config) as (maps,),
    ):
        scores = score()
        (gradient,) = torch.autograd.grad(scores.sum(), maps)
    return maps[0].detach() * gradient.clamp(min=0), scores.detach()


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
