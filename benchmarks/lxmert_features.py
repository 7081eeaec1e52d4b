"""Region features from a store on disk, against a TSV decoded into memory as the official loader does.

Writes a TSV of random features like the published ones (36 regions of width 2048), converts it, and takes
shuffled batches from both in turn, each time in a new process, with files in the cache of the system. Prints
the table of docs/benchmarks.md, medians of all processes:

    python benchmarks/lxmert_features.py
"""

import base64
import csv
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measuring import build_parser, in_new_process, machine, seconds

from hf_vlp.data.features import RegionStore, convert_features
from hf_vlp.models.regions import stack_regions

REGIONS, DIM = 36, 2048
WIDTH, HEIGHT = 640, 480
EPOCHS = 5
COLUMNS = (
    *("img_id", "img_h", "img_w", "object_ids", "object_scores", "attribute_ids", "attribute_scores"),
    *("num_boxes", "boxes", "features"),
)
DTYPES = {"object_ids": np.int64, "attribute_ids": np.int64}  # the others are float32


class Cost(NamedTuple):
    """Seconds until the first row can be taken, rows per second after it, MiB resident beyond the imports.

    `held` is memory of the process itself, `mapped` belongs to files and can be taken back by the system.
    """

    start: float
    rate: float
    held: float
    mapped: float


def write_tsv(path: Path, images: int):
    """Ten columns, sparse non-negative features."""
    draw = np.random.default_rng(0)
    with open(path, "w") as file:
        for index in range(images):
            corners = np.sort(draw.random((REGIONS, 2, 2), np.float32), axis=1).reshape(REGIONS, 4)
            features = draw.exponential(1.2, (REGIONS, DIM)) * (draw.random((REGIONS, DIM)) > 0.3)
            features[0, 0] = 30
            arrays = [
                draw.integers(0, 1600, REGIONS),
                draw.random(REGIONS, np.float32),
                draw.integers(0, 400, REGIONS),
                draw.random(REGIONS, np.float32),
                corners * np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32),
                features.astype(np.float32),
            ]
            texts = [base64.b64encode(array.tobytes()).decode() for array in arrays]
            cells = [f"image{index}", str(HEIGHT), str(WIDTH), *texts[:4], str(REGIONS), *texts[4:]]
            file.write("\t".join(cells) + "\n")


def decode_all(path: Path) -> dict[str, dict]:
    """All rows in memory, read with `csv`."""
    csv.field_size_limit(2**31 - 1)
    rows = {}
    with open(path) as file:
        for line in csv.DictReader(file, COLUMNS, delimiter="\t"):
            row = {
                name: np.frombuffer(base64.b64decode(line[name]), DTYPES.get(name, np.float32))
                for name in (*COLUMNS[3:7], "boxes", "features")
            }
            height, width = int(line["img_h"]), int(line["img_w"])
            row["boxes"] = row["boxes"].reshape(-1, 4) / np.array([width, height] * 2, np.float32)
            row["features"] = row["features"].reshape(-1, DIM)
            rows[line["img_id"]] = row | {"image_size": np.array([height, width])}
    return rows


def resident() -> dict[str, float]:
    """MiB of this process, its own and of files."""
    status = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 2**10 for name in ("RssAnon", "RssFile")}


def measure(load: Callable[[Path], Mapping], path: Path, images: int, batch_size: int) -> Cost:
    """Of shuffled epochs, every row once, in batches as a collator makes them."""
    stack_regions([{"features": [[0.0]], "boxes": [[0, 0, 1, 1]], "image_size": [1, 1]}])
    before, rows = resident(), None

    def read():
        nonlocal rows
        rows = load(path)

    def epoch():
        ids = [f"image{index}" for index in range(images)]
        random.shuffle(ids)
        for first in range(0, images, batch_size):
            stack_regions([rows[name] for name in ids[first : first + batch_size]])

    start = seconds(read)
    took = statistics.median(seconds(epoch) for _ in range(EPOCHS))
    after = resident()
    held, mapped = (after[name] - before[name] for name in ("RssAnon", "RssFile"))
    return Cost(start, images / took, held, mapped)


def main():
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    print(machine("cpu", "float32"))
    with tempfile.TemporaryDirectory() as folder:
        tsv, store = Path(folder) / "rows.tsv", Path(folder) / "store"
        write_tsv(tsv, args.images)
        converting = seconds(lambda: convert_features(tsv, store, progress=False))
        size = sum(file.stat().st_size for file in store.iterdir())
        print(
            f"{args.images} images, {REGIONS} x {DIM}: TSV {tsv.stat().st_size / 2**20:.0f} MiB, store "
            f"{size / 2**20:.0f} MiB, converted once at {args.images / converting:.0f} images/s\n"
        )
        print("| way | until the first row | images/s, shuffled batches | memory held | mapped |")
        print("|---|---|---|---|---|")
        ways = {"decoded TSV": (decode_all, tsv), "store": (RegionStore, store)}
        costs = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                costs[name].append(in_new_process(measure, *way, args.images, args.batch_size))
        for name, found in costs.items():
            start, rate, held, mapped = map(statistics.median, zip(*found, strict=True))
            rates = [cost.rate for cost in found]
            print(
                f"| {name} | {start:.2f} s | {rate:.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
                f"{held:.0f} MiB | {mapped:.0f} MiB |"
            )


if __name__ == "__main__":
    main()
