"""Metrics of a Pareto front: what preference vectors get of every objective, to compare methods by.

    HV         volume of ⋃ⱼ [z, ξʲ]                        up: better
    IP         (1/n) Σⱼ <λʲ, ξʲ>                           up: better
    Sparsity   1/(m (P-1)) Σᵢ Σⱼ (ξ̃ᵢʲ - ξ̃ᵢʲ⁺¹)²            down: denser; ξ̃ᵢ is objective i, sorted
    Spacing    std of dⱼ = min over l≠j of ‖ξʲ - ξˡ‖₂      down: more even; std with 1/P
    Range i    maxⱼ ξᵢʲ - minⱼ ξᵢʲ                         up: wider
    ρᵢ         Spearman's rank correlation of λᵢ and ξᵢ    1: more weight always gives more of it
    ceiling i  √(1 - Σ (t³-t) / (n³-n))                    what ρᵢ can reach; t are the sizes of ties in λᵢ

    symbol  field          shape
    λ       preferences    [n, m]   rows on the simplex
    ξ       values         [n, m]   evaluation of every objective under that λ; higher is better
    z       reference      [m]      one fixed point for all methods and seeds
    P       non_dominated           number of non-dominated points

Sparsity and spacing are taken over the non-dominated points, twins counted once. "The next point" is defined
for m = 2 only; above, every objective is sorted apart, as PGMORL does, which is the same number for m = 2.
Both depend on the units of the objectives, and both are best, 0, for a front that has collapsed to one
point: never read them without the hypervolume and the ranges.

A reference that is taken from a method's own minima makes hypervolumes that cannot be compared. Here it is
an argument without a default, and `FrontScores.outside` counts the points that do not exceed it.

References: Zitzler & Thiele 1999 (hypervolume); Xu et al. 2020, PGMORL (sparsity); Schott 1995 (spacing,
there with city-block distances).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.adapters.dominance import (
    checked_reference,
    finite_matrix,
    measure_hypervolume,
    non_dominated_points,
)
from persona_sdk.adapters.dominance import hypervolume as hypervolume
from persona_sdk.adapters.dominance import hypervolume_estimate as hypervolume_estimate
from persona_sdk.adapters.dominance import non_dominated as non_dominated
from persona_sdk.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class Front:
    """What one method reached for n preference vectors over m named dimensions.

    Args:
        names: the m dimensions, in the order of the columns.
        preferences: preference vectors ``[n, m]``, one a row.
        values: their evaluation ``[n, m]``, higher is better.

    Raises:
        InvalidInputError: shapes that do not fit, NaN or infinity, a row off the simplex, bad names.
    """

    names: tuple[str, ...]
    # any shape: files bring what they like, and `__post_init__` has the better message
    preferences: Float[Tensor, "..."]
    values: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for field in ("preferences", "values"):  # copies, so that nobody changes a front that was scored
            tensor = getattr(self, field).detach().to("cpu", torch.float64, copy=True)
            object.__setattr__(self, field, finite_matrix(tensor, field))
        m, shape = len(self.names), tuple(self.values.shape)
        if m < 2 or len(set(self.names)) != m or not all(self.names):
            raise InvalidInputError(
                f"The dimensions are {self.names}.", hint="Expected two or more different names."
            )
        if shape[1] != m or tuple(self.preferences.shape) != shape:
            raise InvalidInputError(
                f"{m} dimensions, preferences of shape {tuple(self.preferences.shape)}, values of {shape}.",
                hint="Expected one row for every preference vector and one column for every dimension.",
            )
        off = (self.preferences < 0).any(1) | ((self.preferences.sum(1) - 1).abs() > 1e-5)
        if bool(off.any()):
            raise InvalidInputError(
                f"Preference vector {self.preferences[off][0].tolist()} is not on the simplex.",
                hint="Expected weights of at least 0 that sum to 1.",
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; `from_dict` is the inverse."""
        rows = {"preferences": self.preferences.tolist(), "values": self.values.tolist()}
        return {"names": list(self.names), **rows}

    @classmethod
    def from_dict(cls, data: Any) -> "Front":
        """Rebuild a front; raises `InvalidInputError` on anything that `as_dict` does not give."""
        try:
            names, preferences, values = (data[key] for key in ("names", "preferences", "values"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"names is {names!r}")
            return cls(
                tuple(names),
                torch.tensor(preferences, dtype=torch.float64),
                torch.tensor(values, dtype=torch.float64),
            )
        except InvalidInputError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"Not a front: {error}.", hint="Expected the lists names, preferences and values."
            ) from error


@dataclass(frozen=True)
class FrontScores:
    """Every metric of one front; tuples are in the order of its names.

    ``hypervolume_interval`` is None where the hypervolume is exact, else the 95 % interval of the estimate.
    ``outside`` counts the points that do not exceed the reference in every objective and so add no volume.
    ``non_dominated`` counts the points that no other point dominates.
    """

    reference: tuple[float, ...]
    points: int
    non_dominated: int
    outside: int
    hypervolume: float
    hypervolume_interval: tuple[float, float] | None
    inner_product: float
    sparsity: float
    spacing: float
    ranges: tuple[float, ...]
    rank_correlations: tuple[float, ...]
    rank_ceilings: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def score(front: Front, reference: Sequence[float] | Float[Tensor, " m"]) -> FrontScores:
    """All metrics of `front` against `reference`, the same point for every method that is compared.

    Raises:
        InvalidInputError: the reference does not fit the front.
        AdapterError: moocore is not installed.
    """
    values = front.values
    point = checked_reference(reference, values)
    volume, interval = measure_hypervolume(values, point)
    return FrontScores(
        reference=tuple(point.tolist()),
        points=len(values),
        non_dominated=int(non_dominated(values).sum()),
        outside=int((values <= point).any(1).sum()),
        hypervolume=volume,
        hypervolume_interval=interval,
        inner_product=inner_product(front.preferences, values),
        sparsity=sparsity(values),
        spacing=spacing(values),
        ranges=ranges(values),
        rank_correlations=rank_correlations(front.preferences, values),
        rank_ceilings=rank_ceilings(front.preferences),
    )


def inner_product(preferences: Float[Tensor, "n m"], values: Float[Tensor, "n m"]) -> float:
    """Mean of <λ, ξ>: what a user gets, weighed as the user asked."""
    return float((preferences.double() * values.double()).sum(1).mean())


def sparsity(values: Float[Tensor, "n m"]) -> float:
    """Mean squared step between neighbours, every objective sorted apart (PGMORL); 0 for a single point."""
    points = non_dominated_points(values)
    return float(points.sort(dim=0).values.diff(dim=0).square().mean()) if len(points) > 1 else 0.0


def spacing(values: Float[Tensor, "n m"]) -> float:
    """Standard deviation (1/P) of the Euclidean distances to the nearest point; 0 for a single point."""
    points = non_dominated_points(values)
    if len(points) < 2:
        return 0.0
    # without the matrix product, which loses half of the digits of small distances
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.fill_diagonal_(torch.inf).amin(1)
    return float(nearest.std(correction=0))


def ranges(values: Float[Tensor, "n m"]) -> tuple[float, ...]:
    """Extent of every objective over all points: what sparsity and spacing do not see."""
    return tuple((values.amax(0) - values.amin(0)).tolist())


def rank_correlations(preferences: Float[Tensor, "n m"], values: Float[Tensor, "n m"]) -> tuple[float, ...]:
    """Spearman's correlation of every weight with its own objective.

    It is not defined where the weight or the objective is constant. That counts as 0: the preference has no
    effect there, and a front that ignores it must not pass as one that follows it.
    """
    from scipy.stats import spearmanr

    found = []
    for weight, value in zip(preferences.double().T, values.double().T, strict=True):
        constant = bool((weight == weight[0]).all()) or bool((value == value[0]).all())
        found.append(0.0 if constant else float(spearmanr(weight.numpy(), value.numpy()).statistic))
    return tuple(found)


def rank_ceilings(preferences: Float[Tensor, "n m"]) -> tuple[float, ...]:
    """The highest `rank_correlations` of objectives that follow their weight but never twice alike.

    Points that share a weight are ordered by the other weights, which Spearman counts as disorder. On a grid
    of three dimensions in steps of 0.2 the ceiling is 0.98; on the vertices and edge middles of ten, 0.67.
    """
    total, found = len(preferences), []
    for weight in preferences.double().T:
        ties = weight.unique(return_counts=True)[1].double()
        lost = float((ties**3 - ties).sum()) / max(total**3 - total, 1)
        found.append(math.sqrt(max(1 - lost, 0.0)))
    return tuple(found)
