"""One figure per benchmark, drawn from its result alone. Needs matplotlib, of the extra ``bench``."""

import io
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks import memory_plots, panacea_plots
from benchmarks.harness import Result, Row

_COLOURS = {"ours": "#2a6fbb", "peft": "#c9752d"}
_SERVE_COLOURS = {
    "ours": "#2a6fbb",
    "ours bfloat16": "#1d4a7d",
    "base": "#8fb8de",
    "eager": "#999999",
    "peft": "#c9752d",
    "switching": "#e0a878",
    "vllm": "#7a9a5b",
    "vllm compiled": "#a9c48e",
    "vllm lora": "#4d6b32",
}


def compose(result: Result) -> Any:
    """Time of a step over the base model's, by distinct adapters: a panel per model and phase."""
    from matplotlib.figure import Figure

    panels = sorted({(str(row["step"]).split()[0], str(row["model"])) for row in result.tables["ratios"]})
    phases = sorted({phase for phase, _ in panels})
    models = sorted({model for _, model in panels})
    figure = Figure(figsize=(4.6 * len(models), 3.3 * len(phases) + 0.6), layout="constrained")
    grid = figure.subplots(len(phases), len(models), squeeze=False)
    for phase, axes in zip(phases, grid, strict=True):
        for model, axis in zip(models, axes, strict=True):
            _panel(axis, result, phase, model)
        axes[0].set_ylabel("time / base model")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    smoke = " (smoke run)" if result.quick else ""
    figure.suptitle(f"Many adapters in one batch: one step over the base model{smoke}", fontsize=11)
    return figure


def _panel(axis: Any, result: Result, phase: str, model: str) -> None:
    def mine(row: Row) -> bool:
        return row["model"] == model and str(row["step"]).startswith(phase)

    rows = [row for row in result.tables["ratios"] if mine(row)]
    floors = [row for row in result.tables["floors"] if mine(row)]
    points = [(str(row["step"]), int(str(row["distinct"]))) for row in floors]
    for offset, name in ((-0.2, "ours"), (0.2, "peft")):
        chosen = {(row["step"], row["distinct"]): row for row in rows if row["pair"] == f"{name} / base"}
        ratio, low, high = (
            [float(str(chosen[point][key])) for point in points] for key in ("ratio", "low", "high")
        )
        places = [place + offset for place in range(len(points))]
        whiskers = [
            [middle - bottom for middle, bottom in zip(ratio, low, strict=True)],
            [top - middle for middle, top in zip(ratio, high, strict=True)],
        ]
        # Bars stand on 1, the base model: their height is the overhead.
        heights = [value - 1 for value in ratio]
        axis.bar(places, heights, 0.36, bottom=1, color=_COLOURS[name], label=name)
        axis.errorbar(places, ratio, yerr=whiskers, fmt="none", ecolor="#222222", elinewidth=1, capsize=2.5)
        for place, value, top in zip(places, ratio, high, strict=True):
            axis.annotate(
                f"{value:.2f}",
                (place, max(top, 1)),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )
    for key, style, label in (
        ("roofline", "-", "floor (this machine)"),
        ("bytes", ":", "floor if limited by memory"),
    ):
        for index, row in enumerate(floors):
            if (floor := row[key]) is not None:
                axis.hlines(
                    float(str(floor)),
                    index - 0.44,
                    index + 0.44,
                    colors="black",
                    linestyles=style,
                    linewidth=1.4,
                    label=label if index == 0 else None,
                )
    axis.axhline(1, color="#777777", linewidth=0.8)
    axis.set_xticks(range(len(points)), [f"{step.split()[1]}\nU = {distinct}" for step, distinct in points])
    axis.set_title(f"{model}, {phase} (rows x tokens, U distinct adapters)", fontsize=9)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def serve(result: Result) -> Any:
    """Milliseconds of a step by contender, and throughput by number of adapters, where they were measured."""
    from matplotlib.figure import Figure

    phases = [phase for phase in ("decode", "prefill") if result.tables.get(f"{phase} milliseconds")]
    replays = [row for row in result.tables.get("trace replay", []) if row["cv"] == 1]
    panels = len(phases) + bool(replays)
    figure = Figure(figsize=(5.2 * max(panels, 1), 4.2), layout="constrained")
    axes = list(figure.subplots(1, max(panels, 1), squeeze=False)[0])
    for phase, axis in zip(phases, axes, strict=False):
        _step_panel(axis, result.tables[f"{phase} milliseconds"], phase)
    if replays:
        _throughput_panel(axes[len(phases)], replays)
    smoke = " (smoke run)" if result.quick else ""
    figure.suptitle(f"Serving many personas: ours against its base and peers{smoke}", fontsize=11)
    return figure


def _step_panel(axis: Any, rows: Sequence[Row], phase: str) -> None:
    """A group of bars from zero for every batch, a bar for every contender with its milliseconds.

    Bars more than eight times the shortest are cut and hatched: only their number counts.
    """
    names = [name for name in _SERVE_COLOURS if any(row.get(name) is not None for row in rows)]
    every = [float(str(row[name])) for row in rows for name in names if row.get(name) is not None]
    top = max(time for time in every if time <= 8 * min(every))
    for index, name in enumerate(names):
        places = [place for place, row in enumerate(rows) if row.get(name) is not None]
        times = [float(str(rows[place][name])) for place in places]
        shifted = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place in places]
        shown = [time if time <= top else 1.2 * top for time in times]
        bars = axis.bar(shifted, shown, 0.8 / len(names), color=_SERVE_COLOURS[name], label=name)
        for bar, time in zip(bars, times, strict=True):
            middle, cut = bar.get_x() + bar.get_width() / 2, time > top
            bar.set_hatch("//" if cut else None)
            text = f"{time:,.0f} (cut)" if cut else f"{time:,.0f}"
            axis.text(middle, bar.get_height(), text, fontsize=6, ha="center", va="bottom")
    axis.set_ylim(0, 1.7 * top)  # the legend stands above the bars
    axis.set_ylabel("milliseconds a step")
    labels = [f"{row['rows x tokens']}\n{row['personas']} personas" for row in rows]
    axis.set_xticks(range(len(rows)), labels)
    axis.set_title(f"{phase} (rows x prompt tokens)", fontsize=9)
    axis.legend(fontsize=7, frameon=False, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def _throughput_panel(axis: Any, rows: Sequence[Row]) -> None:
    """Median tokens a second over the draws, a line for every law."""
    for law in sorted({str(row["law"]) for row in rows}):
        found: dict[int, list[float]] = {}
        for row in rows:
            if row["law"] == law:
                found.setdefault(int(str(row["adapters"])), []).append(float(str(row["tokens/s"])))
        numbers = sorted(found)
        axis.plot(numbers, [median(found[number]) for number in numbers], marker="o", label=law)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("registered adapters")
    axis.set_ylabel("tokens a second")
    axis.set_title("trace replay", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


PLOTS: Mapping[str, Callable[[Result], Any]] = {
    "compose": compose,
    "memory": memory_plots.memory,
    "panacea": panacea_plots.panacea,
    "serve": serve,
}


def png(result: Result) -> bytes | None:
    """The result's figure as PNG, or None if its benchmark has none."""
    if result.name not in PLOTS:
        return None
    buffer = io.BytesIO()
    # Without metadata the same result gives the same file.
    PLOTS[result.name](result).savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
