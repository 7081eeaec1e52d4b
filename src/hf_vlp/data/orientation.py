"""Batches of images of one orientation, as SOHO's code makes them (arXiv 2104.03135): images of any size are
padded to the largest of their batch, and those wider than tall apart from all others need less of it.
"""

from collections.abc import Iterator

import datasets
import numpy as np

from ..images import load_image
from .mixing import MixedBatchSampler, MixedDataset


class OrientationBatchSampler(MixedBatchSampler):
    """As `MixedBatchSampler` of images alone; each batch holds only images wider than tall or only others.

    Rows need the columns `width` and `height`, in pixels (`with_image_sizes`). In each epoch both
    orientations are shuffled and filled to whole batches with some of their rows again, then the batches are
    shuffled. An incomplete last run is dropped.

    Raises:
        ValueError: rows lack the columns, there is a dataset of regions, or fewer rows than a run.
    """

    def __init__(self, dataset: MixedDataset, batch_size: int, run_length: int = 1, seed: int = 42):
        if "region" in dataset.rows:
            raise ValueError("dataset has regions; batches of one orientation are for images alone")
        is_wide = wider_than_tall(dataset.rows["image"])
        self.orientations = [
            indices for indices in (np.flatnonzero(is_wide), np.flatnonzero(~is_wide)) if indices.size
        ]
        super().__init__(dataset, batch_size, run_length=run_length, seed=seed)

    def _count_image_batches(self) -> int:
        return sum(-(-len(indices) // self.batch_sizes["image"]) for indices in self.orientations)

    def _image_indices(self, epoch: int) -> Iterator[int]:
        rng, batch_size = self._rng("image", epoch), self.batch_sizes["image"]
        batches = []
        for indices in self.orientations:
            shuffled = rng.permutation(indices)
            whole = -(-len(shuffled) // batch_size) * batch_size
            batches.append(np.resize(shuffled, whole).reshape(-1, batch_size))  # repeats from its beginning
        return iter(rng.permutation(np.concatenate(batches)).ravel())


def wider_than_tall(rows: datasets.Dataset | list[dict]) -> np.ndarray:
    """(rows,) bool: width / height above 1; a square is not wide."""
    columns = rows.column_names if isinstance(rows, datasets.Dataset) else rows[0]
    if not {"width", "height"} <= set(columns):
        raise ValueError(
            "group_by_orientation needs the columns width and height, in pixels; add them "
            "(`hf_vlp.data.orientation.with_image_sizes`) or leave it at False"
        )
    if isinstance(rows, datasets.Dataset):
        rows = rows.select_columns(["width", "height"])  # images stay unread
    return np.array([row["width"] > row["height"] for row in rows])


def with_image_sizes(rows: datasets.Dataset) -> datasets.Dataset:
    """`rows` with the columns `width` and `height` of their `image`, in pixels; reads every image once."""
    return rows.map(_image_size)


def _image_size(row: dict) -> dict[str, int]:
    width, height = load_image(row["image"]).size
    return {"width": width, "height": height}
