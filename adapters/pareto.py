"""Objectives of an adapter over a grid of preference vectors: the points of its front.

    ξ_i(λ) = mean over held-out examples of dimension i of J_i under λ

| symbol | field                    | shape                            |
|--------|--------------------------|----------------------------------|
| λ      | ``Measured.preferences`` | [n, m]                           |
| J_i    | ``Measured.examples[i]`` | [n, examples of dimension i]     |
| ξ      | ``Measured.values``      | [n, m]                           |
| base   | ``Measured.base``        | [m], of the model without it     |

J is the log-likelihood of a reply in nats for SFT and DPO's J for pairs; higher is better. Nothing is
sampled, so a difference between two points is one of the model, up to the choice of examples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.adapters.panacea import Panacea
from persona_sdk.adapters.preference_data import Example, encode_examples
from persona_sdk.adapters.preference_training import log_likelihoods, objective_of, with_reference
from persona_sdk.adapters.preferences import grid
from persona_sdk.adapters.svd_lora import Layers, svd_layers
from persona_sdk.adapters.twin import twin
from persona_sdk.models import LanguageModel


@dataclass(frozen=True)
class Measured:
    """Objectives at every preference vector; see the module."""

    preferences: Float[Tensor, "n m"]
    examples: tuple[Tensor, ...]
    base: Float[Tensor, " m"]

    @property
    def values(self) -> Float[Tensor, "n m"]:
        """Means over examples."""
        return torch.stack([values.mean(1) for values in self.examples], dim=1)


def evaluate(
    model: LanguageModel,
    adapter: Panacea,
    held_out: object,
    preferences: Float[Tensor, "n m"] | None = None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """Objectives of an adapter on held-out data. The model may be in use meanwhile.

    Args:
        model: the base model.
        adapter: an adapter of SFT or DPO.
        held_out: data as for training.
        preferences: where; None is `preferences.grid`.
        advance: called after every preference vector.

    Raises:
        IncompatibleAdapterError: the adapter is of another base.
        InvalidInputError: unusable data.
    """
    adapter.check_base(model.fingerprint)
    config, own = adapter.config, twin(model)
    longest = min(config.max_length, model.context_length)
    examples = encode_examples(own.tokenizer, held_out, config.dimensions, config.objective, longest)
    points = grid(len(config.dimensions)) if preferences is None else preferences
    with svd_layers(own, adapter.tensors, config.shape) as layers:
        own.module.eval()
        if config.objective == "dpo":
            examples = with_reference(own, layers, examples)
        base = objectives(own, layers, examples, None, config.beta)
        found = []
        for point in points:
            found.append(objectives(own, layers, examples, point, config.beta))
            advance()
    columns = tuple(torch.stack([values[i] for values in found]) for i in range(len(config.dimensions)))
    return Measured(points, columns, torch.stack([values.mean() for values in base]))


def objectives(
    model: LanguageModel,
    layers: Layers,
    examples: Mapping[str, Sequence[Example]],
    preference: Float[Tensor, " m"] | None,
    beta: float,
) -> list[Tensor]:
    """J of every example under λ, a tensor a dimension; None is the base model."""
    sides = len(next(iter(examples.values()))[0].rows)
    rows = [row for found in examples.values() for each in found for row in each.rows]
    known = [value for found in examples.values() for each in found for value in each.reference]
    reference = known or [0.0] * len(rows)  # SFT has none
    values = objective_of(
        log_likelihoods(model, layers, rows, preference), torch.tensor(reference), sides, beta
    )
    return list(torch.split(values, [len(found) for found in examples.values()]))
