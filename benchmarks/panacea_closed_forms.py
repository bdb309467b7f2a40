"""Tables of `benchmarks.panacea` beside closed forms: nats below a vertex (SFT), margins of pairs (DPO)."""

from collections.abc import Sequence

import numpy as np

from benchmarks.harness import Row
from benchmarks.panacea_measured import ORACLE, OURS, SOUPS, Measured
from benchmarks.panacea_scores import Array
from benchmarks.panacea_stats import excess


def below_the_vertex(part: Measured) -> list[Row]:
    """Nats below the own vertex by weight, beside the closed form for disjoint styles."""
    names = [name for name in (OURS, SOUPS, ORACLE) if name in part.scores]
    found = {name: _excess(part, name).mean(axis=0) for name in names}
    weights = part.scores[OURS][0].preferences
    return [
        {
            "dimension": dimension,
            "weight": round(float(weight), 3),
            **{name: float(nats[place, i]) for name, nats in found.items()},
            "closed form": float(-np.log(weight)) + 0.0,
        }
        for i, dimension in enumerate(part.dimensions)
        for place, weight in enumerate(weights[:, i])
        if weight > 0
    ]


def at_the_centre(part: Measured) -> list[Row]:
    """Nats below the own vertices and the oracle's at λ = (1/2, 1/2), where the closed form is log 2.

    A method with poor vertices is near them for nothing; the oracle's vertices show that.
    """
    rows: list[Row] = []
    for method, scores in part.scores.items():
        place = int(np.flatnonzero(np.isclose(scores[0].preferences[:, 0], 0.5))[0])
        own = _excess(part, method)[:, place]
        from_oracle = part.best - np.stack(part.points(method))[:, place]
        for i, dimension in enumerate(part.dimensions):
            rows.append(
                {
                    "method": method,
                    "dimension": dimension,
                    "below its own vertex": float(own[:, i].mean()),
                    "least": float(own[:, i].min()),
                    "largest": float(own[:, i].max()),
                    "below the oracle's vertex": float(from_oracle[:, i].mean()),
                    "closed form": float(np.log(2)),
                }
            )
    return rows


def margins(part: Measured, names: Sequence[str]) -> list[Row]:
    """DPO's mean margin on pairs that the dimensions label opposite, against logit λ."""
    rows: list[Row] = []
    for method in names:
        joined, *seeds = part.margin_errors(method)
        for place, weight in enumerate(joined.weights):
            row: Row = {"method": method, "weight": round(float(weight), 3)}
            row["logit"] = float(np.log(weight) - np.log1p(-weight))
            row["margin"] = float(joined.margins[place])
            row["relative error"] = float(joined.relative[place])
            row |= {f"seed {seed}": float(each.margins[place]) for seed, each in enumerate(seeds)}
            rows.append(row)
    return rows


def margin_seeds(part: Measured, names: Sequence[str]) -> list[Row]:
    """How far margins are from logit λ: of the mean over seeds, then of each seed alone."""
    return [
        {
            "method": method,
            "seeds": "mean" if place == 0 else str(place - 1),
            "largest relative error": float(errors.relative.max()),
            "slope": errors.slope,
        }
        for method in names
        for place, errors in enumerate(part.margin_errors(method))
    ]


def _excess(part: Measured, method: str) -> Array:
    """[seeds, points, m]"""
    return np.stack([excess(each.preferences, each.values) for each in part.scores[method]])
