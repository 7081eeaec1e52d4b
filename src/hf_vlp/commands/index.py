"""`hf-vlp index`: galleries of images, built and searched."""

from collections.abc import Sequence
from pathlib import Path

from ..loading import load_trained
from ..retrieval_index import RetrievalIndex
from .extract import image_files


def build(
    name: str,
    sources: Sequence[str],
    out: Path,
    states: str | None = "key_values",
    dtype: str = "float32",
    batch_size: int = 32,
) -> str:
    """Encode images with the model in `name` into the index `out`, or those that it lacks after a run cut
    short; their paths are their ids.

    Returns:
        What the index holds now, in a sentence.

    Raises:
        ValueError: no images, as `load_trained` and `RetrievalIndex`, or an image that cannot be read.
    """
    files = [str(file) for file in image_files(sources)]
    model, processor = load_trained("retrieval", name)
    if (out / "index.json").is_file():
        index = RetrievalIndex.load(out, model, processor)
    else:
        index = RetrievalIndex(model, processor, out, states, dtype)
    waiting = [file for file in files if file not in index]
    index.add(waiting, batch_size=batch_size, progress=True)
    return f"{len(index)} images in {out}, {len(waiting)} of them new"


def search(
    folder: str,
    texts: Sequence[str],
    images: Sequence[str],
    k: int = 10,
    rerank: int | None = None,
    name: str | None = None,
    faiss: str | None = None,
) -> list[dict]:
    """The best of the index in `folder` for each text and each image: dicts of `text` or `image`, and
    `results`.

    The model is the one that made the index, under the name that it had then or under `name`.

    Raises:
        ValueError: nothing to search for, and as `RetrievalIndex`.
    """
    if not texts and not images:
        raise ValueError("text and image are both missing; give --text or --image to search for")
    model, processor = (None, None) if name is None else load_trained("retrieval", name)
    index = RetrievalIndex.load(folder, model, processor, faiss=faiss)
    of_texts = index.search(text=list(texts), k=k, rerank=rerank) if texts else []
    of_images = index.search(image=list(images), k=k) if images else []
    return [
        *({"text": text, "results": rows} for text, rows in zip(texts, of_texts, strict=True)),
        *({"image": image, "results": rows} for image, rows in zip(images, of_images, strict=True)),
    ]
