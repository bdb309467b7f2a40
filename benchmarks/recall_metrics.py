"""Metrics of ranked lists against sets of relevant rows, and bootstrap intervals of their means.

recall@k = |relevant in the first k| / |relevant|            ndcg@k = DCG@k / DCG@k of the ideal order
DCG@k    = sum over relevant at rank r <= k of 1 / log2(r + 1)        mrr = 1 / rank of the first relevant
auroc    = P(score of a positive > score of a negative), ties count half
"""

from collections.abc import Collection, Sequence

import numpy as np

CUTS = (1, 5, 10, 50)


def of_question(ranked: Sequence[int], relevant: Collection[int]) -> dict[str, float]:
    """All metrics of one ranked list; ``mrr`` is over the whole list."""
    wanted = set(relevant)
    hits = np.asarray([row in wanted for row in ranked], float)
    values = {f"recall@{k}": float(hits[:k].sum() / len(wanted)) for k in CUTS}
    gains = 1 / np.log2(np.arange(2, 12))
    values["ndcg@10"] = float(hits[:10] @ gains[: len(hits[:10])] / gains[: len(wanted)].sum())
    first = np.flatnonzero(hits)
    values["mrr"] = float(1 / (first[0] + 1)) if len(first) else 0.0
    return values


def bootstrap(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by resampling questions."""
    given = np.asarray(values, float)
    if not len(given):
        return (float("nan"), float("nan"))
    dice = np.random.default_rng(seed)
    means = [given[dice.integers(0, len(given), len(given))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Area under the ROC curve, from the rank sum."""
    scores = np.concatenate([positives, negatives])
    order = np.argsort(scores, kind="stable")
    _, inverse, counts = np.unique(scores[order], return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = np.empty(len(scores))
    ranks[order] = (last - (counts - 1) / 2)[inverse]
    wins = ranks[: len(positives)].sum() - len(positives) * (len(positives) + 1) / 2
    return float(wins / (len(positives) * len(negatives)))
