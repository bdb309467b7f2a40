"""One score of two: cosines and words, gated by how much of the query the words cover.

    span     = max(max cos - min cos, least)
    gate(i)  = bm25(i) * coverage(i) / max(bm25 * coverage) * max coverage
    f(i)     = (cos(i) - min cos) / span + w * gate(i)
    score(i) = f(i) + c * (f(before i) - mean f) + c * (f(after i) - mean f)

    symbol   argument            shape
    cos      dense               [n]
    bm25     bm25                [n]
    w        lexical_weight      scalar
    c        neighbour_weight    scalar

The gate mutes the words where no memory covers the query, as for questions of taste, and trusts them where
names and dates match. Rank fusion cannot do that: it throws the margins away, so that a weak list has the
same vote as a strong one.

A score here is between 0 and about 2 and says nothing across owners, because the best of every slice gets the
same. So `fuse` answers in units of the cosine: ``min cos + span * score``, the same order within a slice.
What a neighbour adds is counted from the mean, so that a memory without a conversation is neither better nor
worse for it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class Parts:
    """Addends of the fused scores of a slice, in units of the cosine; ``span`` is the unit of the rest."""

    dense: Float[np.ndarray, " n"]
    lexical: Float[np.ndarray, " n"]
    neighbours: Float[np.ndarray, " n"]
    span: float

    @property
    def total(self) -> Float[np.ndarray, " n"]:
        """The fused scores."""
        total: np.ndarray[Any, Any] = self.dense + self.lexical + self.neighbours
        return total


def gated(bm25: Float[np.ndarray, " n"], coverage: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Lexical scores, whose best equals the best coverage; a row without a word of the query has 0."""
    product = bm25 * coverage
    best = float(product.max()) if len(product) else 0.0
    return product * np.float32(coverage.max() / best) if best > 0 else np.zeros_like(product)


def neighbours(
    scores: Float[np.ndarray, " n"],
    before: Int[np.ndarray, " n"],
    after: Int[np.ndarray, " n"],
    mean: float,
) -> Float[np.ndarray, " n"]:
    """What the neighbours' scores exceed the mean by, added up; a missing one counts as average."""
    padded = np.append(scores - np.float32(mean), np.float32(0))  # -1, no neighbour, is the last
    added: np.ndarray[Any, Any] = padded[before] + padded[after]
    return added


def fuse(
    dense: Float[np.ndarray, " n"],
    lexical: Float[np.ndarray, " n"],
    visible: Bool[np.ndarray, " n"] | None,
    before: Int[np.ndarray, " n"],
    after: Int[np.ndarray, " n"],
    *,
    lexical_weight: float = 1.0,
    neighbour_weight: float = 0.3,
    least_span: float = 0.3,
) -> Parts:
    """Fused scores of all rows; what is not `visible` (None: all are) counts as an average neighbour only."""
    shown = dense if visible is None else dense[visible]
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 0.0)
    span = max(high - low, least_span)
    words = lexical * np.float32(lexical_weight * span)
    around = np.zeros_like(dense)
    if neighbour_weight and len(shown):
        together = dense + words
        mean = float((together if visible is None else together[visible]).mean())
        known = together if visible is None else np.where(visible, together, np.float32(mean))
        around = neighbours(known, before, after, mean) * np.float32(neighbour_weight)
    return Parts(dense, words, around, span)
