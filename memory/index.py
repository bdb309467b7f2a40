"""Nearest neighbours among one owner's vectors: FAISS, exact, on the owner's slice.

Scores are inner products: cosines, when the encoder gives unit vectors. Search is exact at every size that a
person reaches. Above `APPROXIMATE_ABOVE` rows, a size only groups and corpora have, an inverted file with
``4 * sqrt(n)`` cells is built over the slice and `PROBES` of them are visited. Rows that were added since are
searched exactly until they are a quarter of it, because building one takes seconds.
"""

from typing import Any, TypeAlias

import faiss
import numpy as np
from jaxtyping import Float, Float32, Int
from torch import Tensor

from persona_sdk.errors import InvalidInputError
from persona_sdk.memory.cube import check_vector
from persona_sdk.memory.ranking import best
from persona_sdk.memory.rows import owned
from persona_sdk.memory.slice_cache import SliceCache
from persona_sdk.memory.slices import APPROXIMATE_ABOVE, Slice

PROBES = 64
_TRAINING = 32  # rows to a cell

Hit: TypeAlias = tuple[str, float]  # cube id, score


class VectorIndex(SliceCache):
    """Searches a store's vectors by owner; thread-safe."""

    def search(
        self, owner: str, query: Float[Tensor, "d"], k: int, *, encoder: str, revision: int | None = None
    ) -> list[Hit]:
        """The `k` texts of `owner`, live at `revision`, with the largest inner product with `query`.

        Best first, equal scores in the order of the cubes; fewer than `k` when there are no more.

        Raises:
            InvalidInputError: `k` is below 1, or the query does not fit the vectors.
            NotFoundError: the owner has no such revision.
        """
        if k < 1:
            raise InvalidInputError(f"k is {k}.", hint="Expected at least 1.")
        vector = check_vector(query, encoder).numpy()
        with self._store.reading() as connection:
            found = self.get(connection, owner, encoder, revision=revision)
            if not found.ids:
                return []
            rows, scores = nearest(found, vector, k)
            hits = sorted(zip((-scores).tolist(), rows.tolist(), strict=True))
            ids = [found.ids[row] for _, row in hits]
            # Fail closed: whatever a slice holds, only what is the owner's at this moment leaves it.
            mine = owned(connection, owner, ids)
        return [(name, -score) for name, (score, _) in zip(ids, hits, strict=True) if name in mine]


def nearest(
    found: Slice, query: Float32[np.ndarray, " d"], k: int
) -> tuple[Int[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
    """Rows and scores of the `k` nearest vectors of a slice, best first.

    Raises:
        InvalidInputError: the query has another length than the vectors.
    """
    _require_length(found, query)
    wanted = min(k, len(found.ids))
    if len(found.ids) > APPROXIMATE_ABOVE:
        return _approximately(found, query, wanted)
    scores, rows = faiss.knn(query[None], found.vectors, wanted, metric=faiss.METRIC_INNER_PRODUCT)
    return rows[0], scores[0]


def dense_scores(
    found: Slice, query: Float32[np.ndarray, " d"], *, fetch: int = 1000
) -> Float32[np.ndarray, " n"]:
    """The inner product of every row of a slice with the query.

    In a slice that is searched approximately, rows beyond the best `fetch` get the least score of those.

    Raises:
        InvalidInputError: the query has another length than the vectors.
    """
    _require_length(found, query)
    if len(found.ids) <= APPROXIMATE_ABOVE:
        exact: np.ndarray[Any, np.dtype[np.float32]] = found.vectors @ query
        return exact
    rows, scores = nearest(found, query, fetch)
    everything = np.full(len(found.ids), scores.min(), np.float32)
    everything[rows] = scores
    return everything


def _approximately(
    found: Slice, query: Float32[np.ndarray, " d"], k: int
) -> tuple[Int[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
    """The best of the inverted file and of the rows behind it."""
    size, file = _inverted_file(found)
    scores, rows = file.search(query[None], k)
    tail = found.vectors[size:] @ query
    every_row = np.concatenate([rows[0], np.arange(size, len(found.ids))])
    every_score = np.concatenate([scores[0], tail])
    every_score[every_row < 0] = -np.inf  # there were fewer than k in the cells that were visited
    chosen = best(every_score, k)
    return every_row[chosen], every_score[chosen]


def _inverted_file(found: Slice) -> tuple[int, Any]:
    """The slice's inverted file and how many of its rows are in it; built when it is first searched."""
    kept: tuple[int, Any] | None = found.derived.get("inverted file")
    if kept is not None and len(found.ids) - kept[0] <= kept[0] // 4:
        return kept
    size, width = found.vectors.shape
    cells = int(4 * size**0.5)
    file = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    file.cp.niter, file.cp.seed, file.cp.min_points_per_centroid = 4, 0, 1
    file.train(np.ascontiguousarray(found.vectors[:: max(1, size // (_TRAINING * cells))]))
    file.add(found.vectors)
    file.nprobe = PROBES
    found.derived["inverted file"] = size, file
    return size, file


def _require_length(found: Slice, query: Float32[np.ndarray, " d"]) -> None:
    if len(query) != found.vectors.shape[1]:
        raise InvalidInputError(
            f"The query has length {len(query)}.",
            hint=f"Vectors of this encoder have {found.vectors.shape[1]}.",
        )
