"""Recall: the text memories that answer a query, over several owners, each searched alone.

    encode ─► slice of each owner ─► cosines + words (fusion) ─► validity, dates, age, trust (scoring)
           ─► merge ─► MMR ─► cross-encoder, if there is one ─► texts, read by owner and id ─► passages

Owners are never pooled: each has a slice of its own, and what it yields depends on nobody else's rows. Scores
are in units of the cosine, so that they can be compared over owners and with a threshold. The texts are read
from SQL by owner and id, in the transaction in which the slices were: what is not the owner's cannot leave.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32
from sqlalchemy import Connection, bindparam, select
from torch import Tensor

from persona_sdk.errors import InvalidInputError
from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory import governance, lexical, ranking
from persona_sdk.memory.cube import CubeHeader, TextEncoder, utc_now
from persona_sdk.memory.dates import parse
from persona_sdk.memory.governance import SYSTEM, Principal
from persona_sdk.memory.index import VectorIndex
from persona_sdk.memory.passage import Passage, Why
from persona_sdk.memory.rows import chunks
from persona_sdk.memory.schema import cubes
from persona_sdk.memory.scoring import Query, Ranked, RetrievalOptions, rank
from persona_sdk.memory.store import MemoryStore

__all__ = ["CrossEncoder", "Passage", "RetrievalOptions", "Retriever", "Why"]

logger = logging.getLogger("persona_sdk.memory")
# Not `rows.lookup`, whose join and other columns make a whole recall 6 % slower.
_TEXTS = select(cubes.c.id, cubes.c.owner, cubes.c.text, cubes.c.header).where(
    cubes.c.owner == bindparam("of"), cubes.c.id.in_(bindparam("ids", expanding=True))
)


_Candidate: TypeAlias = tuple[str, str, float, Why]  # owner, id, score, why


@runtime_checkable
class CrossEncoder(Protocol):
    """Reads query and text together, which is slower and better than comparing vectors."""

    def __call__(self, query: str, texts: Sequence[str]) -> Sequence[float]:
        """One score per text, larger for better."""
        ...


class Retriever:
    """Hybrid search with one embedder over one store. Reads change nothing.

    Args:
        store: what is searched.
        index: the slices in memory, shared by all retrievers of the store.
        embedder: encodes queries; finds what it has encoded.
        options: weights; any call may bring its own.
        cross_encoder: reorders the candidates.
        clock: the present, for what expires, ages and is said relative to today.
    """

    def __init__(
        self,
        store: MemoryStore,
        index: VectorIndex,
        embedder: TextEncoder,
        options: RetrievalOptions | None = None,
        *,
        cross_encoder: CrossEncoder | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._index = index
        self._embedder = embedder
        self._options = options or RetrievalOptions()
        self._cross_encoder = cross_encoder
        self._clock = clock

    def recall(
        self,
        owners: Sequence[str] | None,
        query: str,
        k: int = 5,
        revisions: Mapping[str, int] | None = None,
        *,
        options: RetrievalOptions | None = None,
        principal: Principal = SYSTEM,
    ) -> list[Passage]:
        """The `k` passages of all `owners` with the best scores, best first.

        Args:
            owners: who is searched; at equal scores an earlier one comes first. None: whoever has something
                that the principal may read.
            query: what to look for.
            k: how many passages at most, over all owners.
            revisions: the revision to search, by owner, also of others: for callers who know that it is the
                newest. An owner that is left out is searched at its newest, and with ``history`` all are.
            options: other weights than the retriever's.
            principal: who asks. Of others, only what is live and may be read by it is searched.

        Raises:
            InvalidInputError: the query is empty, or `k` is below 1.
            NotFoundError: an owner has no such revision.
        """
        if not query.strip():
            raise InvalidInputError("The query is empty.", hint="Say what to look for.")
        if k < 1:
            raise InvalidInputError(f"k is {k}.", hint="Expected at least 1.")
        if owners is not None and not owners:
            return []
        chosen = options or self._options
        at = {} if chosen.history else revisions or {}
        now = self._clock()
        asked = Query(
            text=query,
            vector=_usable(self._embedder.encode([query])[0]),
            words=lexical.tokens(query),
            span=parse(query, now) if chosen.parse_dates else None,
            now=now,
            options=chosen,
        )
        reranks = chosen.rerank and self._cross_encoder is not None
        fetch = max(k, chosen.candidates) if reranks or chosen.mmr_trade_off < 1 else k
        with self._store.reading() as connection:
            searched = governance.owners_for(connection, principal) if owners is None else owners
            ranked = [
                self._rank(connection, owner, asked, at.get(owner), fetch, principal)
                for owner in dict.fromkeys(searched)
            ]
            candidates = _merge(ranked, fetch if reranks else k, fetch, chosen.mmr_trade_off)
            found = _passages(connection, candidates)
        return (self._reranked(query, found) if reranks else found)[:k]

    def _rank(
        self,
        connection: Connection,
        owner: str,
        asked: Query,
        revision: int | None,
        k: int,
        principal: Principal,
    ) -> Ranked:
        standing = governance.standing(connection, principal, owner)
        encoder, history = self._embedder.fingerprint, standing.everything and asked.options.history
        found = self._index.get(connection, owner, encoder, revision=revision, history=history)
        return rank(found, asked, k, standing)

    def _reranked(self, query: str, found: list[Passage]) -> list[Passage]:
        """In the order of the cross-encoder; as it was where that fails, so that nothing is lost by it."""
        if self._cross_encoder is None or not found:
            return found
        try:
            scores = [float(score) for score in self._cross_encoder(query, [p.text for p in found])]
        except Exception:  # somebody else's model
            logger.exception("the cross-encoder failed; the order is that of the fused scores")
            return found
        if len(scores) != len(found) or not all(map(math.isfinite, scores)):
            logger.error("the cross-encoder gave %d usable scores for %d texts", len(scores), len(found))
            return found
        marked = [
            replace(p, why=None if p.why is None else replace(p.why, reranked=score))
            for p, score in zip(found, scores, strict=True)
        ]
        order = sorted(range(len(marked)), key=lambda i: -scores[i])
        return [marked[i] for i in order]


def _usable(vector: Float[Tensor, " d"]) -> Float32[np.ndarray, " d"]:
    """A query's vector as it is compared; checked by numpy, because torch's kernels are slow to start."""
    array: np.ndarray[Any, np.dtype[np.float32]] = vector.detach().cpu().float().numpy()
    if not np.isfinite(array).all():
        raise InvalidInputError("The query's vector holds NaN or infinity.", hint="Check the embedder.")
    return array


def _merge(ranked: Sequence[Ranked], k: int, fetch: int, trade_off: float) -> list[_Candidate]:
    """The best of all owners; at equal scores the earlier owner's, then the older memory."""
    ranked = [of_owner for of_owner in ranked if of_owner.ids]
    if not ranked:
        return []
    named = [(part.owner, name, why) for part in ranked for name, why in zip(part.ids, part.why, strict=True)]
    scores = np.concatenate([part.scores for part in ranked])
    rows = ranking.best(scores, fetch)
    if trade_off < 1:
        vectors = np.concatenate([part.vectors for part in ranked])[rows]
        rows = rows[ranking.mmr(scores[rows], vectors, k, trade_off=trade_off)]
    return [(*named[row][:2], float(scores[row]), named[row][2]) for row in rows[:k]]


def _passages(connection: Connection, candidates: Sequence[_Candidate]) -> list[Passage]:
    """The texts, read by owner and id. Fail closed: a candidate that is not the owner's is left out."""
    by_owner: dict[str, list[str]] = {}
    for owner, name, _, _ in candidates:
        by_owner.setdefault(owner, []).append(name)
    rows = {
        (row.owner, row.id): row
        for owner, names in by_owner.items()
        for part in chunks(names)
        for row in connection.execute(_TEXTS, {"of": owner, "ids": part})
    }
    sealed_by = {owner: ciphers.reading(connection, owner) for owner in by_owner}
    passages = []
    for owner, name, score, why in candidates:
        if (row := rows.get((owner, name))) is not None:
            header, _ = sealed_by[owner].open_header(name, row.header, None)
            parsed, text = CubeHeader.stored(header), sealed_by[owner].open_text(name, row.text)
            passages.append(Passage(name, owner, text, score, parsed.created_at, parsed, why=why))
    return passages
