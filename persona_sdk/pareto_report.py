"""Fronts of adapters over one grid, measured on one file: what `persona pareto` prints, writes and draws.

    z = `reference_point` of base          the reference point unless another is given

base_i is objective i of the base model on the same data. So z depends on no adapter, and hypervolumes of all
adapters on this data can be compared.

| symbol | field                    | shape  |
|--------|--------------------------|--------|
| λ      | ``front.preferences``    | [n, m] |
| ξ      | ``front.values``         | [n, m] |
| base   | ``FrontReport.base``     | [m]    |
| z      | ``scores.reference``     | [m]    |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.adapters.base import Adapter
from persona_sdk.adapters.fronts import Front, FrontScores, score
from persona_sdk.adapters.panacea import Panacea
from persona_sdk.adapters.pareto import evaluate, reference_point
from persona_sdk.adapters.preferences import grid
from persona_sdk.errors import IncompatibleAdapterError, InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.preference_files import PreferenceFile

MOST_POINTS = 2000  # each is a pass over the data
RULES = {"sft": "base - max(|base|, 1)", "dpo": "-3 nats"}  # `reference_point` in words
_PACKAGES = ("persona-sdk", "torch", "transformers", "moocore", "scipy")
_SHARED = ("dimensions", "objective", "beta", "max_length")  # what J means


@dataclass(frozen=True)
class FrontReport:
    """The front of one adapter.

    Args:
        name: what the adapter was called by.
        digest: of its tensors.
        front: preference vectors and objectives.
        base: objectives of the base model.
        scores: metrics of the front.
    """

    name: str
    digest: str
    front: Front
    base: tuple[float, ...]
    scores: FrontScores


def require_panacea(adapter: Adapter, name: str) -> Panacea:
    """`adapter`, if it follows preference vectors and its objectives can be measured.

    Raises:
        IncompatibleAdapterError: it is of another family.
        InvalidInputError: it was trained on rewards, which are functions and in no file.
    """
    if not isinstance(adapter, Panacea):
        raise IncompatibleAdapterError(
            f"{name!r} is of the family {adapter.family!r}, which has no preference vector.",
            hint="Only Panacea adapters have a front.",
        )
    if adapter.config.objective == "reward":
        raise InvalidInputError(
            f"{name!r} was trained on rewards, which are functions and not in a file.",
            hint="Score its replies with them, and pass the means to persona_sdk.adapters.fronts.score.",
        )
    return adapter


def require_comparable(adapters: Mapping[str, Panacea]) -> None:
    """Raise `InvalidInputError` unless an objective means the same for all of them."""
    (first, reference), *others = adapters.items()
    for name, adapter in others:
        for option in _SHARED:
            ours, theirs = getattr(reference.config, option), getattr(adapter.config, option)
            if ours != theirs and not (option == "beta" and reference.config.objective == "sft"):
                raise InvalidInputError(
                    f"{first!r} has {option}={ours!r} but {name!r} has {theirs!r}.",
                    hint="Fronts can be compared only if their objectives are the same.",
                )


def preference_grid(m: int, divisions: int | None = None, points: int | None = None) -> Float[Tensor, "n m"]:
    """`preferences.grid` of so many divisions, or the finest one of at most so many points.

    Raises:
        InvalidInputError: both are given, or a grid of no points or more than `MOST_POINTS`.
    """
    if divisions is not None and points is not None:
        raise InvalidInputError("Both divisions and points are given.", hint="Give one of them.")
    if points is not None:
        if not m <= points <= MOST_POINTS:
            raise InvalidInputError(
                f"No grid over {m} dimensions has at most {points} points that can be measured.",
                hint=f"Expected {m} to {MOST_POINTS} points.",
            )
        divisions = 1
        while grid_size(m, divisions + 1) <= points:
            divisions += 1
    if divisions is not None and grid_size(m, divisions) > MOST_POINTS:
        raise InvalidInputError(
            f"{divisions} divisions of {m} dimensions are {grid_size(m, divisions):,} points.",
            hint=f"Expected at most {MOST_POINTS:,}.",
        )
    return grid(m, divisions)


def grid_size(m: int, divisions: int) -> int:
    """Points of a grid: the ways to deal `divisions` shares to `m` dimensions."""
    return math.comb(max(divisions, 0) + m - 1, m - 1)


def measure(
    model: LanguageModel,
    adapters: Mapping[str, Panacea],
    data: Any,
    preferences: Float[Tensor, "n m"],
    reference: Sequence[float] | None = None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> list[FrontReport]:
    """The front of every adapter.

    Args:
        model: their base model.
        adapters: by name; see `require_comparable`.
        data: rows by dimension.
        preferences: the grid.
        reference: None for the `reference_point` of the base.
        advance: called after every point of every adapter.

    Raises:
        IncompatibleAdapterError: an adapter was made for another base model.
        InvalidInputError: unusable data, or a reference of another length.
    """
    for name, adapter in adapters.items():
        adapter.check_base(model.fingerprint, name=repr(name))
        nothing = Front(adapter.config.dimensions, preferences, torch.zeros_like(preferences))
        # before hours are spent: a reference that does not fit, or a package that is missing
        score(nothing, [0.0] * len(nothing.names) if reference is None else reference)
    reports = []
    for name, adapter in adapters.items():
        found = evaluate(model, adapter, data, preferences, advance=advance)
        front = Front(adapter.config.dimensions, found.preferences, found.values)
        base = found.base.double()
        z = reference_point(base, adapter.config.objective) if reference is None else reference
        reports.append(FrontReport(name, adapter.digest, front, tuple(base.tolist()), score(front, z)))
    return reports


def as_dict(
    reports: Sequence[FrontReport],
    model: LanguageModel,
    file: PreferenceFile,
    *,
    objective: str,
    rule: str,
) -> dict[str, Any]:
    """One object for JSON. Adapters after the first are in ``compared``, over the same λ and data.

    ``Front.from_dict`` reads its names, preferences and values.
    """
    first, *others = reports
    return {
        **_own(first),
        **first.front.as_dict(),
        "base": list(first.base),
        "reference": list(first.scores.reference),
        "reference_rule": rule,
        "compared": [{**_own(other), "values": other.front.values.tolist()} for other in others],
        "objective": objective,
        "model": {"name": model.name, "fingerprint": model.fingerprint, "precision": model.precision},
        "data": {"sha256": file.sha256, "rows": file.rows},
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _own(report: FrontReport) -> dict[str, Any]:
    return {"adapter": report.name, "digest": report.digest, "scores": report.scores.as_dict()}
