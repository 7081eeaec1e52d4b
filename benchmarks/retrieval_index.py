"""Speed of a gallery of 100,000 images: exact search and FAISS, and re-ranking from what is kept on disk.

Features are random unit vectors around 1,000 random centers, as pictures of the same things have them; what
is kept for re-ranking is that of the base X-VLM at 384 pixels with random weights. Prints the tables of
docs/benchmarks.md:

    python benchmarks/retrieval_index.py

N: images, P: width of a feature, S: image tokens, W: image width.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import build_parser, in_turn, machine, median, seconds
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


def random_features(count: int) -> Tensor:
    """(count, P) of length 1, each near one of the centers."""
    centers = F.normalize(torch.randn(CENTERS, WIDTH), dim=-1)
    near = centers[torch.randint(CENTERS, (count,))]
    return F.normalize(near + SPREAD * torch.randn(count, WIDTH), dim=-1)


def write_and_open(folder: Path, features: Tensor) -> Tensor:
    """Through the files of an index, without states."""
    pieces = Pieces(folder)
    print(f"Written in {seconds(lambda: write(pieces, features)):.1f} s; ", end="")
    start = time.perf_counter()
    read = Pieces(folder).features()
    print(f"opened and read in {time.perf_counter() - start:.1f} s.")
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
        start = time.perf_counter()
        ways[f"FAISS {factory}"] = FaissSearch(features, factory)
        build[f"FAISS {factory}"] = time.perf_counter() - start
    exact = nearest(features, queries, BEST)[0]
    single = in_turn({name: partial(way, queries[:1], BEST) for name, way in ways.items()}, 10 * rounds)
    batch = in_turn({name: partial(way, queries, BEST) for name, way in ways.items()}, rounds)
    print(f"\n| way | built in | one query | each of {QUERIES} | found of the {BEST} nearest |")
    print("|---|---|---|---|---|")
    for name, way in ways.items():
        found = way(queries, BEST)[0]
        share = sum(len(set(one) & set(two)) for one, two in zip(found, exact, strict=True))
        print(
            f"| {name} | {build[name]:.1f} s | {1e3 * median(single, name):.1f} ms | "
            f"{1e3 * median(batch, name) / QUERIES:.2f} ms | {share / BEST / QUERIES:.0%} |"
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
            ways = {count: partial(index.search, CAPTION, rerank=count) for count in (0, CANDIDATES)}
            times = in_turn(ways, rounds)
            size = sum(file.stat().st_size for file in index.folder.iterdir()) / CANDIDATES
            print(
                f"| {states}, {dtype} | {size / 2**20:.2f} MiB | {size * 1e5 / 2**30:.0f} GiB | "
                f"{1e3 * median(times, 0):.0f} ms | {median(times, CANDIDATES):.2f} s | {difference:.0e} |"
            )


def as_output(embeds: Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(embeds, F.normalize(embeds[:, 0, :WIDTH], dim=-1))


def main():
    options = build_parser(__doc__).parse_args()
    torch.manual_seed(0)
    print(f"{machine('cpu', 'float32')}.")

    # 1. Features of a large gallery, through files and back, and their search.
    with tempfile.TemporaryDirectory() as folder:
        features, queries = random_features(IMAGES + QUERIES).split([IMAGES, QUERIES])
        print_searches(write_and_open(Path(folder), features), queries, options.rounds)

    # 2. A text against the nearest images.
    print_reranking(options.rounds)


if __name__ == "__main__":
    main()
