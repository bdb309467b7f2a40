"""The figure of the memory benchmark: what is found, beside published encoders, and what is saved."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import Result, Row

_Draw = Callable[[Any, str, Sequence[Row]], None]
OURS, OTHER, FIRM = "#2a6fbb", "#b8b8b8", "#444444"


def memory(result: Result) -> Any:
    """A panel for every part that was measured: retrievers, published encoders, first tokens."""
    from matplotlib.figure import Figure

    panels = _panels(result)
    figure = Figure(figsize=(5.6 * max(len(panels), 1), 4.2), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for (draw, title, rows), axis in zip(panels, axes, strict=False):
        draw(axis, title, rows)
        axis.spines[["top", "right"]].set_visible(False)
    smoke = " (smoke run)" if result.quick else ""
    figure.suptitle(f"Memory: recall of evidence and what kept memory saves{smoke}", fontsize=11)
    return figure


def _panels(result: Result) -> list[tuple[_Draw, str, Sequence[Row]]]:
    tables = {title: rows for title, rows in result.tables.items() if rows}
    asked = [(t, rows) for t, rows in tables.items() if "LoCoMo" in t and "R@10 from" in rows[0]]
    panels: list[tuple[_Draw, str, Sequence[Row]]] = [(_retrievers, *found) for found in asked[:1]]
    panels += [(_published, title, rows) for title, rows in tables.items() if "rank of" in rows[0]]
    return panels + [(_first_token, t, rows) for t, rows in tables.items() if "kept / computed" in rows[0]]


def _number(row: Row, key: str) -> float:
    return float(str(row[key]))


def _retrievers(axis: Any, title: str, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: _number(row, "recall@10"))
    names = [str(row["retriever"]) for row in ordered]
    values = [_number(row, "recall@10") for row in ordered]
    low = [value - _number(row, "R@10 from") for value, row in zip(values, ordered, strict=True)]
    high = [_number(row, "to") - value for value, row in zip(values, ordered, strict=True)]
    _bars(axis, title, names, ordered, high, xerr=[low, high], ecolor=FIRM, capsize=2.5)


def _published(axis: Any, title: str, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: _number(row, "recall@10"))
    _bars(axis, title, [str(row["model"]).split("/")[-1] for row in ordered], ordered, [0.0] * len(ordered))
    axis.tick_params(axis="y", labelsize=7)


def _bars(
    axis: Any, title: str, names: Sequence[str], rows: Sequence[Row], beyond: Sequence[float], **style: Any
) -> None:
    """A bar for every row with its number, which stands `beyond` it."""
    values = [_number(row, "recall@10") for row in rows]
    axis.barh(names, values, color=[OURS if name.startswith("ours") else OTHER for name in names], **style)
    axis.set_title(f"{title}: recall@10", fontsize=9)
    for place, (value, more) in enumerate(zip(values, beyond, strict=True)):
        axis.annotate(
            f"{value:.3f}", (value + more, place), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    axis.set_xlim(0, 1.08 * max(value + more for value, more in zip(values, beyond, strict=True)) + 0.05)


def _first_token(axis: Any, title: str, rows: Sequence[Row]) -> None:
    prompts = sorted({_number(row, "prompt") for row in rows})
    for place, prompt in enumerate(prompts):
        mine = sorted(
            (row for row in rows if _number(row, "prompt") == prompt), key=lambda row: _number(row, "memory")
        )
        shade = 0.35 + 0.65 * place / max(len(prompts) - 1, 1)
        axis.plot(
            [_number(row, "memory") for row in mine],
            [_number(row, "kept / computed") for row in mine],
            marker="o",
            markersize=3,
            color=OURS,
            alpha=shade,
            label=f"prompt of {prompt:g} tokens",
        )
    axis.axhline(1, color=FIRM, linewidth=0.8)
    axis.set_ylim(0, None)
    axis.set_xlabel("tokens of memory")
    axis.set_ylabel("first token: kept / computed")
    axis.set_title(title, fontsize=9)
    axis.legend(frameon=False, fontsize=7)
