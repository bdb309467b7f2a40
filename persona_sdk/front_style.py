"""What the pictures of fronts share: the figure, its colours of values, names and numbers as text."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from persona_sdk.adapters.fronts import Front
from persona_sdk.errors import AdapterError, InvalidInputError

VALUES = "cividis"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches; `AdapterError` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError(
            "Pictures of a front need the package matplotlib.", hint="pip install 'persona-sdk[pareto]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def shared_names(fronts: Mapping[str, Front]) -> tuple[str, ...]:
    """The dimensions of all fronts; `InvalidInputError` unless they are the same and there are some."""
    found = {front.names for front in fronts.values()}
    if len(found) != 1:
        raise InvalidInputError(
            f"The fronts have the dimensions {sorted(found)}.",
            hint="Expected one front or more, all over the same dimensions in the same order.",
        )
    return found.pop()


def number(value: float, extent: float) -> str:
    """A value with three digits of what the values differ by, and a true minus sign."""
    decimals = min(max(2 - math.floor(math.log10(extent)), 0), 6)
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\u2212")


def plain(text: str, width: int = 60) -> str:
    """A name as it is, in at most two lines: a dollar sign or leading underscore is not markup."""
    lines = textwrap.fill(text, width, max_lines=2, placeholder="…")
    return "\u200b"[: text.startswith("_")] + lines.replace("$", r"\$")
