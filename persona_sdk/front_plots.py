"""Pictures of Pareto fronts: what every preference vector reached, for one method or several.

    2 dimensions    curves in objective space, points coloured by λ, the non-dominated envelope, the reference
    3 dimensions    a ternary heat map for every method and objective: value over the triangle of λ
    more            a table for every method: the λ nearest to every vertex and to the centre, by objective

Colours are those of Okabe & Ito for methods and matplotlib's cividis for values: both can be told apart with
any kind of colour vision, and every value that matters also stands there as a number. Needs matplotlib, of
the extra ``pareto``; pyplot is never touched, so drawing leaves no state behind and works in any thread.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.adapters.dominance import non_dominated_points, reference_point
from persona_sdk.adapters.fronts import Front
from persona_sdk.errors import AdapterError, InvalidInputError

_METHODS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_VALUES = "cividis"
_EXACT = 1e-5  # how far from a vertex or the centre still counts as there
_NEAR = 1.0  # a reference at most this many extents away from the points is drawn to scale


def plot(
    fronts: Mapping[str, Front],
    reference: Sequence[float] | Float[Tensor, " m"] | None = None,
    title: str = "",
) -> Any:
    """A matplotlib ``Figure`` of the fronts of one or more methods, which must share their dimensions.

    Raises:
        InvalidInputError: no front, fronts of different dimensions, or a reference that does not fit them.
        AdapterError: matplotlib is not installed.
    """
    names = _shared_names(fronts)
    values = next(iter(fronts.values())).values
    point = None if reference is None else reference_point(reference, values)
    draw = {2: _curves, 3: _triangles}.get(len(names), _tables)
    figure = draw(fronts, point)
    if title:
        figure.suptitle(_plain(title), fontsize=12)
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _curves(fronts: Mapping[str, Front], reference: Tensor | None) -> Any:
    """Objective space of two dimensions; a curve follows λ₁ from 0 to 1."""
    names = _shared_names(fronts)
    figure = _figure(7.2, 5.2)
    axis = figure.subplots()
    dots = None
    for index, (method, front) in enumerate(fronts.items()):
        order = front.preferences[:, 0].argsort(stable=True)
        x, y = front.values[order].T.tolist()
        turn = index + index // len(_METHODS)  # the eighth method has the first one's colour, not its marker
        colour, marker = _METHODS[index % len(_METHODS)], _MARKERS[turn % len(_MARKERS)]
        collapsed = len(x) > 1 and torch.allclose(front.values, front.values[:1])
        label = _plain(method, 24) + (f"\n(one point for {len(x)} λ)" if collapsed else "")
        axis.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=8, label=label)
        weights = front.preferences[order, 0].tolist()
        shared: dict[str, Any] = {"cmap": _VALUES, "vmin": 0, "vmax": 1, "zorder": 3}
        dots = axis.scatter(x, y, c=weights, marker=marker, s=44, edgecolors=colour, linewidths=1.2, **shared)
    _envelope(axis, torch.cat([front.values for front in fronts.values()]))
    if reference is not None:
        _mark_reference(axis, reference)
    figure.colorbar(dots, ax=axis, label=f"weight of {_plain(names[0])} in λ", aspect=30)
    axis.set_xlabel(f"{_plain(names[0])} (higher is better)")
    axis.set_ylabel(f"{_plain(names[1])} (higher is better)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(axis.get_lines()), 3), frameon=False, fontsize=9)
    return figure


def _envelope(axis: Any, values: Float[Tensor, "n 2"]) -> None:
    """The border of what all points together dominate, as steps."""
    # sorted by the first objective, so falling in the second
    x, y = non_dominated_points(values).T.tolist()
    axis.step(x, y, where="pre", color="#555555", linewidth=1, linestyle=":", label="non-dominated envelope")


def _mark_reference(axis: Any, reference: Tensor) -> None:
    """A cross where the reference is near, else its place in words: far away it would squeeze the curves."""
    low, high = torch.tensor([axis.get_xlim(), axis.get_ylim()], dtype=torch.float64).T
    x, y = reference.tolist()
    width, height = (high - low).tolist()
    away = torch.maximum(low - reference, reference - high) / (high - low)
    if float(away.max()) <= _NEAR:
        axis.plot([x], [y], "x", color="black", markersize=9, markeredgewidth=2, label="reference point")
        return
    place = {"xycoords": "axes fraction", "fontsize": 8, "color": "#444444"}
    text = f"the reference point ({_number(x, width)}, {_number(y, height)}) is outside"
    axis.annotate(text, (0.0, 1.01), **place)  # above the axes, where no point can lie


def _triangles(fronts: Mapping[str, Front], reference: Tensor | None) -> Any:
    """A row for every method and a column for every objective, one colour scale a column."""
    names = _shared_names(fronts)
    figure = _figure(10.5, 3.7 * len(fronts) + 0.8)
    grid = figure.subplots(len(fronts), 3, squeeze=False)
    for column, name in enumerate(names):
        low, high = _scale(fronts, column)
        for axis, (method, front) in zip(grid[:, column], fronts.items(), strict=True):
            shade = _triangle(axis, front, column, low, high)
            axis.set_title(f"{_plain(method, 34)}\n{_plain(name, 34)}", fontsize=10)
        where: dict[str, Any] = {"orientation": "horizontal", "shrink": 0.75, "aspect": 30, "pad": 0.04}
        bar = figure.colorbar(shade, ax=list(grid[:, column]), **where)
        known = "" if reference is None else f", reference {_number(float(reference[column]), high - low)}"
        bar.set_label(f"{_plain(name, 34)}\n(higher is better{known})", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    figure.supxlabel("A triangle holds all λ; a corner puts all weight on one dimension.", fontsize=9)
    return figure


def _triangle(axis: Any, front: Front, column: int, low: float, high: float) -> Any:
    """Value of one objective over the triangle of λ, interpolated linearly between the points."""
    from matplotlib.tri import Triangulation

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    x, y = (front.preferences @ corners).T.numpy()
    values = front.values[:, column]
    scale: dict[str, Any] = {"cmap": _VALUES, "vmin": low, "vmax": high}
    edges = front.preferences[1:] - front.preferences[:1]
    if len(front.preferences) > 2 and int(torch.linalg.matrix_rank(edges, atol=1e-6)) == 2:
        axis.tripcolor(Triangulation(x, y), values.numpy(), shading="gouraud", **scale)
    axis.plot(*corners[[0, 1, 2, 0]].T.tolist(), color="#555555", linewidth=0.8)
    dots = axis.scatter(x, y, c=values.numpy(), s=22, edgecolors="white", linewidths=0.7, zorder=3, **scale)
    # The lower labels grow inwards, so that those of neighbouring triangles keep apart.
    places = (("left", "top", -9, -6), ("right", "top", 9, -6), ("center", "bottom", 0, 5))
    for index, (ha, va, dx, dy) in enumerate(places):
        there = front.preferences[:, index] >= 1 - _EXACT
        value = f"\n{_number(float(values[there][0]), high - low)}" if bool(there.any()) else ""
        text: dict[str, Any] = {"textcoords": "offset points", "ha": ha, "va": va, "fontsize": 8.5}
        axis.annotate(_plain(front.names[index], 15) + value, corners[index].tolist(), (dx, dy), **text)
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set(xlim=(-0.08, 1.08), ylim=(-0.25, 1.1))  # the labels are within, where the layout sees them
    return dots


def _tables(fronts: Mapping[str, Front], reference: Tensor | None) -> Any:
    """A table for every method: a row for every vertex and the centre, a column for every objective."""
    import matplotlib

    names = _shared_names(fronts)
    m = len(names)
    columns = min(len(fronts), 2)
    rows_of_tables = -(-len(fronts) // columns)
    figure = _figure((0.62 * m + 1.9) * columns + 0.8, (0.42 * m + 2.0) * rows_of_tables + 0.4)
    axes = list(figure.subplots(rows_of_tables, columns, squeeze=False).flat)
    for spare in axes[len(fronts) :]:
        spare.remove()
    axes = axes[: len(fronts)]
    scales = torch.tensor([_scale(fronts, column) for column in range(m)], dtype=torch.float64)
    low, high = scales.T
    for axis, (method, front) in zip(axes, fronts.items(), strict=True):
        rows, labels = _landmarks(front)
        values = front.values[rows]
        shares = (values - low) / (high - low)
        shade = axis.imshow(shares.numpy(), cmap=_VALUES, vmin=0, vmax=1, aspect="auto")
        for row in range(m + 1):
            for column in range(m):
                red, green, blue, _ = matplotlib.colormaps[_VALUES](float(shares[row, column]))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                text = _number(float(values[row, column]), float(high[column] - low[column]))
                axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
        below = [_plain(name) for name in names]
        if reference is not None:
            levels = [_number(*pair) for pair in zip(reference.tolist(), (high - low).tolist(), strict=True)]
            below = [f"{name} ({level})" for name, level in zip(below, levels, strict=True)]
        axis.set_xticks(range(m), below, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
        axis.set_yticks(range(m + 1), labels, fontsize=8.5)
        axis.set_xlabel("objective" if reference is None else "objective (reference)")
        axis.set_ylabel("preference vector λ")
        axis.set_title(_plain(method), fontsize=10)
        axis.axhline(m - 0.5, color="white", linewidth=2)
    bar = figure.colorbar(shade, ax=axes, ticks=[0, 1], aspect=30, fraction=0.03, pad=0.015)
    bar.ax.set_yticklabels(["lowest", "highest"], fontsize=8)
    bar.set_label("value within its column", fontsize=9, labelpad=-22)
    return figure


def _landmarks(front: Front) -> tuple[list[int], list[str]]:
    """Rows nearest to the m vertices and to the centre, with what to call them."""
    rows, labels = [], []
    for column, name in enumerate(front.names):
        weights = front.preferences[:, column]
        rows.append(int(weights.argmax()))
        weight = float(weights.max())
        labels.append(f"only {_plain(name)}" if weight >= 1 - _EXACT else f"{_plain(name)} {weight:.2f}")
    distances = (front.preferences - 1 / len(front.names)).norm(dim=1)
    rows.append(int(distances.argmin()))
    return rows, [*labels, "centre" if float(distances.min()) < _EXACT else "nearest the centre"]


def _scale(fronts: Mapping[str, Front], column: int) -> tuple[float, float]:
    """Lowest and highest value of one objective over all methods, never equal."""
    values = torch.cat([front.values[:, column] for front in fronts.values()])
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _number(value: float, extent: float) -> str:
    """A value with three digits of what the values differ by, and a true minus sign."""
    decimals = min(max(2 - math.floor(math.log10(extent)), 0), 6)
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\u2212")


def _shared_names(fronts: Mapping[str, Front]) -> tuple[str, ...]:
    found = {front.names for front in fronts.values()}
    if len(found) != 1:
        raise InvalidInputError(
            f"The fronts have the dimensions {sorted(found)}.",
            hint="Expected one front or more, all over the same dimensions in the same order.",
        )
    return found.pop()


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError(
            "Pictures of a front need the package matplotlib.", hint="pip install 'persona-sdk[pareto]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _plain(text: str, width: int = 60) -> str:
    """A name as it is, in at most two lines: a dollar sign or leading underscore is not markup."""
    lines = textwrap.fill(text, width, max_lines=2, placeholder="…")
    return "\u200b"[: text.startswith("_")] + lines.replace("$", r"\$")
