"""Recall: the text memories nearest to a query, over several owners, each searched alone.

Owners are never pooled: one search per owner, then a merge by score. Cubes that expired, or that are not
plain text, are passed over and the next ones take their place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import InvalidInputError
from persona_sdk.memory.cube import CubeHeader, TextEncoder, utc_now
from persona_sdk.memory.index import VectorIndex
from persona_sdk.memory.store import MemoryStore


@dataclass(frozen=True)
class Passage:
    """A text memory that was found, and how near it is to the query."""

    id: str
    owner: str
    text: str
    score: float
    created_at: datetime
    header: CubeHeader


class Retriever:
    """Dense search with one embedder over one store."""

    def __init__(self, store: MemoryStore, index: VectorIndex, embedder: TextEncoder) -> None:
        self._store = store
        self._index = index
        self._embedder = embedder

    def recall(
        self, owners: Sequence[str], query: str, k: int = 5, revisions: Mapping[str, int] | None = None
    ) -> list[Passage]:
        """The `k` passages of all `owners` with the best scores, best first.

        Args:
            owners: who is searched; at equal scores an earlier one comes first.
            query: what to look for.
            k: how many passages at most, over all owners.
            revisions: the revision to search, by owner; an owner that is left out is searched at its newest.

        Raises:
            InvalidInputError: the query is empty or `k` is below 1.
            NotFoundError: an owner has no such revision.
        """
        if not query.strip():
            raise InvalidInputError("The query is empty.", hint="Say what to look for.")
        if k < 1:
            raise InvalidInputError(f"k is {k}.", hint="Expected at least 1.")
        if not owners:
            return []
        vector = self._embedder.encode([query])[0]
        at = revisions or {}
        found = [
            passage
            for owner in dict.fromkeys(owners)
            for passage in self._of_owner(owner, vector, k, at.get(owner))
        ]
        return sorted(found, key=lambda passage: -passage.score)[:k]

    def _of_owner(
        self, owner: str, vector: Float[Tensor, "d"], k: int, revision: int | None
    ) -> list[Passage]:
        now, wanted, seen = utc_now(), k, -1
        encoder = self._embedder.fingerprint
        while True:
            hits = self._index.search(owner, vector, wanted, encoder=encoder, revision=revision)
            cubes = self._store.lookup(owner, [cube_id for cube_id, _ in hits])
            found = [
                Passage(cube.id, cube.owner, cube.text, score, cube.header.created_at, cube.header)
                for cube_id, score in hits
                if (cube := cubes.get(cube_id)) and cube.text is not None and not cube.header.expired(now)
            ]
            if len(found) >= k or len(hits) <= seen:
                return found[:k]
            wanted, seen = 2 * wanted, len(hits)
