"""Numbers for the bars of `benchmarks.panacea`: paired intervals and distances to closed forms. Pure.

    ξ_i(λ)      mean over prompts of what dimension i gets under λ
    z_i         best_i - 3 nats, where hypervolumes are measured from
    HV(ξ; z)    hypervolume of all points of a method against z
    interval    2.5 and 97.5 % quantiles over 1,000 draws of held-out prompts, with replacement

*The reference point.* best_i is what the oracle, an expert of dimension i with the whole compute, gives at
vertex i (SFT), or 0, the supremum of J (DPO). It comes from no method under comparison, and is one point for
all methods, seeds and draws. It is a fixed place and no bound: an expert that is trained for longer can
overfit. At the known optima below, 3 nats are a weight of exp(-3) = 0.05, so that all inner points of the
grid are above z. Further away a front is measured by its ends: from the values of the base model, 15 to 33
nats down, even one model for all λ has over 0.9 of the oracle's hypervolume. For DPO the base is at -log 2 in
both dimensions, and where labels are opposed no policy is above that in both.

*The interval.* Prompts are split once, so position q is the same prompt in all runs. A draw of prompts is the
same for all methods, seeds and λ, and the hypervolume is taken anew for each; the means over seeds are
compared. The interval says what other prompts would change. It does not contain the variation between
training seeds, which is reported apart.

*Closed forms*, for two dimensions that disagree on everything: a reply of style i costs -log λ_i nats more
than under the model of style i (SFT); the margin of a pair is logit λ_1 (DPO, linear). Both fronts are
(log λ_1, log λ_2), whose eleven points have a hypervolume of 7.17 of 9 against z = (-3, -3).

| symbol | argument          | shape                                                          |
|--------|-------------------|----------------------------------------------------------------|
| ξ      | ``values``        | [points, prompts, m]; NaN where a dimension lacks the prompt   |
|        | ``counts``        | [draws, prompts]: how often each prompt was drawn              |
| λ      | ``preferences``   | [points, m]                                                    |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from persona_sdk.adapters import fronts

Array = np.ndarray[Any, np.dtype[np.float64]]

DRAWS = 1000
NATS = 3.0


@dataclass(frozen=True)
class Interval:
    """A value over all prompts, with the 95 % interval over draws of them."""

    value: float
    low: float
    high: float


def vertex_values(
    preferences: Float[Array, "points m"], values: Float[Array, "points prompts m"]
) -> Float[Array, " m"]:
    """What each dimension gets at its own vertex."""
    at = [int(np.flatnonzero(preferences[:, i] == 1)[0]) for i in range(preferences.shape[1])]
    return means(values)[at, range(len(at))]


def means(values: Float[Array, "points prompts m"]) -> Float[Array, "points m"]:
    """ξ: means over the prompts that a dimension has."""
    return drawn_means(values, np.ones((1, values.shape[1]), dtype=np.int64))[0]


def drawn_means(
    values: Float[Array, "points prompts m"], counts: Int[np.ndarray, "draws prompts"]
) -> Float[Array, "draws points m"]:
    """ξ under every draw of prompts."""
    labelled = ~np.isnan(values[0])
    total = np.einsum("dq,pqm->dpm", counts, np.nan_to_num(values))
    return total / (counts @ labelled)[:, None, :]


def draws(prompts: int, n: int = DRAWS, seed: int = 0) -> Int[np.ndarray, "draws prompts"]:
    """How often each prompt is drawn in each of `n` draws with replacement."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=n)


def hypervolume(points: Float[Array, "points m"], z: Float[Array, " m"]) -> float:
    """Of one set of points."""
    return fronts.hypervolume(torch.from_numpy(points), torch.from_numpy(z))


def hypervolumes(
    runs: Sequence[Float[Array, "points prompts m"]],
    z: Float[Array, " m"],
    counts: Int[np.ndarray, "draws prompts"],
) -> Float[Array, " draws"]:
    """The mean over runs (seeds) of one method, for every draw."""
    found = [[hypervolume(points, z) for points in drawn_means(values, counts)] for values in runs]
    return np.mean(found, axis=0)


def paired(
    first: Float[Array, " draws"], second: Float[Array, " draws"], how: Literal["difference", "ratio"]
) -> Interval:
    """One method less another, or over it: both for all prompts, in front, and for the same draws of them.

    A ratio to nothing is 0.
    """
    nothing = np.zeros_like(first)
    found = first - second if how == "difference" else np.divide(first, second, nothing, where=second > 0)
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return Interval(float(found[0]), float(low), float(high))


def with_all(prompts: int, n: int = DRAWS) -> Int[np.ndarray, "draws prompts"]:
    """Every prompt once, and `n` draws after it."""
    return np.concatenate([np.ones((1, prompts), dtype=np.int64), draws(prompts, n)])


def worst_rank_correlation(
    preferences: Float[Array, "points m"], runs: Sequence[Float[Array, "points prompts m"]]
) -> float:
    """The least Spearman correlation of λ_i with ξ_i, over dimensions and seeds."""
    weights = torch.from_numpy(preferences)
    return min(
        value
        for values in runs
        for value in fronts.rank_correlations(weights, torch.from_numpy(means(values)))
    )


def excess(
    preferences: Float[Array, "points m"], values: Float[Array, "points prompts m"]
) -> Float[Array, "points m"]:
    """Nats that each dimension lies below its vertex; -log λ_i for the mixture of disjoint styles."""
    return vertex_values(preferences, values) - means(values)


@dataclass(frozen=True, eq=False)
class MarginErrors:
    """Mean margin of one dimension against logit λ, at every weight but 0, 1/2 and 1.

    Args:
        weights: λ_1.
        margins: mean over the conflicting pairs.
        relative: ``|margin - logit| / |logit|``.
        slope: of margins over logits, through the origin, by least squares; 1 is calibrated.
    """

    weights: Float[Array, " points"]
    margins: Float[Array, " points"]
    relative: Float[Array, " points"]
    slope: float


def margin_errors(weights: Float[Array, " points"], margins: Float[Array, "points pairs"]) -> MarginErrors:
    """How far DPO's margins on conflicting pairs are from their closed form."""
    inner = (weights > 1e-6) & (weights < 1 - 1e-6) & (np.abs(weights - 0.5) > 1e-6)
    if not inner.any():
        raise ValueError(f"No weight of {weights.tolist()} has a logit to compare with.")
    weights, found = weights[inner], margins[inner].mean(axis=1)
    logits = np.log(weights) - np.log1p(-weights)
    slope = float(found @ logits / (logits @ logits))
    return MarginErrors(weights, found, np.abs(found - logits) / np.abs(logits), slope)
