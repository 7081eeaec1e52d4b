"""Attention maps as they are computed, of chosen attention modules.

R: rows, H: heads, Q: queries, S: keys.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RECORDED = "vlp_recorded"


@contextlib.contextmanager
def recording(modules: Iterable[nn.Module], config: PreTrainedConfig) -> Iterator[list[list[Tensor]]]:
    """For each of `modules`, attention modules of `config`, the list that takes its maps (R, H, Q, S)."""
    implementation, config._attn_implementation = config._attn_implementation, RECORDED
    modules = list(modules)
    for module in modules:
        module.recorded_maps = []
    try:
        yield [module.recorded_maps for module in modules]
    finally:
        config._attn_implementation = implementation
        for module in modules:
            del module.recorded_maps


def _recorded_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1)  # (R, H, Q, S)
    if hasattr(module, "recorded_maps"):
        if torch.is_grad_enabled() and not weights.requires_grad:
            weights.requires_grad_()  # of a frozen model: a graph starts here
        module.recorded_maps.append(weights)
    return (F.dropout(weights, dropout, module.training) @ value).transpose(1, 2), weights


ALL_ATTENTION_FUNCTIONS.register(RECORDED, _recorded_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(RECORDED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
