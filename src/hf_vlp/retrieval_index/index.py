"""Retrieval at scale: a gallery of images that is encoded once, searched by features, re-ranked by matching.

    index = RetrievalIndex(model, processor, "gallery")
    index.add(["1.jpg", "2.jpg"])
    index.search(text="a dog", k=10)

ITC finds candidates and ITM ranks them, as in ALBEF section 5 and X-VLM section 4; what the fusion layers
read of an image is kept on disk, so that neither the image nor its keys and values are computed again. P:
width of a feature, S: image tokens, W: image width, D: text width, H: heads, d = D / H.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..evaluation.inference import batched, evaluating, number_of, to_model, visual_inputs
from ..folders import new_folder
from ..heads import load_head
from ..loading import load_processor
from ..models.image_text import MatchingHead
from ..models.layers_bert import KeyValues
from .fingerprint import fingerprint
from .nearest import FaissSearch, nearest
from .pieces import PIECE_BYTES, Pieces

NOTE = "index.json"  # beside the pieces: what made them
STATES = ("key_values", "embeds", None)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RERANKED = 128  # candidates, as in the official evaluation on Flickr30K
BATCH = 32  # images that a text meets at a time


class RetrievalIndex:
    """Images by their contrastive features, with what re-ranking reads of them.

    `len(index)`, `index.ids` and `id in index` say what it holds.

    Args:
        model: a head of ALBEF or X-VLM that matches, such as `load_head("retrieval", ...)`.
        processor: its processor.
        folder: where the index is, a new or empty folder; without it a temporary one, see `save`.
        states: what is kept of each image for re-ranking: "key_values" of all fusion layers, "embeds" (S, W)
            from which they are computed when searching, smaller by 2 x layers x D / W, or None: no
            re-ranking.
        dtype: of the states, "float32", "float16" or "bfloat16"; halves take half the space and change
            scores by their rounding.
        faiss: search with FAISS (the extra `faiss`) instead of exactly with torch: what
            `faiss.index_factory` takes, such as "Flat" or "HNSW32". It is built at the first search.

    Raises:
        ValueError: a model without features to compare, a folder that holds something, or no such states or
            dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        folder: str | PathLike | None = None,
        states: str | None = "key_values",
        dtype: str = "float32",
        faiss: str | None = None,
    ):
        _check_model(model)
        if states not in STATES or dtype not in DTYPES:
            raise ValueError(
                f"states is {states!r} and dtype {dtype!r}; use one of {STATES} and of {tuple(DTYPES)}"
            )
        self._temporary = tempfile.TemporaryDirectory(prefix="hf-vlp-index-") if folder is None else None
        folder = Path(self._temporary.name if folder is None else folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"folder={str(folder)!r} exists and is not empty; choose another, or open an index with "
                "RetrievalIndex.load"
            )
        note = {"fingerprint": fingerprint(model), "states": states, "dtype": dtype}
        note["model"] = model.name_or_path
        folder.mkdir(parents=True, exist_ok=True)
        _write_note(folder, note)
        self._open(model, processor, folder, note, faiss)

    @classmethod
    def load(
        cls,
        folder: str | PathLike,
        model: PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        faiss: str | None = None,
        **hub: Any,
    ) -> "RetrievalIndex":
        """Open the index in `folder`, or a dataset of that name on the Hub, to search and to add.

        Args:
            model, processor: those that it was made with; loaded by the name that it has noted, without them.
            faiss: as for the class.
            hub: what `snapshot_download` takes: `revision`, `token`, `cache_dir`, ...

        Raises:
            ValueError: no index there, another model than the one that made it, or a piece that is not whole.
        """
        is_here = Path(folder).is_dir()
        path = Path(folder if is_here else snapshot_download(str(folder), repo_type="dataset", **hub))
        if not (path / NOTE).is_file():
            raise ValueError(f"{folder} holds no index; give a folder that RetrievalIndex wrote")
        note = json.loads((path / NOTE).read_text(encoding="utf-8"))
        if model is None:
            if not note["model"]:
                raise ValueError(f"{folder} was made by a model without a name; give model and processor")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = load_head("retrieval", note["model"]).to(device)
            processor = load_processor(note["model"]) if processor is None else processor
        if processor is None:
            raise ValueError("processor is None, but model is given; give both or none")
        _check_model(model)
        if fingerprint(model) != note["fingerprint"]:
            raise ValueError(
                f"model is not the one that made {folder} ({note['model']}): weights or config differ, so "
                "features would not be alike; give that model, or make a new index"
            )
        index = cls.__new__(cls)
        index._temporary = None
        index._open(model, processor, path, note, faiss)
        index._is_download = not is_here
        return index

    def _open(self, model, processor, folder: Path, note: dict[str, Any], faiss: str | None):
        self.model, self.processor, self.folder = model, processor, folder
        self._note, self._faiss, self._is_download = note, faiss, False
        self._pieces = Pieces(folder)
        self._features = self._search = None

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, image_id: Any) -> bool:
        return str(image_id) in self._pieces

    @property
    def ids(self) -> list[str]:
        """Of all images, in the order in which they came."""
        return list(self._pieces.ids)

    def add(
        self,
        images: Iterable,
        ids: Sequence | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> None:
        """Encode images and write them; what is written stays, also when a later image stops this.

        Args:
            images: a list or a stream of whatever `load_image` takes.
            ids: one for each, compared as strings; without them paths and addresses, or else numbers.
            batch_size: images that are encoded at a time.
            progress: show a bar.

        Raises:
            BadImageError: an image that cannot be read, named.
            ValueError: ids that are there already, come twice, or are more or fewer than the images, states
                that `dtype` cannot hold, an index that was downloaded, or that somebody else has added to
                meanwhile, or `batch_size` below 1.
        """
        if self._is_download:
            raise ValueError(
                f"{self.folder} is a download; save the index to a folder of yours and add there"
            )
        self._pieces.next_path()  # before the work
        count = number_of(images)
        if ids is not None:
            ids = [str(image_id) for image_id in ids]
            if count not in (None, len(ids)):
                raise ValueError(f"ids has {len(ids)} for {count} images; give one for each")
            self._pieces.check_new(ids)
        collected, size, seen = [], 0, set()
        bar = tqdm(self._named(images, ids), total=count, disable=not progress)
        try:
            for batch in batched(bar, batch_size):
                names = [name for name, _ in batch]
                self._pieces.check_new(names, seen)
                collected.append((names, *self._encode([image for _, image in batch])))
                size += sum(part.nbytes for part in collected[-1][1:] if part is not None)
                if size >= PIECE_BYTES:
                    self._write(collected)
                    size = 0
        finally:
            self._write(collected)

    def search(
        self,
        text: str | Sequence[str] | None = None,
        image: Any = None,
        k: int = 10,
        rerank: int | None = None,
    ) -> list[dict] | list[list[dict]]:
        """The `k` images that suit a text, or are like an image, best first; for a list of either a list of
        such lists.

        Args:
            rerank: how many of the nearest are ranked by matching, before those that are not; 128 without it.
                Images are compared with an image by their features alone.

        Returns:
            Dicts of `id`, `cosine` of the features, and of the re-ranked `score`, the logit of a match that
            `evaluate_retrieval` ranks by, and its `probability`.

        Raises:
            ValueError: an empty index, neither text nor image or both, `k` below 1, or `rerank` below 0, or
                for an image, or without states.
        """
        if (text is None) == (image is None):
            raise ValueError("give either text or image to search for")
        if k < 1 or (rerank or 0) < 0:
            raise ValueError(f"k is {k} and rerank {rerank}; use at least 1, and at least 0")
        if not len(self):
            raise ValueError("the index is empty; add images first")
        has_states = self._note["states"] is not None
        if rerank and (text is None or not has_states):
            raise ValueError(
                f"rerank is {rerank}, but "
                + ("the index keeps no states" if text is not None else "images are not matched with images")
                + "; leave it out"
            )
        rerank = RERANKED * has_states if rerank is None else rerank
        query = image if text is None else text
        queries = list(query) if isinstance(query, (list, tuple)) else [query]
        if not queries:
            return []
        with evaluating(self.model):
            find = self._by_text if image is None else self._by_image
            found = find(queries, k, rerank)
        return found if isinstance(query, (list, tuple)) else found[0]

    def save(self, folder: str | PathLike) -> None:
        """Copy the index to a new folder, there whole or not at all, in pieces of full size.

        Raises:
            ValueError: the folder holds something already.
        """
        with new_folder(folder) as unfinished:
            self._pieces.copy_to(unfinished)
            _write_note(unfinished, self._note)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload index",
    ) -> str:
        """Upload the index to the dataset `repo_id` on the Hub, which is made if need be; its address."""
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=self.folder,
            allow_patterns=[NOTE, "piece-*.safetensors"],
            commit_message=commit_message,
        )

    # Adding

    def _named(self, images: Iterable, ids: list[str] | None) -> Iterator[tuple[str, Any]]:
        if ids is not None:
            yield from zip(ids, images, strict=True)
            return
        for number, image in enumerate(images, start=len(self)):
            yield str(image) if isinstance(image, (str, PathLike)) else str(number), image

    def _encode(self, images: list) -> tuple[Tensor, Tensor | None]:
        """Features (B, P) and states of images."""
        with evaluating(self.model):
            visual = visual_inputs(self.model, self.processor, images)
            output = self.model.get_image_features(**visual.repeated())
            features, states = output.pooler_output.float().cpu(), None
            if self._note["states"] == "embeds":
                states = output.last_hidden_state  # (B, S, W)
            elif self._note["states"] == "key_values":
                layers = self.model.project_image(output.last_hidden_state)
                states = torch.stack(
                    [part for pair in layers for part in pair], dim=1
                )  # (B, 2 layers, H, S, d)
            if states is not None:
                states = states.to("cpu", DTYPES[self._note["dtype"]])
                if not states.isfinite().all():
                    raise ValueError(
                        f"dtype {self._note['dtype']} cannot hold these states; use bfloat16 or float32"
                    )
        return features, states

    def _write(self, collected: list[tuple[list[str], Tensor, Tensor | None]]):
        """Write and forget what is collected."""
        if not collected:
            return
        ids, features, states = zip(*collected, strict=True)
        collected.clear()
        states = None if states[0] is None else torch.cat(states)
        self._pieces.write([name for part in ids for name in part], torch.cat(features), states)
        self._features = self._search = None

    # Searching

    def _nearest(self, queries: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
        if self._faiss is not None:
            if self._search is None:
                self._search = FaissSearch(self._pieces.features(), self._faiss)
            return self._search(queries, k)
        if self._features is None:
            self._features = self._pieces.features().to(self.model.device)
        return nearest(self._features, queries.float(), k)

    def _by_image(self, images: list, k: int, _) -> list[list[dict]]:
        inputs = visual_inputs(self.model, self.processor, images).repeated()
        places, cosines = self._nearest(self.model.get_image_features(**inputs).pooler_output, k)
        return [self._found(*each) for each in zip(places, cosines, strict=True)]

    def _by_text(self, texts: list[str], k: int, rerank: int) -> list[list[dict]]:
        tokens = to_model(self.processor(text=texts, return_tensors="pt"), self.model)
        words = self.model.get_text_features(**tokens)
        read = self.model.read_words(words.last_hidden_state, tokens["attention_mask"]) if rerank else None
        lengths, found = tokens["attention_mask"].sum(dim=1).tolist(), []
        for i, each in enumerate(zip(*self._nearest(words.pooler_output, max(k, rerank)), strict=True)):
            rows = self._found(*each)
            if rerank:
                logits = self._match(read[i : i + 1, : lengths[i]], each[0][:rerank])
                rows = _reranked(rows, logits)
            found.append(rows[:k])
        return found

    def _found(self, places: list[int], cosines: list[float]) -> list[dict]:
        ids = self._pieces.ids
        return [{"id": ids[place], "cosine": cosine} for place, cosine in zip(places, cosines, strict=True)]

    def _match(self, words: Tensor, places: list[int]) -> Tensor:
        """Match logits (n, 2) of a text (1, L, D) after `read_words` with the images at these places."""
        logits = []
        for batch in batched(places, BATCH):
            text = words.expand(len(batch), -1, -1)
            key_values = self._key_values(self._pieces.states(batch).to(words.device, words.dtype))
            logits.append(
                self.model.match(text, text.new_ones(text.shape[:2]).long(), key_values, words_read=True)
            )
        return torch.cat(logits).float()

    def _key_values(self, states: Tensor) -> list[KeyValues]:
        """Of each fusion layer, (n, H, S, d)."""
        if self._note["states"] == "embeds":
            return self.model.project_image(states)
        parts = states.unbind(dim=1)
        return list(zip(parts[::2], parts[1::2], strict=True))


def _check_model(model: PreTrainedModel):
    if not isinstance(model, MatchingHead):
        raise ValueError(
            f"model is {type(model).__name__}, which has no features to compare and match; give a retrieval "
            "head of ALBEF or X-VLM (LXMERT and SOHO score every pair: hf_vlp.predict)"
        )


def _write_note(folder: Path, note: dict[str, Any]):
    unfinished = folder / f".{NOTE}.unfinished"
    unfinished.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(folder / NOTE)


def _reranked(rows: list[dict], logits: Tensor) -> list[dict]:
    """The first rows in the order of their match, then the others."""
    scores, probabilities = logits[:, 1], logits.softmax(dim=1)[:, 1].tolist()
    order = scores.argsort(descending=True, stable=True).tolist()
    scores = scores.tolist()
    first = [rows[i] | {"score": scores[i], "probability": probabilities[i]} for i in order]
    return first + rows[len(first) :]
