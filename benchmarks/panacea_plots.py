"""The figure of the panacea benchmark: fronts, DPO's margins and the cost of a shared preference.

| panel        | what                                                           | closed form          |
|--------------|----------------------------------------------------------------|----------------------|
| styles, real | objectives over λ, a curve for each method; means over seeds   |                      |
| pairs        | margin against logit λ_1                                       | the diagonal, ± 25 % |
| calibration  | nats below the own vertex against -log λ_i                     | the diagonal         |

Drawn from the tables of the result; a panel whose table is missing is left out. Fronts are cut a nat below
the reference point, and what lies further away is not drawn: the ends of some curves, where a dimension has
no weight, are tens of nats outside. Margins and costs are cut likewise. Colours are mostly those of Okabe and
Ito, and every method has a marker or line of its own, so that no reader depends on colour.
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import Result, Row
from benchmarks.panacea_measured import CONTROL, MIXTURE, ORACLE, OURS, PAPER, SOUPS

_Draw = Callable[[Any, Result], None]
_GREY = "#666666"
_OUTSIDE = 1.0  # nats that are shown below the reference point

# method -> colour, marker, line; in the order of the legend
STYLES: dict[str, tuple[str, str, str]] = {
    OURS: ("#0072B2", "o", "-"),
    PAPER: ("#56B4E9", "v", "-"),
    SOUPS: ("#D55E00", "s", "-"),
    ORACLE: ("#000000", "", "--"),
    MIXTURE: ("#444444", "", "-."),
    "λ in the prompt": ("#009E73", "^", "-"),
    "one per vector": ("#CC79A7", "P", ""),
    "joint": ("#E69F00", "D", ""),
    CONTROL: ("#7F7F7F", "X", ""),
}
NAMES = {
    OURS: "Panacea, as this SDK recommends",
    PAPER: "Panacea, as published",
    ORACLE: "oracle: mixture of experts, m × compute",
    MIXTURE: "mixture of the soups' experts",
    "joint": "joint, without λ",
    CONTROL: "control: s frozen at 0",
    "one per vector": "one adapter for each λ",
}


def panacea(result: Result) -> Any:
    """A panel for every part that was measured, with one legend."""
    from matplotlib.figure import Figure

    panels = _panels(result)
    figure = Figure(figsize=(5.4 * min(max(len(panels), 1), 2), 4.4 * -(-max(len(panels), 1) // 2) + 1.1))
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    axes = figure.subplots(-(-max(len(panels), 1) // 2), min(max(len(panels), 1), 2), squeeze=False).ravel()
    for draw, axis in zip(panels, axes, strict=False):
        draw(axis, result)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _legend(figure, axes)
    smoke = " (smoke run)" if result.quick else ""
    figure.suptitle(f"Panacea: one adapter for all preferences{smoke}", fontsize=12)
    return figure


def _panels(result: Result) -> list[_Draw]:
    tables = {title for title, rows in result.tables.items() if rows}
    panels: list[_Draw] = []
    for part, title in (
        ("styles", "Rule-made styles (SFT)"),
        ("real", "Real responses, shorter and longer (SFT)"),
    ):
        if {f"{part}: fronts", f"{part}: reference point"} <= tables:
            panels.append(lambda axis, result, part=part, title=title: _front(axis, result, part, title))
    if "pairs: margins" in tables:
        panels.append(_margins)
    if "styles: nats below the vertex" in tables:
        panels.append(_calibration)
    return panels


def _front(axis: Any, result: Result, part: str, title: str) -> None:
    """Both objectives of each method; a curve follows λ_1 from 0 to 1."""
    first, second = (str(row["dimension"]) for row in result.tables[f"{part}: reference point"])
    z = [_number(row, "reference") for row in result.tables[f"{part}: reference point"]]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(result.tables[f"{part}: fronts"], key=lambda row: _number(row, f"λ {first}")):
        if row["method"] in STYLES:
            point = (_number(row, first), _number(row, second))
            curves.setdefault(str(row["method"]), []).append(point)
    low = [at - _OUTSIDE for at in z]
    inner = curves.get(OURS, [])[1:-1]  # in view even where it is outside the reference
    low = [min([at, *(point[i] - 0.3 for point in inner)]) for i, at in enumerate(low)]
    tops = [
        max(values) for values in zip(*(point for each in curves.values() for point in each), strict=True)
    ]
    high = [max(top, at + 1) + 0.3 for top, at in zip(tops, z, strict=True)]
    outside = []
    for method in [method for method in STYLES if method in curves]:
        if any(x > low[0] and y > low[1] for x, y in curves[method]):
            _curve(axis, method, curves[method])
        else:
            outside.append(NAMES.get(method, method))
    if outside:
        said = f"outside: {', '.join(outside)}"
        text = axis.annotate(said, (0.02, 0.02), xycoords="axes fraction", fontsize=7.5, color=_GREY)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    axis.axvline(z[0], color=_GREY, linewidth=0.8, linestyle=":")
    axis.axhline(z[1], color=_GREY, linewidth=0.8, linestyle=":")
    axis.plot(*z, marker="+", markersize=11, markeredgewidth=1.8, color=_GREY, linestyle="", zorder=4)
    axis.annotate("reference point z", z, (6, -12), textcoords="offset points", fontsize=8, color=_GREY)
    axis.set_xlim(low[0], high[0])
    axis.set_ylim(low[1], high[1])
    axis.set_xlabel(f"{first}: log-likelihood, nats a reply")
    axis.set_ylabel(f"{second}: log-likelihood, nats a reply")
    axis.set_title(title, fontsize=10)


def _margins(axis: Any, result: Result) -> None:
    """The mean margin of each weight, beside what DPO's optimum has, and a quarter of it to each side."""
    rows = result.tables["pairs: margins"]
    logits = sorted({_number(row, "logit") for row in rows})
    ends = [min(logits) * 1.1, 0.0, max(logits) * 1.1]
    low, high = ([end * side for end in ends] for side in (0.75, 1.25))
    axis.fill_between(ends, low, high, color="#dddddd", linewidth=0, label="within 25 %")
    axis.plot(ends, ends, color=_GREY, linewidth=1, label="closed form")
    for method in (OURS, PAPER, SOUPS):
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: _number(r, "logit"))
        _curve(axis, method, [(_number(row, "logit"), _number(row, "margin")) for row in mine])
    axis.set_xlim(ends[0], ends[2])
    axis.set_ylim(1.5 * ends[0], 1.5 * ends[2])
    axis.set_xlabel("logit λ of the first dimension")
    axis.set_ylabel("mean margin, nats")
    axis.set_title("Opposite labels (DPO): margin of a pair", fontsize=10)


def _calibration(axis: Any, result: Result) -> None:
    """Nats below the own vertex by weight; one curve for each method and dimension."""
    rows = result.tables["styles: nats below the vertex"]
    top = max(_number(row, "closed form") for row in rows)
    axis.plot([0, 1.1 * top], [0, 1.1 * top], color=_GREY, linewidth=1, label="closed form")
    dimensions = list(dict.fromkeys(str(row["dimension"]) for row in rows))
    for method in (OURS, SOUPS, ORACLE):
        for place, dimension in enumerate(dimensions):
            mine = [row for row in rows if row["dimension"] == dimension and row.get(method) is not None]
            points = sorted((_number(row, "closed form"), _number(row, method)) for row in mine)
            _curve(axis, method, points, hollow=place > 0)
    axis.set_xlim(-0.05 * top, 1.15 * top)
    axis.set_ylim(-0.2 * top, 1.8 * top)
    axis.set_xlabel("-log λ of the style")
    axis.set_ylabel("nats below its own vertex")
    said = f"filled: {dimensions[0]}, hollow: {dimensions[-1]}"
    axis.set_title(f"Styles: cost of a weight below 1 ({said})", fontsize=10)


def _curve(axis: Any, method: str, points: Sequence[tuple[float, float]], *, hollow: bool = False) -> None:
    if not points:
        return
    colour, marker, line = STYLES[method]
    axis.plot(
        *zip(*points, strict=True),
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=2 if method == OURS else 1.3,
        markersize=5.5,
        markerfacecolor="white" if hollow else colour,
        zorder=3 if method == OURS else 2,
        label=NAMES.get(method, method),
    )


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """Each label once, whatever panels it is in."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 8.5}
        figure.legend(found.values(), found.keys(), **place)


def _number(row: Row, key: str) -> float:
    return float(str(row[key]))
