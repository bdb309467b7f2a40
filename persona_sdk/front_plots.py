"""Pictures of Pareto fronts: what every preference vector reached, for one method or several.

    2 dimensions    curves in objective space, points coloured by λ, the non-dominated envelope, the reference
    3 dimensions    a ternary heat map for every method and objective: value over the triangle of λ
    more            a table for every method: the λ nearest to every vertex and to the centre, by objective

Colours are those of Okabe & Ito for methods and matplotlib's cividis for values: both can be told apart with
any kind of colour vision, and every value that matters also stands there as a number. Needs matplotlib, of
the extra ``pareto``; pyplot is never touched, so drawing leaves no state behind and works in any thread.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.adapters.dominance import checked_reference, non_dominated_points
from persona_sdk.adapters.fronts import Front
from persona_sdk.front_maps import tables, triangles
from persona_sdk.front_style import VALUES, new_figure, number, plain, shared_names

_METHODS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
    names = shared_names(fronts)
    values = next(iter(fronts.values())).values
    point = None if reference is None else checked_reference(reference, values)
    draw = {2: _curves, 3: triangles}.get(len(names), tables)
    figure = draw(fronts, point)
    if title:
        figure.suptitle(plain(title), fontsize=12)
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _curves(fronts: Mapping[str, Front], reference: Tensor | None) -> Any:
    """Objective space of two dimensions; a curve follows λ₁ from 0 to 1."""
    names = shared_names(fronts)
    figure = new_figure(7.2, 5.2)
    axis = figure.subplots()
    dots = None
    for index, (method, front) in enumerate(fronts.items()):
        order = front.preferences[:, 0].argsort(stable=True)
        x, y = front.values[order].T.tolist()
        turn = index + index // len(_METHODS)  # the eighth method has the first one's colour, not its marker
        colour, marker = _METHODS[index % len(_METHODS)], _MARKERS[turn % len(_MARKERS)]
        collapsed = len(x) > 1 and torch.allclose(front.values, front.values[:1])
        label = plain(method, 24) + (f"\n(one point for {len(x)} λ)" if collapsed else "")
        axis.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=8, label=label)
        weights = front.preferences[order, 0].tolist()
        shared: dict[str, Any] = {"cmap": VALUES, "vmin": 0, "vmax": 1, "zorder": 3}
        dots = axis.scatter(x, y, c=weights, marker=marker, s=44, edgecolors=colour, linewidths=1.2, **shared)
    _envelope(axis, torch.cat([front.values for front in fronts.values()]))
    if reference is not None:
        _mark_reference(axis, reference)
    figure.colorbar(dots, ax=axis, label=f"weight of {plain(names[0])} in λ", aspect=30)
    axis.set_xlabel(f"{plain(names[0])} (higher is better)")
    axis.set_ylabel(f"{plain(names[1])} (higher is better)")
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
    text = f"the reference point ({number(x, width)}, {number(y, height)}) is outside"
    axis.annotate(text, (0.0, 1.01), **place)  # above the axes, where no point can lie
