"""Bars, tables and notes of `benchmarks.panacea` from its cells: one cell for each part and seed.

| bar                                                        | what must hold                               |
|------------------------------------------------------------|----------------------------------------------|
| least Spearman correlation of λ_i and objective i          | >= 0.95; over dimensions and seeds           |
| hypervolume less that of rewarded soups                    | lower end of the 95 % interval above 0       |
| hypervolume over that of the better mixture (SFT)          | >= 0.9; of the oracle, or of the experts     |
| largest relative error of the mean margin (DPO)            | <= 0.25 of logit λ_1; mean over pairs, seeds |
| range of any objective over λ with s frozen at 0, nats     | <= 1e-3; a control                           |

`panacea` is the method as this SDK recommends it; the bars are set for it. The method as published gets the
same numbers in a table, and a note says which bars it would miss.
"""

from collections.abc import Mapping, Sequence

from benchmarks import panacea_closed_forms as closed
from benchmarks import panacea_tables as tables
from benchmarks.harness import Bar, Row
from benchmarks.panacea_measured import CONTROL, OURS, PAPER, SOUPS, Cell, Measured
from benchmarks.panacea_stats import DRAWS

ABOVE_0 = 1e-6  # two equal methods, or two without any hypervolume, differ by 0 and miss

NOTES = (
    "Objectives are in nats: log-likelihood of a reply (SFT), or log sigmoid of its margin (DPO). Compute is "
    "steps times examples run and equal for all methods but the oracle; tokens differ by what is skipped or "
    "said in the prompt.",
    "Hypervolume is measured from 3 nats below the oracle's vertices (SFT) or below 0 (DPO): one point for "
    "all methods and seeds. From the base model's values, far below, a method that ignores λ comes near the "
    "oracle as well; that column is for comparison only.",
    "Intervals: 95 %, over 1,000 draws of held-out prompts, the same draws for all methods and seeds; means "
    "over seeds. They do not contain the variation between training seeds: that is in the tables 'over "
    "training seeds'.",
    "Oracle: log Σ λ_i p_i of one expert for each dimension, each trained once with the whole compute. It is "
    "no competitor: it is m models, and its compute is m times that of the others. 'mixture of the experts' "
    "is the same of the experts that the soups are made of, with the compute of the others. Longer training "
    "can overfit, so the bar takes the better of the two.",
    "One per vector exists at its own λ only, and hypervolume grows with the number of points. It is "
    "compared with panacea at those λ; its hypervolume beside methods with more λ is not comparable.",
    "'panacea, one λ for all' is panacea held at the one λ with the most hypervolume. With joint and scale "
    "at 0 it shows what a share of a mixture's hypervolume is worth: a method that ignores λ has that much.",
    "-log λ_i is the closed form for styles that never give the same reply. Where both styles can, the "
    "optimum loses less.",
)


def summarise(
    found: Mapping[str, Sequence[Cell]], n: int = DRAWS
) -> tuple[dict[str, Bar], dict[str, list[Row]], list[str]]:
    """What a run shows.

    Args:
        found: cells by part, one a seed.
        n: draws of prompts.
    """
    if not found:
        return {}, {}, []
    bars: dict[str, Bar] = {}
    shown: dict[str, list[Row]] = {}
    notes: list[str] = []
    for name, cells in found.items():
        part = Measured(name, cells, n)
        own = {**bars_of(part, OURS), **control(part)}
        bars |= {f"{name}: {what}": bar for what, bar in own.items()}
        shown |= {f"{name}: {title}": rows for title, rows in tables_of(part).items()}
        if PAPER in part.scores:
            notes.append(_published(name, bars_of(part, PAPER)))
    return bars, {"parts": tables.parts(found), **shown}, [*NOTES, *notes]


def bars_of(part: Measured, method: str) -> dict[str, Bar]:
    """What a method must reach."""
    over = part.against(method, SOUPS, "difference")
    bars = {
        "least Spearman correlation of λ_i and objective i": Bar.of(min(part.ranks(method)), ">=", 0.95),
        "hypervolume less that of rewarded soups, lower end": Bar.of(
            min(over.low, over.value), ">=", ABOVE_0, interval=(over.low, over.high)
        ),
    }
    if part.objective == "sft":
        share = part.against(method, part.mixture(), "ratio")
        bars["hypervolume over that of the better mixture of experts"] = Bar.of(
            share.value, ">=", 0.9, interval=(share.low, share.high)
        )
    else:
        worst = float(part.margin_errors(method)[0].relative.max())
        bars["largest relative error of the mean margin against logit λ"] = Bar.of(worst, "<=", 0.25)
    return bars


def control(part: Measured) -> dict[str, Bar]:
    """With s frozen at 0, λ must change nothing."""
    if CONTROL not in part.scores:
        return {}
    widest = part.widest(CONTROL)
    return {"control: widest range of an objective over λ with s at 0, nats": Bar.of(widest, "<=", 1e-3)}


def tables_of(part: Measured) -> dict[str, list[Row]]:
    """All tables of a part by title."""
    found = {"methods": tables.methods(part), "reference point": tables.reference_point(part)}
    if PAPER in part.scores:
        found["the method as published against the same bars"] = tables.same_bars(bars_of(part, PAPER))
    found["hypervolume of panacea against others"] = tables.comparisons(part)
    if part.seeds > 1:
        found["over training seeds"] = tables.spread(part)
    if part.objective == "dpo":
        names = [name for name in (OURS, PAPER, SOUPS) if name in part.scores]
        found["margins"] = closed.margins(part, names)
        found["margins against logit λ, seed by seed"] = closed.margin_seeds(part, names)
    else:
        found["hypervolume over the mixtures of experts"] = tables.over_mixtures(part)
        if len(part.dimensions) == 2:
            found["nats below the vertex"] = closed.below_the_vertex(part)
            found["nats below the vertex at λ = (1/2, 1/2)"] = closed.at_the_centre(part)
    return {**found, "fronts": tables.front_points(part)}


def _published(name: str, bars: Mapping[str, Bar]) -> str:
    missed = [what for what, bar in bars.items() if not bar.ok]
    if not missed:
        return f"{name}: the method as published would reach all bars."
    return (
        f"{name}: the method as published would miss {len(missed)} of {len(bars)} bars: {'; '.join(missed)}."
    )
