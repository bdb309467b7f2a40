"""Dominance between points, higher being better in every objective, and the volume that points dominate.

    ξ dominates ζ    ξᵢ ≥ ζᵢ for every i, and ξᵢ > ζᵢ for one
    hypervolume      volume of ⋃ⱼ [z, ξʲ], the part of space above the reference z that a point reaches

    symbol  argument   shape
    ξ       values     [n, m]
    z       reference  [m]

Computed by moocore, of the extra ``pareto``. A point that does not exceed z in every objective adds nothing.

References: Zitzler & Thiele 1999; Guerreiro et al. 2021 (algorithms); Deng & Zhang 2019 (the estimate).
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_sdk.errors import AdapterError, InvalidInputError

_REPEATS, _SAMPLES = 16, 16_384
_STUDENT_T = 2.131450  # 97.5 % quantile of Student's t with 15 degrees of freedom


def hypervolume(values: Float[Tensor, "n m"], reference: Sequence[float] | Float[Tensor, " m"]) -> float:
    """The volume that `values` dominate above `reference`; see `measure_hypervolume`."""
    return measure_hypervolume(values, reference)[0]


def measure_hypervolume(
    values: Float[Tensor, "n m"], reference: Sequence[float] | Float[Tensor, " m"]
) -> tuple[float, tuple[float, float] | None]:
    """The hypervolume, and None if it is exact or the 95 % interval if it had to be estimated.

    Exact up to six objectives, and up to ten for at most 64 points: 60 points take 1 ms of one core for
    m = 6, 50 ms for m = 8 and 3.5 s for m = 10, but 100 points for m = 10 take more than a minute.

    Raises:
        InvalidInputError: NaN or infinity, or a reference of another length.
        AdapterError: moocore is not installed.
    """
    values = finite_matrix(values, "values")
    point = checked_reference(reference, values)
    inside = values[(values > point).all(1)]
    if not len(inside):
        return 0.0, None
    inside, m = non_dominated_points(inside), len(point)
    if m <= 6 or (m <= 10 and len(inside) <= 64):
        return float(_moocore().hypervolume(inside.numpy(), ref=point.numpy(), maximise=True)), None
    middle, low, high = hypervolume_estimate(inside, point)
    return middle, (low, high)


def hypervolume_estimate(
    values: Float[Tensor, "n m"], reference: Sequence[float] | Float[Tensor, " m"], seed: int = 0
) -> tuple[float, float, float]:
    """Monte Carlo: the hypervolume and its 95 % interval ``(middle, low, high)``, in a fraction of a second.

    The mean of 16 independent runs of moocore's line sampling, and Student's interval over them. Fronts that
    are estimated with one seed share their directions, so differences between them are sharper than the
    intervals say.
    """
    values = finite_matrix(values, "values")
    point = checked_reference(reference, values)
    inside = values[(values > point).all(1)]
    if not len(inside):
        return 0.0, 0.0, 0.0
    seeds = range(seed * _REPEATS, (seed + 1) * _REPEATS)
    options: dict[str, Any] = {"maximise": True, "nsamples": _SAMPLES, "method": "DZ2019-MC"}
    runs = [_moocore().hv_approx(inside.numpy(), ref=point.numpy(), seed=run, **options) for run in seeds]
    middle = statistics.fmean(runs)
    half = _STUDENT_T * statistics.stdev(runs) / _REPEATS**0.5
    return middle, max(middle - half, 0.0), middle + half


def non_dominated(values: Float[Tensor, "n m"]) -> Bool[Tensor, " n"]:
    """Which points no other point dominates; equal points do not dominate each other."""
    array = finite_matrix(values, "values").numpy()
    return torch.from_numpy(_moocore().is_nondominated(array, maximise=True, keep_weakly=True))


def non_dominated_points(values: Float[Tensor, "n m"]) -> Float[Tensor, "p m"]:
    """The non-dominated points, each once, sorted by the first objective."""
    points: Tensor = torch.unique(values.double()[non_dominated(values)], dim=0)
    return points


def finite_matrix(values: Tensor, what: str) -> Float[Tensor, "n m"]:
    """`values` in float64 on the CPU; raises `InvalidInputError` unless they are finite rows."""
    if values.dim() != 2 or not values.numel() or not bool(torch.isfinite(values).all()):
        raise InvalidInputError(
            f"The {what} have shape {tuple(values.shape)} or hold NaN or infinity.",
            hint="Expected finite numbers, one row for every point and one column for every objective.",
        )
    return values.detach().to("cpu", torch.float64)


def checked_reference(reference: Any, values: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """`reference` in float64; raises `InvalidInputError` unless it is one finite number an objective."""
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
