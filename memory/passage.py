"""A passage: one text that was found, where it comes from, and why it stands where it stands."""

from dataclasses import dataclass
from datetime import datetime

from persona_sdk.memory.cube import CubeHeader


@dataclass(frozen=True)
class Why:
    """The parts of a score, in units of the cosine.

    They come to ``(dense + lexical + neighbours + dated) * decay * trust``.
    The factors do not apply to a sum below zero. ``coverage`` is the share of the query's words, by weight,
    that the memory and its neighbours hold. ``reranked`` is what a cross-encoder said, if one ran; the order
    is then its order.
    """

    dense: float
    lexical: float = 0.0
    neighbours: float = 0.0
    dated: float = 0.0
    coverage: float = 0.0
    decay: float = 1.0
    trust: float = 1.0
    reranked: float | None = None

    @property
    def score(self) -> float:
        """What the parts come to."""
        relevance = self.dense + self.lexical + self.neighbours + self.dated
        return relevance * self.decay * self.trust if relevance > 0 else relevance


@dataclass(frozen=True)
class Passage:
    """A text memory that was found, and how near it is to the query.

    ``owner`` is empty for what no persona owns; ``source`` names what was searched.
    """

    id: str
    owner: str
    text: str
    score: float
    created_at: datetime
    header: CubeHeader
    source: str = "memory"
    why: Why | None = None
