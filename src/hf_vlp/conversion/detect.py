"""Which paper's code wrote a checkpoint, told by keys that no other's has."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .keys import read_state_dict

# Converters by the name of their command
PAPERS = {
    "xvlm": "X-VLM",
    "albef": "ALBEF",
    "lxmert": "LXMERT",
    "soho": "SOHO",
    "butd": "the detector of bottom-up attention",
}
# How some key begins
_SIGNATURES = {
    "X-VLM": r"vision_encoder\.",
    "ALBEF": r"visual_encoder\.",
    "LXMERT": r"(.+\.)?encoder\.r_layers\.",
    "SOHO": r"language\.bert\.",
    "the detector of bottom-up attention": r"proposal_generator\.|rpn_conv/3x3\.",
    "BLIP": r"text_encoder\.encoder\.layer\.0\.crossattention\.",  # and ALBEF's image encoder
}
# What files without any of these hold
_PARTS = {
    "a model of this package, which from_pretrained reads as it is": r"model\.(vision|text|fusion)_model\.",
    "a Swin Transformer, which from_backbones starts from": r"layers\.\d+\.blocks\.",
    "a ViT, which from_backbones starts from": r"blocks\.\d+\.",
    "a BERT, which from_backbones starts from": r"(bert\.)?encoder\.layer\.\d+\.",
}
_WITHOUT_KEYS = (".caffemodel", ".pkl")  # suffixes of files that only the detector's converter reads


def find_converter(checkpoint: str | Path) -> str:
    """The name of the converter, one of `PAPERS`, for an official file of any paper.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a file that cannot be read, or of no paper, with what it was recognised as.
    """
    if Path(checkpoint).suffix in _WITHOUT_KEYS:
        return "butd"
    state = read_state_dict(checkpoint)
    found = _recognise(state)
    for command, paper in PAPERS.items():
        if found == [paper]:
            return command
    what = " and ".join(found) or f"nothing known, its first keys are {list(state)[:3]}"
    raise ValueError(
        f"checkpoint {str(checkpoint)!r} is recognised as {what}; give one official file of "
        + ", ".join(PAPERS.values())
    )


def refuse_other_papers(state: Mapping[str, Tensor], paper: str):
    """Name the paper that a checkpoint probably belongs to, if it has keys of another than `paper`.

    Raises:
        ValueError: there is such a key.
    """
    commands = {title: f" (hf-vlp convert {command})" for command, title in PAPERS.items()}
    for found in _matching(state, _SIGNATURES):
        if found != paper:
            raise ValueError(
                f"the checkpoint is of another model, probably {found}{commands.get(found, '')}; {paper} "
                "files are converted"
            )


def _recognise(state: Mapping[str, Tensor]) -> list[str]:
    return _matching(state, _SIGNATURES) or _matching(state, _PARTS)[:1]


def _matching(state: Mapping[str, Tensor], signatures: Mapping[str, str]) -> list[str]:
    return [name for name, start in signatures.items() if any(re.match(start, key) for key in state)]
