"""What tells whether features of two models can be compared."""

import hashlib
import json
from typing import Any

import torch

from ..models.image_text import MatchingHead

PASSING = ("transformers_version", "architectures", "auto_map", "dtype", "momentum_teacher", "use_cache")


def fingerprint(model: MatchingHead) -> str:
    """What tells models apart whose features or matches differ: config and weights, in bfloat16, so that the
    same model has the same in float32 and in bfloat16."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str).encode())
    for part in (model.model, model.itm_head):
        for name, value in part.state_dict().items():
            value = value.bfloat16() if value.is_floating_point() else value
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what changes from one save or load to the next."""
    return {
        str(name): _lasting(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in PASSING and not str(name).startswith("_")
    }
