"""Speed of a gallery of 100,000 images: exact search and FAISS, and re-ranking from what is kept on disk.

Features are random unit vectors around 1,000 random centers, as pictures of the same things have them; what
is kept for re-ranking is that of the base X-VLM at 384 pixels with random weights. Prints the tables of
docs/benchmarks.md:

    python benchmarks/retrieval_index.py

Times are those of the processor, on one thread, so that other work on the machine hardly changes them; files
are in the cache of the system. N: images, P: width of a feature, S: image tokens, W: image width.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import torch
import torch.nn.functional as F
from measuring import machine
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from xvlm_reranking import build_model

from hf_vlp import RetrievalIndex, XVLMForRetrieval, XVLMImageProcessor, XVLMProcessor
from hf_vlp.data.shapes import vocabulary
from hf_vlp.evaluation.retrieval import ReadTexts, rerank
from hf_vlp.quickstart import word_tokenizer
from hf_vlp.retrieval_index.nearest import FaissSearch, nearest
from hf_vlp.retrieval_index.pieces import Pieces

IMAGES, WIDTH, BEST, QUERIES = 100_000, 256, 10, 64
CENTERS, SPREAD = 1000, 0.05  # so that two features of a center have a cosine of 0.6 or so
CANDIDATES, TOKENS, IMAGE_WIDTH = 128, 145, 1024
CAPTION = "a red circle left of a blue square and a green cross"  # of 12 word pieces with [CLS]
KEPT = {("key_values", "float32"): 1e-5, ("key_values", "float16"): 1e-3, ("embeds", "float32"): 1e-5}
KEPT |= {("embeds", "float16"): 1e-3}  # what is kept: how far scores may be from those of the evaluation


def seconds(work: Callable[[], object], rounds: int = 1) -> float:
    """Of the processor, the median of all rounds; one before warms up where there are several."""
    times = []
    for _ in range(rounds + (rounds > 1)):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[-rounds:])


def random_features(count: int) -> Tensor:
    """(count, P) of length 1, each near one of the centers."""
    centers = F.normalize(torch.randn(CENTERS, WIDTH), dim=-1)
    near = centers[torch.randint(CENTERS, (count,))]
    return F.normalize(near + SPREAD * torch.randn(count, WIDTH), dim=-1)


def write_and_open(folder: Path, features: Tensor) -> Tensor:
    """Through the files of an index, without states."""
    pieces = Pieces(folder)
    print(f"Written in {seconds(lambda: write(pieces, features)):.1f} s; ", end="")
    print(f"opened and read in {seconds(lambda: Pieces(folder).features()):.1f} s.")
    read = Pieces(folder).features()
    assert torch.equal(read, features)
    return read


def write(pieces: Pieces, features: Tensor):
    ids = [str(i) for i in range(len(features))]
    for start in range(0, len(features), 32_768):
        pieces.write(ids[start : start + 32_768], features[start : start + 32_768], None)


def print_searches(features: Tensor, queries: Tensor, rounds: int):
    """Of each way, the time to build it and to search, and how much of the exact result it finds."""
    ways: dict[str, Callable] = {"torch, exact": partial(nearest, features)}
    build = dict.fromkeys(ways, 0.0)
    for factory in ("Flat", "IVF256,Flat", "HNSW16"):
        name = f"FAISS {factory}"
        build[name] = seconds(lambda f=factory, n=name: ways.update({n: FaissSearch(features, f)}))
    exact = nearest(features, queries, BEST)[0]
    print(f"\n| way | built in | one query | each of {QUERIES} | found of the {BEST} nearest |")
    print("|---|---|---|---|---|")
    for name, way in ways.items():
        found = way(queries, BEST)[0]
        share = sum(len(set(one) & set(two)) for one, two in zip(found, exact, strict=True))
        single = seconds(partial(way, queries[:1], BEST), 10 * rounds)
        each = seconds(partial(way, queries, BEST), rounds) / QUERIES
        print(
            f"| {name} | {build[name]:.1f} s | {1e3 * single:.2f} ms | {1e3 * each:.2f} ms | "
            f"{share / BEST / QUERIES:.0%} |"
        )


def evaluated(model: XVLMForRetrieval, processor: XVLMProcessor, embeds: Tensor) -> Tensor:
    """Match logits (N,) of the caption with images (N, S, W), as `evaluate_retrieval` scores them."""
    tokens = processor(text=[CAPTION])
    words = model.get_text_features(**tokens).last_hidden_state
    read = model.read_words(words, tokens["attention_mask"])[0]
    texts = ReadTexts(read, torch.tensor([0]), torch.tensor([len(read)]))
    return rerank(model, embeds, texts, torch.ones(len(embeds), 1, dtype=torch.bool))[:, 0]


def print_reranking(rounds: int):
    """Of each kind of what is kept, its size, and the time to search a text and re-rank the candidates."""
    model = build_model("cpu", torch.float32)
    processor = XVLMProcessor(XVLMImageProcessor(), word_tokenizer(vocabulary()))
    embeds = F.layer_norm(torch.randn(CANDIDATES, TOKENS, IMAGE_WIDTH), (IMAGE_WIDTH,))
    images = [Image.fromarray(torch.randint(255, (8, 8, 3), dtype=torch.uint8).numpy()) for _ in embeds]
    with torch.inference_mode():
        expected = evaluated(model, processor, embeds)
    print(
        "\n| kept of an image | its size | of 100,000 | search without | with re-ranking | scores differ by |"
    )
    print("|---|---|---|---|---|---|")
    for (states, dtype), tolerance in KEPT.items():
        with tempfile.TemporaryDirectory() as folder:
            index = RetrievalIndex(model, processor, Path(folder) / "index", states, dtype)
            rows = iter(embeds.split(32))  # in place of the trunk's, which are not what is measured
            model.get_image_features = lambda pixel_values, rows=rows: as_output(next(rows))
            index.add(images, ids=range(CANDIDATES), batch_size=32)
            found = index.search(text=CAPTION, k=CANDIDATES, rerank=CANDIDATES)
            scores = torch.tensor([row["score"] for row in found])
            difference = (scores - expected[[int(row["id"]) for row in found]]).abs().max().item()
            assert difference < tolerance, f"{states}, {dtype}: scores differ by {difference}"
            without, ranked = (
                seconds(partial(index.search, CAPTION, rerank=count), rounds) for count in (0, CANDIDATES)
            )
            size = sum(file.stat().st_size for file in index.folder.iterdir()) / CANDIDATES
            print(
                f"| {states}, {dtype} | {size / 2**20:.2f} MiB | {size * 1e5 / 2**30:.0f} GiB | "
                f"{1e3 * without:.0f} ms | {ranked:.2f} s | {difference:.0e} |"
            )


def as_output(embeds: Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(embeds, F.normalize(embeds[:, 0, :WIDTH], dim=-1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is measured")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    print(f"{machine('cpu', 'float32')}.")

    # 1. Features of a large gallery, through files and back, and their search.
    with tempfile.TemporaryDirectory() as folder:
        features, queries = random_features(IMAGES + QUERIES).split([IMAGES, QUERIES])
        print_searches(write_and_open(Path(folder), features), queries, options.rounds)

    # 2. A text against the nearest images.
    print_reranking(options.rounds)


if __name__ == "__main__":
    main()
