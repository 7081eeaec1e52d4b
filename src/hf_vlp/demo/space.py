"""The page as a Space: an app on the Hub, with a copy of this package, so that it needs nothing from here."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import gradio as gr
from huggingface_hub import CommitInfo, HfApi, SpaceCard, SpaceCardData
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..models.hub import CARD, CARD_MARK
from .app import build

APP = "app.py"
APP_MARK = "# Written by hf_vlp, which writes it anew on the next push unless this line is deleted."
PACKAGE = Path(__file__).parents[1]
# what setup.py installs, and the extra `demo`
REQUIREMENTS = (
    "torch",
    "torchvision",
    "transformers>=5.17,<6",
    "huggingface-hub>=1.31",
    "tokenizers",
    "datasets",
    "evaluate",
    "timm",
    "accelerate",
    "sentencepiece",
    "safetensors",
    "pillow",
    "numpy",
    "typer>=0.19",
    "rich",
    "tqdm",
    "gradio>=6",
)


def push_space(
    repo_id: str,
    models: str | Sequence[str],
    tasks: Sequence[str] | None = None,
    extractor: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
) -> CommitInfo:
    """Upload the page of `build` as a Space, in one commit. A README.md that a person wrote stays as it is.

    Args:
        repo_id: "name" or "organization/name"; made if it does not exist.
        models: names on the Hub.
        tasks, extractor: as `build` takes them.
        private: of a Space that is made.
        token: instead of that of `hf auth login`.

    Raises:
        ValueError: as `build` and `write_space`, or the Space holds another app. Then nothing is uploaded.
        HfHubHTTPError: the Hub refuses or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_space(folder, models, tasks, extractor, title=repo_id.split("/")[-1])
        build(models, tasks, extractor, hub={"token": token})
        api, own_card = HfApi(token=token), False
        if api.repo_exists(repo_id, repo_type="space"):
            app, card = (_read(api, repo_id, name) for name in (APP, CARD))
            if app is not None and APP_MARK not in app:
                raise ValueError(
                    f"the Space {repo_id} holds an {APP} that hf_vlp did not write; choose another name"
                )
            own_card = card is not None and CARD_MARK not in card
        repo_id = api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
        ).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=folder,
            ignore_patterns=[CARD] if own_card else None,
            delete_patterns=f"{PACKAGE.name}/*",
            commit_message="Upload the page of hf_vlp",
        )


def write_space(
    folder: str | PathLike,
    models: str | Sequence[str],
    tasks: Sequence[str] | None = None,
    extractor: str | None = None,
    title: str = "hf_vlp",
) -> None:
    """Write app.py, requirements.txt, README.md with a Space's metadata, and this package into `folder`.

    Raises:
        ValueError: a model or an extractor in a folder of this machine, which a Space cannot read.
    """
    models = [models] if isinstance(models, (str, PathLike)) else list(models)
    models = [str(name) for name in models]
    for name in models if extractor is None else [*models, extractor]:
        if Path(name).exists():
            raise ValueError(
                f"{name} is a folder of this machine, which a Space cannot read; share it by "
                "push_to_hub, and give its name on the Hub"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored, dirs_exist_ok=True)
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    options = "".join(
        f", {name}={value!r}"
        for name, value in (("tasks", tasks and list(tasks)), ("extractor", extractor))
        if value
    )
    (folder / APP).write_text(
        f"{APP_MARK}\nimport hf_vlp.demo\n\n"
        f"demo = hf_vlp.demo.build({models!r}{options})\n"
        'if __name__ == "__main__":\n    hf_vlp.demo.launch(demo)\n',
        encoding="utf-8",
    )
    data = SpaceCardData(
        title=title,
        emoji="🔎",
        sdk="gradio",
        sdk_version=gr.__version__,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file=APP,
        models=models,
        tags=["hf_vlp", "vision-language"],
    )
    links = "\n".join(f"- [{name}](https://huggingface.co/{name})" for name in models)
    text = f"# {title}\n\nA page to try these models in the browser:\n\n{links}"
    card = SpaceCard(f"---\n{data.to_yaml()}\n---\n{CARD_MARK}\n\n{text}\n", ignore_metadata_errors=True)
    (folder / CARD).write_text(str(card), encoding="utf-8")


def _read(api: HfApi, repo_id: str, name: str) -> str | None:
    """A file of the Space, None if there is none."""
    try:
        path = api.hf_hub_download(repo_id, name, repo_type="space")
    except RemoteEntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")
