"""Folders that are there whole, or not at all; and on the Hub."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        ValueError: there is something at `path` already, other than an empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output_dir={str(path)!r} exists and is not an empty folder; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def push_folder(folder: str | Path, name: str) -> str:
    """Upload a folder to the model repository `name`, which is made where there is none; its address.

    Raises:
        ValueError: `name` is no name of a repository.
        OSError: the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    repository = api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=folder)
    return str(repository)
