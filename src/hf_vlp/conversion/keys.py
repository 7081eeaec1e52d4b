"""Renaming the keys of a checkpoint by a table, with account of every one of them."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor


@dataclass
class KeyReport:
    """What became of each old key: `used` as new ones, `dropped` for a reason; and new ones `missing`.

    `model` is the class they were loaded into.
    """

    model: str = ""
    used: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.used)} keys used, {len(self.dropped)} dropped, {len(self.missing)} missing"]
        reasons = sorted(set(self.dropped.values()))
        for reason in reasons:
            names = [name for name, why in self.dropped.items() if why == reason]
            lines.append(f"  dropped {len(names)}: {reason} ({names[0]}{', ...' if len(names) > 1 else ''})")
        lines += [f"  missing: {name}" for name in self.missing]
        return "\n".join(lines)

    def provenance(self, checkpoint: str | Path) -> dict[str, str | int]:
        """What a converted config keeps as `converted_from`: name and SHA-256 of the file, counts of keys."""
        digest = hashlib.sha256()
        with open(checkpoint, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        counts = {"used": self.used, "dropped": self.dropped, "missing": self.missing}
        return {
            "file": Path(checkpoint).name,
            "sha256": digest.hexdigest(),
            **{f"keys_{fate}": len(keys) for fate, keys in counts.items()},
        }


def rename_keys(
    state: Mapping[str, Tensor],
    table: Mapping[str, str | list[str]],
    dropped: Mapping[str, str],
    alias: Callable[[str], str] = str,
) -> tuple[dict[str, Tensor], KeyReport]:
    """Rename every key by the first pattern of `table` that matches its `alias` whole.

    A pattern with a list of new names splits the tensor into as many equal parts along its rows. Keys that
    match a pattern of `dropped` are left out for the reason given there. Keys of one shared tensor get one
    new name.

    Raises:
        ValueError: a key that no pattern matches, or different tensors for one new name.
    """
    renamed, report, unknown, unequal = {}, KeyReport(), [], []
    for key, value in state.items():
        name = alias(key)
        reason = next((why for pattern, why in dropped.items() if re.fullmatch(pattern, name)), None)
        match = next((found for found in (re.fullmatch(pattern, name) for pattern in table) if found), None)
        if reason is not None:
            report.dropped[key] = reason
        elif match is None:
            unknown.append(key)
        else:
            placed = _place(match, table[match.re.pattern], value)
            unequal += [key for name in placed if name in renamed and not placed[name].equal(renamed[name])]
            renamed |= placed
            report.used[key] = list(placed)
    if unknown:
        raise ValueError(
            f"the checkpoint holds {len(unknown)} keys that the model has no place for, such as "
            f"{unknown[:3]}; it belongs to another model or to a changed one"
        )
    if unequal:
        raise ValueError(
            f"the checkpoint holds {len(unequal)} tensors that differ from those the model shares them with, "
            f"such as {unequal[:3]}; it belongs to another model or to a changed one"
        )
    return renamed, report


def _place(match: re.Match, targets: str | list[str], value: Tensor) -> dict[str, Tensor]:
    if isinstance(targets, str):
        return {match.expand(targets): value}
    parts = value.tensor_split(len(targets))
    return {match.expand(target): part for target, part in zip(targets, parts, strict=True)}


def load_into(model: torch.nn.Module, state: dict[str, Tensor], report: KeyReport):
    """Load a renamed state, strictly both ways apart from tied parameters.

    Raises:
        ValueError: weights are missing, left over, or of another shape.
    """
    expected = model.state_dict()
    report.model = type(model).__name__
    report.missing = sorted(set(expected) - set(state) - set(model.all_tied_weights_keys))
    misshapen = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problems = {
        "misses": report.missing,
        "has too many": sorted(set(state) - set(expected)),
        "has misshapen": [f"{key} {tuple(state[key].shape)}" for key in misshapen],
    }
    for problem, names in problems.items():
        if names:
            examples = ", ".join(names[:3])
            raise ValueError(
                f"the checkpoint {problem} weights, {len(names)} in all: {examples}; it is incomplete, or "
                "its geometry was not told right"
            )
    model.load_state_dict(state, strict=False)
    model.tie_weights()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file (`torch.save` or safetensors), out of `{"model": ...}`; no code is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, no checkpoint, or holds objects besides plain values and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {str(path)!r} does not exist; give the path of the official file"
        )
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        SafetensorError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        ValueError,
    ) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read, it is truncated or no checkpoint of tensors; "
            f"fetch it again ({str(error).splitlines()[0]})"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise ValueError(
            f"checkpoint {str(path)!r} holds no table of tensors; give the file with the model's weights"
        )
    return {key.removeprefix("module."): value for key, value in content.items()}
