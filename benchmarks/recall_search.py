"""The retrievers that are compared, all over one slice in a real store, and vectors that are made once."""

import base64
import hashlib
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float

from benchmarks.memory import Run
from benchmarks.recall_data import Pool
from persona_sdk.embedders import Embedder
from persona_sdk.memory import CubeDraft, MemoryStore, Origin, RetrievalOptions, Retriever, VectorIndex
from persona_sdk.memory.index import dense_scores
from persona_sdk.memory.lexical import tokens
from persona_sdk.memory.slices import Slice

DEPTH = 100
OURS = "ours"
Name = TypeVar("Name", bound=Hashable)
Answer = tuple[list[int], float]  # ranked rows, score of the best


@dataclass
class Known:
    """An embedder that answers from vectors made before, so that a resumed run encodes nothing twice."""

    embedder: Embedder
    vectors: dict[str, torch.Tensor]

    @property
    def fingerprint(self) -> str:
        return self.embedder.fingerprint

    def learn(self, run: Run, name: str, texts: Sequence[str]) -> None:
        """Encode the texts and keep their vectors in a cell, unless all are known."""
        new = list(dict.fromkeys(texts))
        if all(text in self.vectors for text in new):
            return
        digest = hashlib.sha256("\0".join([self.fingerprint, *new]).encode()).hexdigest()[:16]

        def encode() -> dict[str, Any]:
            run.tell(f"encoding {len(new)} texts of {name}")
            order = sorted(range(len(new)), key=lambda i: len(new[i]))  # little padding
            matrix = np.empty((len(new), self.embedder.dimension), np.float32)
            matrix[order] = self.embedder.encode([new[i] for i in order]).numpy()
            return {"float32": base64.b64encode(matrix.tobytes()).decode()}

        data = run.cells.run(f"recall-vectors-{name}-{digest}", encode)["float32"]
        matrix = np.frombuffer(base64.b64decode(data), np.float32).reshape(len(new), -1).copy()
        self.vectors |= dict(zip(new, torch.from_numpy(matrix), strict=True))

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.vectors[text] for text in texts])


@dataclass
class Searcher:
    """One pool in a store of its own: the production retriever, and the slice the other rows score."""

    retriever: Retriever
    found: Slice
    known: Known
    owner: str

    def __post_init__(self) -> None:
        self.row_of = {name: row for row, name in enumerate(self.found.ids)}

    def recall(self, question: str, options: RetrievalOptions | None = None) -> Answer:
        passages = self.retriever.recall((self.owner,), question, DEPTH, options=options)
        return [self.row_of[p.id] for p in passages], passages[0].score if passages else 0.0

    def dense(self, question: str) -> np.ndarray:
        return dense_scores(self.found, self.known.encode([question])[0].numpy())

    def bm25(self, question: str, context: float = 0.0) -> np.ndarray:
        return self.found.postings(context).search(tokens(question))[0]


@contextmanager
def stored(pool: Pool, known: Known) -> Iterator[Searcher]:
    """A pool committed to a new store as one persona."""
    drafts = [
        CubeDraft.of(
            text,
            vector=known.vectors[text],
            encoder=known.fingerprint,
            semantic_type="turn",
            origin=Origin(kind="turn", reference=str(row), session=session),
            created_at=time,
        )
        for row, (text, session, time) in enumerate(zip(pool.texts, pool.sessions, pool.times, strict=True))
    ]
    now = max(pool.times)
    with tempfile.TemporaryDirectory() as folder, MemoryStore.open(Path(folder)) as store:
        store.commit("talk", add=drafts)
        index = VectorIndex(store)
        with store.reading() as connection:
            found = index.get(connection, "talk", known.fingerprint)
        yield Searcher(Retriever(store, index, known, clock=lambda: now), found, known, "talk")


def minmax(scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Scores stretched to 0..1; zeros where all are equal."""
    if not len(scores):
        return scores
    low, high = float(scores.min()), float(scores.max())
    return (scores - low) / (high - low) if high > low else np.zeros_like(scores)


def reciprocal_ranks(lists: Sequence[Sequence[Name]], *, k: int = 60) -> dict[Name, float]:
    """Sum of ``1 / (k + rank)`` over the lists a name is in, ranks from 1; best first, ties as first seen."""
    scores: dict[Name, float] = {}
    for names in lists:
        for rank, name in enumerate(dict.fromkeys(names), start=1):
            scores[name] = scores.get(name, 0.0) + 1 / (k + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _order(scores: np.ndarray) -> list[int]:
    return np.argsort(-scores, kind="stable")[:DEPTH].tolist()


def _scored(score: Callable[[Searcher, str], np.ndarray]) -> Callable[[Searcher, str], Answer]:
    def answer(searcher: Searcher, question: str) -> Answer:
        scores = score(searcher, question)
        return _order(scores), float(scores.max())

    return answer


def _rank_fusion(searcher: Searcher, question: str) -> Answer:
    words = searcher.bm25(question)
    said = [row for row in _order(words) if words[row] > 0]  # a row without a word of the query has no rank
    fused = reciprocal_ranks([_order(searcher.dense(question)), said])
    return list(fused)[:DEPTH], next(iter(fused.values()))


ROWS: dict[str, Callable[[Searcher, str], Answer]] = {
    "dense": _scored(lambda s, q: s.dense(q)),
    "BM25": _scored(lambda s, q: s.bm25(q)),
    "rank fusion, k=60": _rank_fusion,
    "min-max sum": _scored(lambda s, q: minmax(s.dense(q)) + minmax(s.bm25(q))),
    "BM25, turn +-1": _scored(lambda s, q: s.bm25(q, 1.0)),
    OURS: lambda s, q: s.recall(q),
}
