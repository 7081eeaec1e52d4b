"""Finding the checkpoint to resume from after a run was killed, perhaps while it was writing one."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The checkpoint of most steps in `output_dir` that was written to its end, None if there is none.

    The Trainer writes in place, the weights first and `trainer_state.json` last, and its own search takes the
    highest number, whole or not. A folder counts as whole if that last file and every weight and state file
    can be opened; those passed over are named in a warning.
    """
    checkpoints = [
        path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdecimal()
    ]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        damage = _damage(checkpoint)
        if damage is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is passed over, it was not written to its end: {damage}")
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is missing or cut short, None if nothing is."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut short"
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors" and not _opens(file):
            return f"{file.name} is cut short"
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):  # torch writes zip files
            return f"{file.name} is cut short"
    return None


def _opens(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):  # compares the length of the file with its header
            return True
    except (OSError, SafetensorError):
        return False
