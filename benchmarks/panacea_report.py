"""Bars, tables and notes of `benchmarks.panacea` from its cells: one cell for each part and seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Bar, Row
from benchmarks.panacea_scores import Array, Scores
from benchmarks.panacea_stats import (
    NATS,
    Interval,
    compare,
    excess,
    hypervolume,
    margin_errors,
    means,
    reference,
    worst_rank_correlation,
)
from persona_sdk.adapters import fronts

OURS, SOUPS, ORACLE, CONTROL = "panacea", "rewarded soups", "oracle", "scale at 0"
Cell = Mapping[str, Any]


def summarise(
    found: Mapping[str, Sequence[Cell]],
) -> tuple[dict[str, Bar], dict[str, list[Row]], list[str]]:
    """What a run shows.

    Args:
        found: cells by part, one a seed.
    """
    bars: dict[str, Bar] = {}
    tables: dict[str, list[Row]] = {}
    for name, cells in found.items():
        part = Part(name, cells)
        bars |= part.bars()
        tables[f"{name}: methods"] = part.methods()
        tables[f"{name}: panacea over {SOUPS} and oracle"] = part.comparisons()
        if part.objective == "dpo":
            tables[f"{name}: margins"] = part.margins()
        elif len(part.dimensions) == 2:
            tables[f"{name}: nats below the vertex"] = part.excess()
        tables[f"{name}: fronts"] = part.fronts()
    return bars, tables, list(NOTES) if found else []


NOTES = (
    "Compute is steps times examples run, equal for all methods (tokens differ by what is skipped or said in "
    "the prompt). Intervals: 95 %, over 1,000 draws of held-out prompts, means over seeds.",
    "Hypervolume is measured from the base model's values (SFT) or from -3 nats (DPO), the same point for "
    "all methods of a seed. 'near' measures it from 3 nats below the experts' own values at their vertices: "
    "there the middle of the front counts, which the far point hardly sees.",
    "Oracle: log Σ λ_i p_i of the experts; each expert has half (m = 3: a third) of the compute.",
)


class Part:
    """One part over its seeds."""

    def __init__(self, name: str, cells: Sequence[Cell]) -> None:
        self.name = name
        self.dimensions: list[str] = cells[0]["dimensions"]
        self.objective = cells[0]["objective"]
        self._cells = cells
        self._scores = {
            method: [Scores.from_dict(cell["methods"][method]["scores"]) for cell in cells]
            for method in cells[0]["methods"]
        }
        base = [Scores.from_dict(cell["base"]).values for cell in cells]
        self._far = [reference(self.objective, values) for values in base]

    def bars(self) -> dict[str, Bar]:
        """What the issue asks for."""
        ours = self._scores[OURS]
        rank = worst_rank_correlation(ours[0].preferences, [each.values for each in ours])
        over = self._compared(SOUPS, "difference", self._far)
        bars = {
            "least Spearman of λ_i and objective i": Bar.of(rank, ">=", 0.95),
            "hypervolume over rewarded soups, lower end": Bar.of(
                over.low, ">=", 0.0, interval=(over.low, over.high)
            ),
        }
        if self.objective == "sft":
            share = self._compared(ORACLE, "ratio", self._far)
            bars["hypervolume over the oracle's"] = Bar.of(
                share.value, ">=", 0.9, interval=(share.low, share.high)
            )
        else:
            ours_only = [row for row in self.margins() if row["method"] == OURS]
            worst = max(float(str(row["relative error"])) for row in ours_only)
            bars["largest relative error of the margin"] = Bar.of(worst, "<=", 0.25)
        if CONTROL in self._scores:
            widest = max(float(np.ptp(means(each.values), axis=0).max()) for each in self._scores[CONTROL])
            bars["control: range of objectives with s at 0, nats"] = Bar.of(widest, "<=", 1e-3)
        return {f"{self.name}: {what}": bar for what, bar in bars.items()}

    def methods(self) -> list[Row]:
        """Metrics of each method, means over seeds."""
        rows: list[Row] = []
        near = self._near()
        for method, scores in self._scores.items():
            account = [cell["methods"][method] for cell in self._cells]
            points = [means(each.values) for each in scores]
            tensors = [
                (torch.from_numpy(each.preferences), torch.from_numpy(mean))
                for each, mean in zip(scores, points, strict=True)
            ]
            rows.append(
                {
                    "method": method,
                    "hypervolume": _mean(hypervolume(p, z) for p, z in zip(points, self._far, strict=True)),
                    "near": _mean(hypervolume(p, z) for p, z in zip(points, near, strict=True)),
                    "inner product": _mean(fronts.inner_product(*pair) for pair in tensors),
                    "sparsity": _mean(fronts.sparsity(p) for _, p in tensors),
                    "spacing": _mean(fronts.spacing(p) for _, p in tensors),
                    "least Spearman": worst_rank_correlation(
                        scores[0].preferences, [each.values for each in scores]
                    ),
                    "runs": account[0]["runs"],
                    "steps": account[0]["steps"],
                    "tokens": round(_mean(each["tokens"] for each in account)),
                    "seconds": round(_mean(each["seconds"] for each in account)),
                }
            )
        return rows

    def comparisons(self) -> list[Row]:
        """Hypervolume of panacea against others, from both reference points."""
        rows: list[Row] = []
        for other in self._scores:
            if other == OURS:
                continue
            for where, z in (("base", self._far), ("near", self._near())):
                for how in ("difference", "ratio"):
                    found = self._compared(other, how, z)
                    rows.append(
                        {
                            "against": other,
                            "measured from": where,
                            "what": how,
                            "value": found.value,
                            "low": found.low,
                            "high": found.high,
                        }
                    )
        return rows

    def excess(self) -> list[Row]:
        """Nats below the vertex by weight, beside the closed form of distinguishable styles."""
        ours = self._scores[OURS]
        found = np.mean([excess(each.preferences, each.values) for each in ours], axis=0)
        soups = np.mean([excess(each.preferences, each.values) for each in self._scores[SOUPS]], axis=0)
        return [
            {
                "dimension": name,
                "weight": float(weight),
                "panacea": float(nats),
                SOUPS: float(soup),
                "closed form": float(-np.log(weight)),
            }
            for place, name in enumerate(self.dimensions)
            for weight, nats, soup in zip(
                ours[0].preferences[:, place], found[:, place], soups[:, place], strict=True
            )
            if weight > 0
        ]

    def margins(self) -> list[Row]:
        """DPO's mean margin on pairs that the dimensions label opposite, against logit λ."""
        weights = self._scores[OURS][0].preferences[:, 0]
        rows: list[Row] = []
        for method in (OURS, SOUPS):
            margins = [each.margins for each in self._scores[method]]
            joined = np.concatenate([array[:, :, 0] for array in margins if array is not None], axis=1)
            errors = margin_errors(weights, joined)
            for weight, margin, relative in zip(errors.weights, errors.margins, errors.relative, strict=True):
                logit = float(np.log(weight) - np.log1p(-weight))
                rows.append(
                    {
                        "method": method,
                        "weight": round(float(weight), 3),
                        "margin": float(margin),
                        "logit": logit,
                        "relative error": float(relative),
                    }
                )
        return rows

    def fronts(self) -> list[Row]:
        """Points of all methods, means over seeds."""
        rows: list[Row] = []
        for method, scores in self._scores.items():
            points = np.mean([means(each.values) for each in scores], axis=0)
            for preference, values in zip(scores[0].preferences, points, strict=True):
                row: Row = {"method": method}
                row |= {
                    f"λ {n}": round(float(v), 3) for n, v in zip(self.dimensions, preference, strict=True)
                }
                row |= {n: float(value) for n, value in zip(self.dimensions, values, strict=True)}
                rows.append(row)
        return rows

    def _near(self) -> list[Array]:
        """NATS below what each expert gives at its own vertex, a point for each seed."""
        found = []
        for each in self._scores[SOUPS]:
            points = means(each.values)
            at = [int(np.flatnonzero(each.preferences[:, i] == 1)[0]) for i in range(points.shape[1])]
            found.append(points[at, range(len(at))] - NATS)
        return found

    def _compared(self, other: str, how: Any, z: Sequence[Array]) -> Interval:
        """Values are moved so that the reference of every seed is 0: one point for all seeds."""

        def moved(scores: Sequence[Scores]) -> list[Array]:
            return [each.values - point for each, point in zip(scores, z, strict=True)]

        zero = np.zeros(len(self.dimensions))
        return compare(moved(self._scores[OURS]), moved(self._scores[other]), zero, how=how)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
