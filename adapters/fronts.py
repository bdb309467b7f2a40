"""Metrics of a Pareto front: what a preference vector gets of every objective, as numbers to compare methods by.

    HV         volume of ⋃ⱼ [z, ξʲ]                          up: better. Points that do not exceed z add nothing
    IP         (1/N) Σⱼ <λʲ, ξʲ>                             up: better
    Sparsity   1/(m (P-1)) Σᵢ Σⱼ (ξ̃ᵢʲ - ξ̃ᵢʲ⁺¹)²              down: denser;  ξ̃ᵢ is objective i of the P points, sorted
    Spacing    std of dⱼ = min over l≠j of ‖ξʲ - ξˡ‖₂        down: more even; std with 1/P
    Range i    maxⱼ ξᵢʲ - minⱼ ξᵢʲ                           up: wider
    ρᵢ         Spearman's rank correlation of λᵢ and ξᵢ      1: more weight always gives more of it
    ceiling i  √(1 - Σ (t³-t) / (N³-N))                      what ρᵢ can reach; t are the sizes of ties in λᵢ

    symbol  field        shape
    λ       preferences  [n, m]   rows on the simplex
    ξ       values       [n, m]   evaluation of every objective under that λ; higher is better
    z       reference    [m]      one fixed point for all methods and seeds
    N                    n;  P is the number of different non-dominated points

Sparsity and spacing are taken over the non-dominated points, each counted once. "The next point" is defined
for m = 2 only; above, every objective is sorted apart, as PGMORL does, which is the same number for m = 2.
Both depend on the units of the objectives, and both are best, 0, for a front that has collapsed to one
point: never read them without the hypervolume and the ranges.

A reference that is taken from a method's own minima makes hypervolumes that cannot be compared. Here it is
an argument without a default, and `FrontScores.outside` counts the points that do not exceed it.

References: Zitzler & Thiele 1999 (hypervolume, computed by moocore); Xu et al. 2020, PGMORL (sparsity);
Schott 1995 (spacing, there with city-block distances); Deng & Zhang 2019 (the estimate).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_sdk.errors import AdapterError, InvalidInputError

_REPEATS, _SAMPLES = 16, 16_384
_STUDENT_T = 2.131450  # 97.5 % quantile of Student's t with 15 degrees of freedom


@dataclass(frozen=True, eq=False)
class Front:
    """What one method reached for n preference vectors over m named dimensions.

    Args:
        names: the m dimensions, in the order of the columns.
        preferences: preference vectors, one a row.
        values: their evaluation, higher is better.

    Raises:
        InvalidInputError: shapes that do not fit, NaN or infinity, a row off the simplex, bad names.
    """

    names: tuple[str, ...]
    preferences: Float[Tensor, "n m"]
    values: Float[Tensor, "n m"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for field in ("preferences", "values"):  # copies, so that nobody changes a front that was scored
            tensor = getattr(self, field).detach().to("cpu", torch.float64, copy=True)
            object.__setattr__(self, field, _matrix(tensor, field))
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
    point = _reference(reference, values)
    inside = _inside(values, point)
    volume, interval = _volume(inside, point)
    return FrontScores(
        reference=tuple(point.tolist()),
        points=len(values),
        non_dominated=int(non_dominated(values).sum()),
        outside=len(values) - len(inside),
        hypervolume=volume,
        hypervolume_interval=interval,
        inner_product=inner_product(front.preferences, values),
        sparsity=sparsity(values),
        spacing=spacing(values),
        ranges=ranges(values),
        rank_correlations=rank_correlations(front.preferences, values),
        rank_ceilings=rank_ceilings(front.preferences),
    )


def hypervolume(values: Float[Tensor, "n m"], reference: Sequence[float] | Float[Tensor, " m"]) -> float:
    """The volume that `values` dominate above `reference`; 0 if no point exceeds it in every objective.

    Exact up to six objectives, and up to ten for at most 64 points that count; measured on two cores, 60
    points take 1 ms for m = 6, 50 ms for m = 8 and 3.5 s for m = 10, and 100 points for m = 10 take over a
    minute. Beyond that it is the middle of `hypervolume_estimate`.
    """
    values = _matrix(values, "values")
    point = _reference(reference, values)
    return _volume(_inside(values, point), point)[0]


def hypervolume_estimate(
    values: Float[Tensor, "n m"], reference: Sequence[float] | Float[Tensor, " m"], seed: int = 0
) -> tuple[float, float, float]:
    """Monte Carlo: the hypervolume and its 95 % interval ``(middle, low, high)``, in a fraction of a second.

    The mean of 16 independent runs of moocore's line sampling, and Student's interval over them. Fronts that
    are estimated with one seed share their directions, so differences between them are sharper than the
    intervals say.
    """
    values = _matrix(values, "values")
    point = _reference(reference, values)
    inside = _inside(values, point)
    if not len(inside):
        return 0.0, 0.0, 0.0
    seeds = range(seed * _REPEATS, (seed + 1) * _REPEATS)
    options: dict[str, Any] = {"maximise": True, "nsamples": _SAMPLES, "method": "DZ2019-MC"}
    runs = [_moocore().hv_approx(inside.numpy(), ref=point.numpy(), seed=run, **options) for run in seeds]
    middle = statistics.fmean(runs)
    half = _STUDENT_T * statistics.stdev(runs) / _REPEATS**0.5
    return middle, max(middle - half, 0.0), middle + half


def inner_product(preferences: Float[Tensor, "n m"], values: Float[Tensor, "n m"]) -> float:
    """Mean of <λ, ξ>: what a user gets, weighed as the user asked."""
    return float((preferences.double() * values.double()).sum(1).mean())


def sparsity(values: Float[Tensor, "n m"]) -> float:
    """Mean squared step between neighbours, every objective sorted apart (PGMORL); 0 for a single point."""
    points = _different(values)
    return float(points.sort(dim=0).values.diff(dim=0).square().mean()) if len(points) > 1 else 0.0


def spacing(values: Float[Tensor, "n m"]) -> float:
    """Standard deviation (1/P) of the Euclidean distances to the nearest point; 0 for a single point."""
    points = _different(values)
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
    of three dimensions in steps of 0.2 the ceiling is 0.98, on the vertices, edge middles and centre of ten 0.69.
    """
    total, found = len(preferences), []
    for weight in preferences.double().T:
        ties = weight.unique(return_counts=True)[1].double()
        lost = float((ties**3 - ties).sum()) / max(total**3 - total, 1)
        found.append(math.sqrt(max(1 - lost, 0.0)))
    return tuple(found)


def non_dominated(values: Float[Tensor, "n m"]) -> Bool[Tensor, " n"]:
    """Which points are not dominated: none is as good in every objective and better in one. Twins both stay."""
    array = _matrix(values, "values").numpy()
    return torch.from_numpy(_moocore().is_nondominated(array, maximise=True, keep_weakly=True))


def _different(values: Float[Tensor, "n m"]) -> Float[Tensor, "p m"]:
    """The non-dominated points, each once."""
    return values.double()[non_dominated(values)].unique(dim=0)


def _inside(values: Float[Tensor, "n m"], point: Float[Tensor, " m"]) -> Float[Tensor, "p m"]:
    return values[(values > point).all(1)]


def _volume(
    inside: Float[Tensor, "p m"], point: Float[Tensor, " m"]
) -> tuple[float, tuple[float, float] | None]:
    """The hypervolume of points above the reference, and the interval where it has to be estimated."""
    if not len(inside):
        return 0.0, None
    m = len(point)
    if m <= 6 or (m <= 10 and len(_different(inside)) <= 64):
        return float(_moocore().hypervolume(inside.numpy(), ref=point.numpy(), maximise=True)), None
    middle, low, high = hypervolume_estimate(inside, point)
    return middle, (low, high)


def _matrix(values: Tensor, what: str) -> Float[Tensor, "n m"]:
    """`values` in float64 on the CPU; raises `InvalidInputError` unless they are finite rows."""
    if values.dim() != 2 or not values.numel() or not bool(torch.isfinite(values).all()):
        raise InvalidInputError(
            f"The {what} have shape {tuple(values.shape)} or hold NaN or infinity.",
            hint="Expected finite numbers, one row for every point and one column for every objective.",
        )
    return values.detach().to("cpu", torch.float64)


def _reference(reference: Any, values: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    point = torch.as_tensor(reference, dtype=torch.float64, device="cpu")
    if point.shape != values.shape[1:] or not bool(torch.isfinite(point).all()):
        raise InvalidInputError(
            f"The reference point is {point.tolist()} and there are {values.shape[1]} objectives.",
            hint="Expected one finite number for every objective, the same for all methods.",
        )
    return point


def _moocore() -> Any:
    try:
        import moocore
    except ImportError as error:
        raise AdapterError(
            "The metrics of a front need the package moocore.", hint="pip install 'persona-sdk[pareto]'."
        ) from error
    return moocore
