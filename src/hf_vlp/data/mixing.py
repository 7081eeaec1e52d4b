"""Mixing image batches and region batches as X-VLM does (arXiv 2111.08276): per iteration, with probability
`region_probability` one region step, then always one image step. What comes when depends on (seed, epoch)
alone.

Map-style, in a Trainer's `get_train_dataloader`:

    sampler = MixedBatchSampler(dataset, batch_size, run_length=world_size * accumulation_steps, seed=seed)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=...)
    return self.accelerator.prepare(loader)

accelerate hands batch i to process i mod W. The sampler yields `run_length` consecutive batches of one kind,
so all processes, and all micro-batches of an optimizer step, are of one kind. Rows come with two keys more:
"kind", "image" or "region", which `MixedCollator` reads; "sample_seed", from which a collator draws
everything random in its batch. So a run resumed through accelerate's `skip_first_batches` sees exactly what
the undisturbed run saw, also with other numbers of workers. With one dataset only this is a shuffled loader
with the same guarantee, for any task. An epoch is one pass over the images and has the same number of batches
each time. The Trainer needs `remove_unused_columns=False`, and with accelerate versions that refuse batches
of unequal size in several processes `accelerator_config={"even_batches": False}`, which changes nothing else
here.

Streaming: `MixedStream` is a torch `IterableDataset` for `Trainer(train_dataset=...)` with `max_steps` and
`accelerator_config={"dispatch_batches": False}`; each process reads the whole stream and keeps its share, so
do not split the streams by node. It has no end, since the Trainer, which counts the epochs of a stream
wrongly after a resume, resumes exactly within the first: it reads again and drops what was seen.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

Key = tuple[str, int, int]  # kind, index in its dataset, sample_seed


class MixedDataset(Dataset):
    """Map-style rows of one or two kinds, read with the keys (kind, index, sample_seed) of a
    `MixedBatchSampler`.

    It holds the epoch, because accelerate's loaders pass `set_epoch` on to a dataset in every set-up, and to
    a batch sampler only in some.
    """

    def __init__(self, image: Any, region: Any | None = None):
        self.rows = {"image": image} if region is None else {"image": image, "region": region}
        self.epoch = 0
        for kind, rows in self.rows.items():
            if len(rows) == 0:
                raise ValueError(f"{kind} holds no rows; give a dataset with at least one batch")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def __getitem__(self, key: Key) -> dict[str, Any]:
        kind, index, sample_seed = key
        return {**self.rows[kind][index], "kind": kind, "sample_seed": sample_seed}


class MixedBatchSampler(Sampler[list[Key]]):
    """Batches of keys into a `MixedDataset`: runs of `run_length` batches of one kind.

    Images are shuffled anew each epoch and an incomplete last run is dropped. Regions go on from epoch to
    epoch: each of their passes is shuffled anew, none is cut short. The share of iterations with a region
    step is exactly `region_probability`, rounded, in every epoch; which ones is random.
    """

    batch_size = None  # tells accelerate that batches differ in size
    drop_last = True

    def __init__(
        self,
        dataset: MixedDataset,
        batch_size: int,
        region_batch_size: int | None = None,
        region_probability: float = 0.5,
        run_length: int = 1,
        seed: int = 42,
    ):
        if batch_size < 1 or run_length < 1 or (region_batch_size is not None and region_batch_size < 1):
            raise ValueError(
                f"batch_size={batch_size}, region_batch_size={region_batch_size}, run_length={run_length}; "
                "give 1 or more"
            )
        if not 0 <= region_probability <= 1:
            raise ValueError(f"region_probability is {region_probability}; give a number from 0 to 1")
        self.dataset = dataset
        self.batch_sizes = {"image": batch_size, "region": region_batch_size or batch_size}
        self.run_length, self.seed = run_length, seed
        self.iterations = self._count_image_batches() // run_length
        self.region_steps = round(region_probability * self.iterations) if "region" in dataset.rows else 0
        if self.iterations == 0:
            raise ValueError(
                f"the image dataset has {len(dataset.rows['image'])} rows, fewer than batch_size "
                f"{batch_size} x run_length {run_length}; give more rows or a smaller batch"
            )

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return (self.iterations + self.region_steps) * self.run_length

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.dataset.epoch
        indices = {"image": self._image_indices(epoch), "region": self._region_indices(epoch)}
        with_region = self._rng("iterations", epoch).permutation(self.iterations) < self.region_steps
        step = 0
        for region_first in with_region:
            for kind in ("region", "image") if region_first else ("image",):
                for run in range(self.run_length):
                    seed = sample_seed(self.seed, epoch, step, run)
                    yield [(kind, int(i), seed) for i in islice(indices[kind], self.batch_sizes[kind])]
                step += 1

    def _count_image_batches(self) -> int:
        return len(self.dataset.rows["image"]) // self.batch_sizes["image"]

    def _image_indices(self, epoch: int) -> Iterator[int]:
        return iter(self._rng("image", epoch).permutation(len(self.dataset.rows["image"])))

    def _region_indices(self, epoch: int) -> Iterator[int]:
        """Endless: begins where the epoch before left off."""
        if not self.region_steps:
            return
        size = len(self.dataset.rows["region"])
        drawn = epoch * self.region_steps * self.run_length * self.batch_sizes["region"]
        number, offset = divmod(drawn, size)
        while True:
            yield from self._rng("region", number).permutation(size)[offset:]
            number, offset = number + 1, 0

    def _rng(self, use: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, ("iterations", "image", "region").index(use), number])


def sample_seed(*numbers: int) -> int:
    """One 63-bit seed out of several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class MixedStream(IterableDataset):
    """Two streams as one without end: runs of `batch_size * run_length` rows of one kind; both kinds have the
    one batch size.

    Each stream begins again when it is through, with `set_epoch(pass)`, so that its own shuffling goes on. It
    is the same in all processes and each time it is read. With several DataLoader workers each stream needs
    at least as many shards (else ValueError).
    """

    def __init__(
        self,
        image: datasets.IterableDataset,
        region: datasets.IterableDataset | None = None,
        batch_size: int = 1,
        region_probability: float = 0.5,
        run_length: int = 1,
        seed: int = 42,
    ):
        if batch_size < 1 or run_length < 1:
            raise ValueError(f"batch_size is {batch_size}, run_length {run_length}; give 1 or more")
        if not 0 <= region_probability <= 1:
            raise ValueError(f"region_probability is {region_probability}; give a number from 0 to 1")
        self.streams = {"image": image} if region is None else {"image": image, "region": region}
        self.run, self.region_probability, self.seed = batch_size * run_length, region_probability, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        rng = np.random.default_rng([self.seed, worker_id])
        rows = {kind: _endless(stream, kind) for kind, stream in self.streams.items()}
        number = 0
        while True:
            region_first = "region" in rows and rng.random() < self.region_probability
            for kind in ("region", "image") if region_first else ("image",):
                for row in islice(rows[kind], self.run):
                    yield {**row, "kind": kind, "sample_seed": sample_seed(self.seed, worker_id, number)}
                    number += 1


def _endless(stream: datasets.IterableDataset, kind: str) -> Iterator[dict[str, Any]]:
    stream = copy.deepcopy(stream)  # workers share the epoch of a stream, and each has its own pass
    for number in count():
        stream.set_epoch(number)
        row = None
        for row in stream:
            yield row
        if row is None:
            raise ValueError(
                f"the {kind} stream has no rows for this DataLoader worker; give as many files (shards) "
                "as dataloader_num_workers, or fewer workers"
            )


class MixedCollator:
    """Hands a batch of one kind to that kind's collator."""

    def __init__(self, image: Callable[[Sequence[dict]], dict], region: Callable[[Sequence[dict]], dict]):
        self.collators = {"image": image, "region": region}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        kinds = {row["kind"] for row in rows}
        if len(kinds) != 1:
            raise ValueError(
                f"the batch mixes rows of the kinds {sorted(kinds)}; for MixedDataset use MixedBatchSampler, "
                "for MixedStream the batch_size it was built with"
            )
        return self.collators[kinds.pop()](rows)
