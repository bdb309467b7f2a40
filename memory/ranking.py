"""What stands between a score and a rank: age, trust, and what is chosen already.

    decay(i) = max(floor, 0.5 ** (age(i) / half-life(i)))
    score(i) = relevance(i) * decay(i) * trust(i)                                       where relevance > 0
    mmr      : next = argmax over i not chosen of  l * score(i) - (1 - l) * max over j chosen of cos(i, j)

    symbol      argument      shape
    age         ages          [n] days
    half-life   half_lives    [n] days, infinite: never
    l           trade_off     scalar, 1: by score alone
    cos(i, j)   vectors       [n, d] unit rows

Only similarity to what was chosen counts: against all candidates, the penalty would fall on whatever the
question is about. Trust is a fixed weight of a memory's source and never grows by being found.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int


def decay(
    ages: Float[np.ndarray, " n"], half_lives: Float[np.ndarray, " n"], *, floor: float = 0.3
) -> Float[np.ndarray, " n"]:
    """Weights by age; a memory of the future is as good as new, and the oldest stays reachable."""
    weights: np.ndarray[Any, Any] = np.maximum(np.exp2(-np.maximum(ages, 0.0) / half_lives), floor)
    return weights


def weigh(relevance: Float[np.ndarray, " n"], factor: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Relevance times a factor up to 1, which must not make what is below zero better."""
    return np.where(relevance > 0, relevance * factor, relevance)


def best(scores: Float[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """The rows of the `k` largest scores, best first, equal ones in order; rows at minus infinity never."""
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = np.flatnonzero((scores >= least) & (scores > -np.inf))
    else:
        rows = np.flatnonzero(scores > -np.inf)
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


def mmr(
    scores: Float[np.ndarray, " n"], vectors: Float[np.ndarray, "n d"], k: int, *, trade_off: float = 0.7
) -> list[int]:
    """`k` rows in the order in which maximal marginal relevance chooses them."""
    if trade_off >= 1:
        return [int(row) for row in best(scores, k)]
    relevance, alike = trade_off * scores, (1 - trade_off) * (vectors @ vectors.T)
    nearest = np.full(len(scores), -np.inf)
    chosen: list[int] = []
    open_rows = np.ones(len(scores), bool)
    while len(chosen) < min(k, len(scores)):
        gain = relevance - np.where(np.isinf(nearest), 0.0, nearest)
        row = int(np.argmax(np.where(open_rows, gain, -np.inf)))
        chosen.append(row)
        open_rows[row] = False
        nearest = np.maximum(nearest, alike[row])
    return chosen
