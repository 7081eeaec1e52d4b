"""The nearest of many unit features: exactly, with torch, or with FAISS. N: rows, Q: queries, P: width."""

from torch import Tensor

CALL = 2**26  # scores that are held at a time


def nearest(features: Tensor, queries: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Places and cosines of the `k` rows of `features` (N, P) that are nearest to each of `queries` (Q, P),
    nearest first; of equal ones the first in the index comes first, as in a stable sort of all."""
    places, cosines = [], []
    for block in queries.split(max(CALL // len(features), 1)):
        for scores in block @ features.T:
            worst = scores.topk(min(k, len(scores))).values[-1]
            best = (scores >= worst).nonzero()[:, 0]
            best = best[scores[best].argsort(descending=True, stable=True)][:k]
            places.append(best.tolist())
            cosines.append(scores[best].tolist())
    return places, cosines


class FaissSearch:
    """`nearest` by a FAISS index of inner products, as `faiss.index_factory` makes it: "Flat" is exact,
    "HNSW32" or "IVF1024,Flat" find most of what is near.

    Raises:
        ImportError: FAISS is not installed.
        ValueError: FAISS makes no such index, or has too few rows to train it.
    """

    def __init__(self, features: Tensor, factory: str):
        import faiss

        rows = features.float().cpu().numpy()
        try:
            self._index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            self._index.train(rows)
            self._index.add(rows)
        except RuntimeError as error:
            raise ValueError(f"faiss is {factory!r}, of which FAISS makes no index: {error}") from error

    def __call__(self, queries: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
        cosines, places = self._index.search(queries.float().cpu().numpy(), min(k, self._index.ntotal))
        found = [row >= 0 for row in places]  # an index that is not exact may find fewer
        return (
            [row[there].tolist() for row, there in zip(places, found, strict=True)],
            [row[there].tolist() for row, there in zip(cosines, found, strict=True)],
        )
