"""Preference vectors: points of the simplex, by name, as samples and as grids.

    λ ∈ Δ = {λ_i >= 0, Σ_i λ_i = 1}

| symbol | field                | shape                                              |
|--------|----------------------|----------------------------------------------------|
| m      | ``len(names)``       | integer                                            |
| λ      | the returned weights | [m]; batches [n, m]                                |
| a      | ``concentration``    | number; λ ~ Dirichlet(a, ..., a), 1 is uniform     |
| q      | ``vertex``           | probability that λ is a vertex e_i instead         |

A user names some weights; what is left of 1 goes to the dimensions not named, in their present ratio:

    w_i = given,   w_j = (1 - Σ given) · λ_j / Σ_rest λ     if Σ given < 1 and some are not named
    λ = w / Σ w                                             otherwise, the rest 0

Without over-sampled vertices the ends of the front, which λ hits with probability 0, are trained poorly
(Panacea, Zhong et al. 2024, arXiv 2402.02030).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import InvalidInputError

_DIVISIONS = {2: 10, 3: 5, 4: 3}  # 11, 21 and 20 points; with more dimensions vertices and middles of edges
_ROUNDING = 1e-9
_LARGEST = 1e6


def complete(
    names: Sequence[str], given: Mapping[str, Any], present: Sequence[float] | None = None
) -> tuple[float, ...]:
    """The preference vector that some named weights ask for; see the module.

    Args:
        names: the dimensions, in order.
        given: weights by name; not all need to be named, and none gives `present` back.
        present: λ before; None is the centre of the simplex.

    Raises:
        InvalidInputError: an unknown name, a weight that is negative or no finite number, or all weights 0.
    """
    before = [1 / len(names)] * len(names) if present is None else list(present)
    _require_usable(names, given)
    if not given:
        return tuple(before)
    total = math.fsum(given.values())
    rest = [place for place, name in enumerate(names) if name not in given]
    weights = [float(given.get(name, 0.0)) for name in names]
    if rest and total < 1:
        ratio = (
            [before[place] for place in rest] if any(before[place] for place in rest) else [1.0] * len(rest)
        )
        for place, part in zip(rest, ratio, strict=True):
            weights[place] = (1 - total) * part / math.fsum(ratio)
        total = 1.0
    if total == 0:
        raise InvalidInputError(
            f"The preference {dict(given)} has no weight above 0.",
            hint=f"Give one of {', '.join(names)} more than 0.",
        )
    # A vector that sums to 1 stays as it was said, to the bit: equal preferences make equal plans.
    scale = 1.0 if abs(total - 1) < _ROUNDING else total
    return tuple(weight / scale for weight in weights)


def sample(
    n: int, m: int, draw: np.random.Generator, *, concentration: float = 1.0, vertex: float = 0.2
) -> Float[Tensor, "n m"]:
    """`n` preference vectors: a vertex with probability `vertex`, else from the Dirichlet distribution."""
    vectors = draw.dirichlet([concentration] * m, size=n)
    ends = np.eye(m)[draw.integers(m, size=n)]
    vectors = np.where(draw.random((n, 1)) < vertex, ends, vectors)
    return torch.from_numpy(vectors).float()


def grid(m: int, divisions: int | None = None) -> Float[Tensor, "n m"]:
    """All vectors whose entries are multiples of ``1 / divisions``, vertices included, in order of the first.

    Args:
        m: dimensions, at least 2.
        divisions: None takes 10 for two dimensions, 5 for three, 3 for four, 2 for more.

    Raises:
        InvalidInputError: less than one division.
    """
    steps = _DIVISIONS.get(m, 2) if divisions is None else divisions
    if steps < 1:
        raise InvalidInputError(f"A grid with {steps} divisions has no points.", hint="Expected at least 1.")
    bars = combinations(range(steps + m - 1), m - 1)  # stars and bars
    counts = [np.diff([-1, *places, steps + m - 1]) - 1 for places in bars]
    return torch.tensor(np.array(counts)[::-1].copy(), dtype=torch.float32) / steps


def _require_usable(names: Sequence[str], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in names:
            raise InvalidInputError(
                f"There is no preference dimension {name!r}.", hint=f"Known: {', '.join(names)}."
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= _LARGEST:  # false for NaN too
            raise InvalidInputError(
                f"The preference {name}={value!r} cannot be used.",
                hint=f"Expected a number from 0 to {_LARGEST:g}.",
            )
