"""Rows of a gallery in files, each there whole or not at all.

A piece is one safetensors file: `features` (n, P) float32, `states` (n, ...) where there are any, and the ids
in its header. N: rows, P: width of a feature.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PIECE_BYTES = 2**28  # from which on what is collected is written


class Pieces:
    """The rows in `folder`; `features` are read when asked for, `states` stay on disk, mapped.

    Raises:
        ValueError: a file that is not whole, or an id that comes twice.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ids: list[str] = []
        self._known: set[str] = set()
        self._files, self._ends = [], []  # of each piece: the open file, and the place behind its last row
        for path in sorted(folder.glob("piece-*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._known

    def features(self) -> Tensor:
        """(N, P), in the order in which rows were written."""
        return torch.cat([file.get_tensor("features") for file in self._files])

    def states(self, places: Sequence[int]) -> Tensor:
        """(n, ...) of the rows at these places."""
        return torch.cat([self._state(place) for place in places])

    def next_path(self) -> Path:
        """Of the next piece.

        Raises:
            ValueError: somebody else has written it.
        """
        path = self.folder / f"piece-{len(self._files):05d}.safetensors"
        if path.exists():
            raise ValueError(f"{path} was written by another process or index; load the index again")
        return path

    def write(self, ids: Sequence[str], features: Tensor, states: Tensor | None) -> None:
        """Add rows as a piece of their own.

        Raises:
            ValueError: an id that is there already, or twice among these, or somebody else has written.
        """
        self.check_new(ids)
        tensors = {"features": features.float().contiguous().cpu()}
        if states is not None:
            tensors["states"] = states.contiguous().cpu()
        path = self.next_path()
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            save_file(tensors, unfinished, metadata={"ids": json.dumps(list(ids))})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._open(path)

    def copy_to(self, folder: Path) -> None:
        """Write all rows to the empty `folder`, in pieces of full size."""
        copy = Pieces(folder)
        features, start = self.features() if self._files else None, 0
        for stop in self._stops():
            rows = range(start, stop)
            copy.write(
                self.ids[start:stop], features[start:stop], self.states(rows) if self.has_states else None
            )
            start = stop

    @property
    def has_states(self) -> bool:
        return bool(self._files) and "states" in self._files[0].keys()  # noqa: SIM118, no dict

    def check_new(self, ids: Sequence[str], seen: set[str] | None = None) -> None:
        """Raise ValueError for an id that is there already, or comes twice among these and those in `seen`,
        which grows by them."""
        seen = set() if seen is None else seen
        for row_id in ids:
            if row_id in self._known or row_id in seen:
                raise ValueError(f"id {row_id!r} comes twice, or is in the index; give each image its own")
            seen.add(row_id)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")  # compares the length of the file with its header
            ids = json.loads(file.metadata()["ids"])
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a whole piece of an index ({error}); remove it") from error
        self.check_new(ids)
        self._files.append(file)
        self.ids += ids
        self._known.update(ids)
        self._ends.append(len(self.ids))

    def _state(self, place: int) -> Tensor:
        piece = bisect_right(self._ends, place)
        start = self._ends[piece - 1] if piece else 0
        return self._files[piece].get_slice("states")[place - start : place - start + 1]

    def _stops(self) -> Iterator[int]:
        """Where pieces of full size end."""
        row = 1
        if self.has_states and len(self):
            state = self._state(0)
            row = state.numel() * state.element_size()
        size = max(PIECE_BYTES // max(row, 4096), 1)
        yield from range(size, len(self), size)
        if len(self):
            yield len(self)
