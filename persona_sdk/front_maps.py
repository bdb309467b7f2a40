"""Pictures of fronts over the preference vectors: value as colour, at the place of λ.

    3 dimensions    a ternary heat map for every method and objective: value over the triangle of λ
    more            a table for every method: the λ nearest to every vertex and to the centre, by objective

Every objective has one colour scale for all methods, so colours can be compared down a column.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from persona_sdk.adapters.fronts import Front
from persona_sdk.front_style import VALUES, new_figure, number, plain, shared_names

_EXACT = 1e-5  # how far from a vertex or the centre still counts as there


def triangles(fronts: Mapping[str, Front], reference: Tensor | None) -> Any:
    """A row for every method and a column for every objective, one colour scale a column."""
    names = shared_names(fronts)
    figure = new_figure(10.5, 3.7 * len(fronts) + 0.8)
    grid = figure.subplots(len(fronts), 3, squeeze=False)
    for column, name in enumerate(names):
        low, high = _range(fronts, column)
        for axis, (method, front) in zip(grid[:, column], fronts.items(), strict=True):
            shade = _triangle(axis, front, column, low, high)
            axis.set_title(f"{plain(method, 34)}\n{plain(name, 34)}", fontsize=10)
        where: dict[str, Any] = {"orientation": "horizontal", "shrink": 0.75, "aspect": 30, "pad": 0.04}
        bar = figure.colorbar(shade, ax=list(grid[:, column]), **where)
        known = "" if reference is None else f", reference {number(float(reference[column]), high - low)}"
        bar.set_label(f"{plain(name, 34)}\n(higher is better{known})", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    figure.supxlabel("A triangle holds all λ; a corner puts all weight on one dimension.", fontsize=9)
    return figure


def _triangle(axis: Any, front: Front, column: int, low: float, high: float) -> Any:
    """Value of one objective over the triangle of λ, interpolated linearly between the points."""
    from matplotlib.tri import Triangulation

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    x, y = (front.preferences @ corners).T.numpy()
    values = front.values[:, column]
    scale: dict[str, Any] = {"cmap": VALUES, "vmin": low, "vmax": high}
    edges = front.preferences[1:] - front.preferences[:1]
    if len(front.preferences) > 2 and int(torch.linalg.matrix_rank(edges, atol=1e-6)) == 2:
        axis.tripcolor(Triangulation(x, y), values.numpy(), shading="gouraud", **scale)
    axis.plot(*corners[[0, 1, 2, 0]].T.tolist(), color="#555555", linewidth=0.8)
    dots = axis.scatter(x, y, c=values.numpy(), s=22, edgecolors="white", linewidths=0.7, zorder=3, **scale)
    # The lower labels grow inwards, so that those of neighbouring triangles keep apart.
    places = (("left", "top", -9, -6), ("right", "top", 9, -6), ("center", "bottom", 0, 5))
    for index, (ha, va, dx, dy) in enumerate(places):
        there = front.preferences[:, index] >= 1 - _EXACT
        value = f"\n{number(float(values[there][0]), high - low)}" if bool(there.any()) else ""
        text: dict[str, Any] = {"textcoords": "offset points", "ha": ha, "va": va, "fontsize": 8.5}
        axis.annotate(plain(front.names[index], 15) + value, corners[index].tolist(), (dx, dy), **text)
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set(xlim=(-0.08, 1.08), ylim=(-0.25, 1.1))  # the labels are within, where the layout sees them
    return dots


def tables(fronts: Mapping[str, Front], reference: Tensor | None) -> Any:
    """A table for every method: a row for every vertex and the centre, a column for every objective."""
    import matplotlib

    names = shared_names(fronts)
    m = len(names)
    columns = min(len(fronts), 2)
    rows_of_tables = -(-len(fronts) // columns)
    figure = new_figure((0.62 * m + 1.9) * columns + 0.8, (0.42 * m + 2.0) * rows_of_tables + 0.4)
    axes = list(figure.subplots(rows_of_tables, columns, squeeze=False).flat)
    for spare in axes[len(fronts) :]:
        spare.remove()
    axes = axes[: len(fronts)]
    scales = torch.tensor([_range(fronts, column) for column in range(m)], dtype=torch.float64)
    low, high = scales.T
    for axis, (method, front) in zip(axes, fronts.items(), strict=True):
        rows, labels = _landmarks(front)
        values = front.values[rows]
        shares = (values - low) / (high - low)
        shade = axis.imshow(shares.numpy(), cmap=VALUES, vmin=0, vmax=1, aspect="auto")
        for row in range(m + 1):
            for column in range(m):
                red, green, blue, _ = matplotlib.colormaps[VALUES](float(shares[row, column]))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                text = number(float(values[row, column]), float(high[column] - low[column]))
                axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
        below = [plain(name) for name in names]
        if reference is not None:
            levels = [number(*pair) for pair in zip(reference.tolist(), (high - low).tolist(), strict=True)]
            below = [f"{name} ({level})" for name, level in zip(below, levels, strict=True)]
        axis.set_xticks(range(m), below, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
        axis.set_yticks(range(m + 1), labels, fontsize=8.5)
        axis.set_xlabel("objective" if reference is None else "objective (reference)")
        axis.set_ylabel("preference vector λ")
        axis.set_title(plain(method), fontsize=10)
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
        labels.append(f"only {plain(name)}" if weight >= 1 - _EXACT else f"{plain(name)} {weight:.2f}")
    distances = (front.preferences - 1 / len(front.names)).norm(dim=1)
    rows.append(int(distances.argmin()))
    return rows, [*labels, "centre" if float(distances.min()) < _EXACT else "nearest the centre"]


def _range(fronts: Mapping[str, Front], column: int) -> tuple[float, float]:
    """Lowest and highest value of one objective over all methods, never equal."""
    values = torch.cat([front.values[:, column] for front in fronts.values()])
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
