"""One part of `benchmarks.panacea` over its seeds: scores of all methods, their reference point, comparisons.

| symbol | field             | shape                                                           |
|--------|-------------------|-----------------------------------------------------------------|
| ξ      | ``scores``        | by method, one `Scores` for each seed                           |
| z      | ``z``             | [m]; see `panacea_stats`                                        |
| base   | ``base``          | [m], means of the base model                                    |

What is trained once, as the oracle is, stands in every seed's cell.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from benchmarks.panacea_scores import Array, Scores
from benchmarks.panacea_stats import (
    DRAWS,
    NATS,
    Interval,
    MarginErrors,
    hypervolume,
    hypervolumes,
    margin_errors,
    means,
    paired,
    vertex_values,
    with_all,
    worst_rank_correlation,
)

OURS, PAPER, SOUPS, CONTROL = "panacea", "as published", "rewarded soups", "scale at 0"
ORACLE, MIXTURE = "oracle", "mixture of the experts"
BLIND = ("joint", CONTROL)  # no λ reaches them
ONE_LAMBDA = "panacea, one λ for all"
Cell = Mapping[str, Any]


class Measured:
    """What one part gave.

    Args:
        name: of the part.
        cells: one a seed, as `panacea.main` makes them.
        n: draws of prompts.
    """

    def __init__(self, name: str, cells: Sequence[Cell], n: int = DRAWS) -> None:
        self.name, self.seeds = name, len(cells)
        self.dimensions: list[str] = cells[0]["dimensions"]
        self.objective: Literal["sft", "dpo"] = cells[0]["objective"]
        self.scores = {
            method: [Scores.from_dict(cell["methods"][method]["scores"]) for cell in cells]
            for method in cells[0]["methods"]
        }
        self.accounts = {method: [cell["methods"][method] for cell in cells] for method in self.scores}
        prompts = {each.values.shape[1] for runs in self.scores.values() for each in runs}
        if len(prompts) != 1:
            raise ValueError(f"{name}: all runs must have the same held-out prompts, not {sorted(prompts)}.")
        self.base = means(Scores.from_dict(cells[0]["base"]).values)[0]
        self.best = self._best()
        self.z = self.best - NATS
        self._counts = with_all(prompts.pop(), n)
        self._volumes: dict[tuple[Any, ...], Array] = {}

    def _best(self) -> Array:
        """What z is measured from: the oracle at its vertices, or the supremum of DPO's J."""
        if self.objective == "dpo":
            return np.zeros(len(self.dimensions))
        oracle = self.scores[ORACLE][0]
        return vertex_values(oracle.preferences, oracle.values)

    def trained(self, method: str) -> int:
        """How often a method was trained."""
        first, *others = self.accounts[method]
        return 1 if all(each is first for each in others) else self.seeds

    def points(self, method: str) -> list[Array]:
        """ξ [points, m] of each seed."""
        return [means(each.values) for each in self.scores[method]]

    def front(self, method: str) -> Array:
        """ξ [points, m], means over seeds."""
        return np.asarray(np.mean(self.points(method), axis=0))

    def ranks(self, method: str) -> list[float]:
        """The least Spearman correlation of λ_i and ξ_i of each seed."""
        return [worst_rank_correlation(each.preferences, [each.values]) for each in self.scores[method]]

    def hypervolumes(self, method: str, z: Array | None = None) -> list[float]:
        """Of each seed, from z or from another point."""
        return [hypervolume(points, self.z if z is None else z) for points in self.points(method)]

    def drawn(self, method: str, at: tuple[int, ...] | None = None) -> Array:
        """Mean hypervolume over seeds for all prompts, then for each draw; of all points or those at `at`."""
        if (key := (method, at)) not in self._volumes:
            runs = self.scores[method][: self.trained(method)]
            kept = [each.values if at is None else each.values[list(at)] for each in runs]
            self._volumes[key] = hypervolumes(kept, self.z, self._counts)
        return self._volumes[key]

    def one_lambda(self) -> Array:
        """As `drawn`, of panacea held at the λ that is best alone: a front without its preference."""
        alone = [
            np.mean([hypervolume(points[[place]], self.z) for points in self.points(OURS)])
            for place in range(len(self.scores[OURS][0].preferences))
        ]
        return self.drawn(OURS, (int(np.argmax(alone)),))

    def mixture(self) -> str:
        """The better of the two mixtures: more training can make an expert worse on held-out prompts."""
        return max((ORACLE, MIXTURE), key=lambda method: float(self.drawn(method)[0]))

    def shared(self, method: str) -> tuple[int, ...] | None:
        """Where panacea is at the λ of a method that has fewer; None where the λ are the same."""
        ours, theirs = (self.scores[each][0].preferences for each in (OURS, method))
        if len(ours) == len(theirs):
            return None
        near = np.abs(theirs[:, None] - ours[None]).max(axis=2)
        if (near.min(axis=1) > 1e-5).any():
            raise ValueError(f"{self.name}: {method} was measured at λ that {OURS} was not.")
        return tuple(int(place) for place in near.argmin(axis=1))

    def against(
        self, method: str, other: str, how: Literal["difference", "ratio"], at: tuple[int, ...] | None = None
    ) -> Interval:
        """Hypervolume of a method, at `at`, less that of another, or over it."""
        return paired(self.drawn(method, at), self.drawn(other), how)

    def margin_errors(self, method: str) -> list[MarginErrors]:
        """DPO's margins of the first dimension: means over pairs and seeds, then for each seed alone."""
        weights = self.scores[method][0].preferences[:, 0]
        runs = [each.margins[:, :, 0] for each in self.scores[method] if each.margins is not None]
        return [
            margin_errors(weights, np.concatenate(runs, axis=1)),
            *(margin_errors(weights, r) for r in runs),
        ]

    def widest(self, method: str) -> float:
        """The largest range of an objective over λ, of all seeds."""
        return max(float(np.ptp(points, axis=0).max()) for points in self.points(method))
