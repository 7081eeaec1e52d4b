"""To the Hub in one commit, and from it no pickle."""

import tempfile
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import has_file

CARD = "README.md"
# stands in the cards that the package writes, which it may write anew; any other card is its author's
CARD_MARK = "<!-- Written by hf_vlp, which writes it anew on the next push unless this line is deleted. -->"


class SharedOnHub:
    """A model or processor that goes to the Hub whole or not at all."""

    # files of an earlier push that would be read in place of the new ones, or beside them
    replaced_on_push: tuple[str, ...] = ()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, and a model's card, in one commit.

        A README.md that a person wrote stays as it is.

        Args:
            repo_id: "name" or "organization/name"; made if it does not exist.
            commit_message, commit_description: of the commit.
            private: of a repository that is made.
            token: instead of that of `hf auth login`.
            revision: branch, made from main if it does not exist.
            create_pr: open a pull request instead.
            max_shard_size: of a file of weights, such as "5GB"; more are split.
            tags: for the card.

        Raises:
            HfHubHTTPError: the Hub refuses or fails; then nothing of it is published.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if persons_card(repo_id, revision, token) is None:
                self.write_card(
                    folder, repo_id, tags=[*(getattr(self, "model_tags", None) or []), *(tags or [])]
                )
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=list(self.replaced_on_push) or None,
            )

    def write_card(self, directory: str | Path, name: str, tags: list[str] | None = None):
        """Write README.md beside the weights: models of the package do, by `hf_vlp.cards.write_card`."""


def persons_card(repo_id: str, revision: str | None = None, token: bool | str | None = None) -> str | None:
    """The README.md of a repository, None if there is none or the package wrote it."""
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, CARD, revision=revision)
    except RemoteEntryNotFoundError:
        return None
    text = Path(path).read_text(encoding="utf-8")
    return None if CARD_MARK in text else text


def refuse_pickle(name: str | Path, subfolder: str = "", **hub_options):
    """Explain why weights are not loaded that are there, but in a pickle.

    Raises:
        ValueError: the folder or repository has them so.
    """
    for file in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if has_file(name, str(PurePosixPath(subfolder, file)), **hub_options):
            raise ValueError(
                f"{name} holds its weights in {file}, a pickle, which may run code when it is read and is "
                "not loaded; ask its author for model.safetensors, or convert an official file that you "
                "trust with hf-vlp convert"
            )
