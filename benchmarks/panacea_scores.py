"""From a policy to numbers: what it gives every held-out prompt in every dimension.

    SFT   ξ = log π_λ(y|x)                                        nats a reply
    DPO   margin = β [(log π_λ(y_w) - log ref(y_w)) - (log π_λ(y_l) - log ref(y_l))]
          ξ = log sigmoid(margin)

| symbol | field             | shape                                                          |
|--------|-------------------|----------------------------------------------------------------|
| λ      | ``preferences``   | [points, m]                                                    |
| ξ      | ``values``        | [points, prompts, m]; NaN where a dimension lacks the prompt   |
| margin | ``margins``       | the same; None for SFT                                         |

The reference of DPO is the base on the plain prompt for all methods, also for the one with λ in the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.panacea_data import Study, prompts
from benchmarks.panacea_methods import Adapted, Pair, Policy, Scorer

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Scores:
    """What one method gives; see the module."""

    preferences: Float[Array, "points m"]
    values: Float[Array, "points prompts m"]
    margins: Float[Array, "points prompts m"] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain lists for JSON, NaN as None."""
        found = {"preferences": self.preferences, "values": self.values, "margins": self.margins}
        return {name: None if array is None else _plain(array) for name, array in found.items()}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuild what `as_dict` gave."""
        preferences, values, margins = (data[key] for key in ("preferences", "values", "margins"))
        return cls(
            np.array(preferences, dtype=float),
            np.array(values, dtype=float),  # None becomes NaN
            None if margins is None else np.array(margins, dtype=float),
        )


def evaluate(policy: Policy, preferences: Float[Tensor, "points m"], study: Study, base: "Base") -> Scores:
    """Scores of a policy on the held-out examples of a study."""
    found = policy.log_likelihood(preferences, base.pairs).double()
    points = preferences.double().numpy()
    if study.objective == "sft":
        return Scores(points, _by_prompt(study, found.numpy()))
    gain = found - base.found.double()
    margins = (base.beta * (gain[:, ::2] - gain[:, 1::2])).numpy()  # chosen and rejected take turns
    spread = _by_prompt(study, margins)
    return Scores(points, -np.logaddexp(0.0, -spread), spread)


class Base:
    """The base model on the held-out replies of a study: the reference of DPO, and of the hypervolume.

    Args:
        study: the data.
        score: evaluates policies.
        beta: of DPO.
    """

    def __init__(self, study: Study, score: Scorer, beta: float) -> None:
        self.pairs, self.beta = replies(study), beta
        policy = Adapted(score, lambda _: None)
        centre = torch.full((1, len(study.dimensions)), 1 / len(study.dimensions))
        self.found = policy.log_likelihood(centre, self.pairs)[0]
        self.scores = evaluate(policy, centre, study, self)


def replies(study: Study) -> list[Pair]:
    """Prompt and reply of every held-out example, dimension after dimension; chosen before rejected."""
    sides: Sequence[str] = ("completion",) if study.objective == "sft" else ("chosen", "rejected")
    return [
        (example["prompt"], example[side])
        for name in study.dimensions
        for example in study.held_out[name]
        for side in sides
    ]


def _by_prompt(study: Study, found: Float[Array, "points examples"]) -> Float[Array, "points prompts m"]:
    """Values of all examples, dimension after dimension, spread over the prompts."""
    order = {prompt: place for place, prompt in enumerate(prompts(study.held_out))}
    spread = np.full((len(found), len(order), len(study.dimensions)), np.nan)
    columns = iter(found.T)
    for i, name in enumerate(study.dimensions):
        for example in study.held_out[name]:
            place = order[example["prompt"]]
            if not np.isnan(spread[0, place, i]):
                raise ValueError(f"{name} has two examples of the prompt {example['prompt']!r:.60}.")
            spread[:, place, i] = next(columns)
    return spread


def _plain(array: Array) -> Any:
    return np.where(np.isnan(array), None, np.round(array, 6).astype(object)).tolist()
