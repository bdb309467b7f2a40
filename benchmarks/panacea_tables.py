"""Tables of `benchmarks.panacea`: rows of one part. Values are means over seeds unless a column says else."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks.harness import Bar, Row
from benchmarks.panacea_measured import BLIND, MIXTURE, ONE_LAMBDA, ORACLE, OURS, SOUPS, Cell, Measured
from benchmarks.panacea_stats import paired
from persona_sdk.adapters import fronts


def parts(found: Mapping[str, Sequence[Cell]]) -> list[Row]:
    """What was trained on what."""
    return [
        {
            "part": name,
            "dimensions": ", ".join(cells[0]["dimensions"]),
            "objective": cells[0]["objective"].upper(),
            **{f"{side} prompts": count for side, count in cells[0]["prompts"].items()},
            "seeds": len(cells),
        }
        for name, cells in found.items()
    ]


def reference_point(part: Measured) -> list[Row]:
    """z, what it is measured from, and the base model."""
    best = "oracle at its vertex" if part.objective == "sft" else "supremum"
    columns = zip(part.dimensions, part.best, part.z, part.base, strict=True)
    return [
        {"dimension": name, best: float(top), "reference": float(z), "base model": float(base)}
        for name, top, z, base in columns
    ]


def methods(part: Measured) -> list[Row]:
    """Metrics and compute of each method. The base's values are far away: there every method is near 1."""
    rows: list[Row] = []
    for method, scores in part.scores.items():
        account = part.accounts[method]
        pairs = [
            (torch.from_numpy(each.preferences), torch.from_numpy(points))
            for each, points in zip(scores, part.points(method), strict=True)
        ]
        row: Row = {
            "method": method,
            "λ": len(scores[0].preferences),
            "hypervolume": _mean(part.hypervolumes(method)),
        }
        if part.objective == "sft":
            row["from the base, of the oracle's"] = _mean(part.hypervolumes(method, part.base)) / _mean(
                part.hypervolumes(ORACLE, part.base)
            )
        row |= {
            "inner product": _mean([fronts.inner_product(*pair) for pair in pairs]),
            "sparsity": _mean([fronts.sparsity(points) for _, points in pairs]),
            "spacing": _mean([fronts.spacing(points) for _, points in pairs]),
            "least Spearman": min(part.ranks(method)),
            "runs": account[0]["runs"],
            "steps": account[0]["steps"],
            "tokens": round(_mean([each["tokens"] for each in account])),
        }
        rows.append(row)
    return rows


def comparisons(part: Measured) -> list[Row]:
    """Panacea's hypervolume against that of each other method, both at the same λ."""
    rows: list[Row] = []
    for other in part.scores:
        if other == OURS:
            continue
        at = part.shared(other)
        difference = part.against(OURS, other, "difference", at)
        nothing = part.drawn(other)[0] == 0
        ratio = None if nothing else part.against(OURS, other, "ratio", at)
        rows.append(
            {
                "against": other if at is None else f"{other} (both at its {len(at)} λ)",
                "panacea": float(part.drawn(OURS, at)[0]),
                "other": float(part.drawn(other)[0]),
                "difference": difference.value,
                "from": difference.low,
                "to": difference.high,
                "ratio": ratio and ratio.value,
                "ratio from": ratio and ratio.low,
                "ratio to": ratio and ratio.high,
            }
        )
    return rows


def over_mixtures(part: Measured) -> list[Row]:
    """Hypervolume over that of both mixtures of experts; what no λ reaches shows what the number is worth."""
    drawn = {method: part.drawn(method) for method in part.scores}
    drawn[ONE_LAMBDA] = part.one_lambda()
    rows: list[Row] = []
    for method, volumes in drawn.items():
        row: Row = {"method": method, "follows λ": "no" if method in (*BLIND, ONE_LAMBDA) else "yes"}
        for title, mixture in (("over the oracle", ORACLE), ("over the experts' mixture", MIXTURE)):
            found = paired(volumes, part.drawn(mixture), "ratio")
            row |= {title: found.value, f"{title}, from": found.low, f"{title}, to": found.high}
        rows.append(row)
    return sorted(rows, key=lambda row: -float(str(row["over the oracle"])))


def spread(part: Measured) -> list[Row]:
    """What the intervals do not contain: least and largest value over training seeds."""
    rows: list[Row] = []
    for method in part.scores:
        volumes = part.hypervolumes(method)
        at = part.shared(method)
        less = [a - b for a, b in zip(volumes, part.hypervolumes(SOUPS), strict=True)]
        ranks = part.ranks(method)
        row: Row = {"method": method, "trained": part.trained(method)}
        row |= {"hypervolume, least": min(volumes), "hypervolume, largest": max(volumes)}
        row |= {
            "less soups', least": None if at else min(less),
            "less soups', largest": None if at else max(less),
            "Spearman, least": min(ranks),
            "Spearman, largest": max(ranks),
        }
        rows.append(row)
    return rows


def same_bars(bars: dict[str, Bar]) -> list[Row]:
    """Bars as rows, for a method that they were not set for."""
    return [
        {
            "bar": name,
            "value": bar.value,
            "from": None if bar.interval is None else bar.interval[0],
            "to": None if bar.interval is None else bar.interval[1],
            "target": f"{bar.op} {bar.target:g}",
            "met": "yes" if bar.ok else "no",
        }
        for name, bar in bars.items()
    ]


def front_points(part: Measured) -> list[Row]:
    """Points of all methods."""
    rows: list[Row] = []
    for method, scores in part.scores.items():
        for preference, values in zip(scores[0].preferences, part.front(method), strict=True):
            weights = zip(part.dimensions, preference, strict=True)
            row: Row = {"method": method, **{f"λ {name}": round(float(v), 3) for name, v in weights}}
            row |= {name: float(value) for name, value in zip(part.dimensions, values, strict=True)}
            rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
