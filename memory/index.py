"""Nearest neighbours among one owner's vectors: FAISS, exact, held in memory only.

Each owner has an index of its own, so a search cannot reach anybody else's vectors. No index file is ever
written or read: building a flat index is one copy of memory, while a file would be one more thing to
trust, to leak and to erase. An index carries the stamp its owner had when it was read and is extended or
rebuilt when that has changed, also by another process. It is dropped when something is forgotten.

Scores are inner products: cosines, when the encoder gives unit vectors.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import faiss
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory.cube import check_vector
from persona_sdk.memory.store import MemoryStore

Hit: TypeAlias = tuple[str, float]  # cube id, score


@dataclass
class _Entry:
    """One owner's flat index. ``lock`` is held while it is searched or extended."""

    revision: int
    stamp: str
    ids: list[str]
    flat: Any
    lock: Any = field(default_factory=threading.Lock)

    @property
    def bytes(self) -> int:
        return int(self.flat.ntotal * self.flat.d * 4)


class VectorIndex:
    """Searches a store's vectors; thread-safe. The least recently used indexes go beyond `max_bytes`."""

    def __init__(self, store: MemoryStore, *, max_bytes: int = 256 << 20) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._lock = threading.Lock()
        store.on_forget(self.drop)

    @property
    def bytes(self) -> int:
        """Bytes of vectors in memory."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    def search(
        self, owner: str, query: Float[Tensor, "d"], k: int, *, encoder: str, revision: int | None = None
    ) -> list[Hit]:
        """The `k` vectors of `owner`, live at `revision`, with the largest inner product with `query`.

        Best first, equal scores in the order of the cubes; fewer than `k` when there are no more.

        Raises:
            InvalidInputError: `k` is below 1, or the query does not fit the vectors.
            NotFoundError: the owner has no such revision.
        """
        if k < 1:
            raise InvalidInputError(f"k is {k}.", hint="Expected at least 1.")
        query = check_vector(query, encoder)
        try:
            entry, rows, scores = self._scan(owner, query, k, encoder, revision)
        except NotFoundError:
            if revision is not None:
                raise
            return []  # the persona was erased while its index was built
        best = sorted((-float(s), int(r)) for s, r in zip(scores, rows, strict=True) if r >= 0)
        hits = [(entry.ids[row], -score) for score, row in best]
        # Fail closed: whatever an index holds, only what is the owner's at this moment leaves it.
        owned = self._store.lookup(owner, [cube_id for cube_id, _ in hits])
        return [hit for hit in hits if hit[0] in owned and owned[hit[0]].owner == owner]

    def _scan(
        self, owner: str, query: Float[Tensor, "d"], k: int, encoder: str, revision: int | None
    ) -> tuple[_Entry, Any, Any]:
        """The index that was searched, and the rows and scores it found."""
        head, stamp = self._store.mark(owner)
        at = head if revision is None else revision
        entry = (
            self._current(owner, encoder, head, stamp)
            if at == head
            else self._read(owner, encoder, at, stamp)
        )
        while True:
            with entry.lock:
                if entry.revision == at:
                    rows, scores = self._nearest(entry, query, k)
                    return entry, rows, scores
            entry = self._read(owner, encoder, at, stamp)  # another thread has moved the shared index on

    @staticmethod
    def _nearest(entry: _Entry, query: Float[Tensor, "d"], k: int) -> tuple[Any, Any]:
        if not entry.ids:
            return (), ()
        if query.numel() != entry.flat.d:
            raise InvalidInputError(
                f"The query has length {query.numel()}.", hint=f"Vectors of this encoder have {entry.flat.d}."
            )
        scores, rows = entry.flat.search(query.numpy()[None], min(k, len(entry.ids)))
        return rows[0], scores[0]

    def drop(self, owner: str | None = None) -> None:
        """Let go of the indexes of an owner, or of all."""
        with self._lock:
            for key in [key for key in self._entries if owner is None or key[0] == owner]:
                del self._entries[key]

    def _read(self, owner: str, encoder: str, revision: int, stamp: str) -> _Entry:
        # The stamp was read before: content that is newer than its stamp is read again, never the reverse.
        ids, matrix = self._store.vectors(owner, encoder, revision=revision)
        flat = faiss.IndexFlatIP(max(matrix.shape[1], 1))
        if ids:
            flat.add(_array(matrix))
        return _Entry(revision, stamp, ids, flat)

    def _current(self, owner: str, encoder: str, head: int, stamp: str) -> _Entry:
        key = (owner, encoder)
        with self._lock:
            entry = self._entries.get(key)
        if entry is None or not self._refresh(owner, encoder, entry, head, stamp):
            entry = self._read(owner, encoder, head, stamp)
        with self._lock:
            if entry.ids:
                self._entries[key] = entry
                self._entries.move_to_end(key)
            while len(self._entries) > 1 and sum(e.bytes for e in self._entries.values()) > self._max_bytes:
                self._entries.popitem(last=False)
        return entry

    def _refresh(self, owner: str, encoder: str, entry: _Entry, head: int, stamp: str) -> bool:
        """Bring an index up to date by appending; False when it must be built anew."""
        with entry.lock:
            if stamp == entry.stamp:
                return True
            have = len(entry.ids)
            now = self._store.vector_ids(owner, encoder, revision=head)
            if now[:have] != entry.ids:
                return False
            ids, matrix = self._store.vectors(owner, encoder, revision=head, skip=have)
            if ids != now[have:]:
                return False
            if ids:
                entry.flat.add(_array(matrix))
            entry.ids.extend(ids)
            entry.revision, entry.stamp = head, stamp
            return True


def _array(matrix: Float[Tensor, "n d"]) -> np.ndarray[Any, np.dtype[np.float32]]:
    array: np.ndarray[Any, np.dtype[np.float32]] = np.ascontiguousarray(matrix.to(torch.float32).numpy())
    return array
