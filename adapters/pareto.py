"""Objectives over a grid of preference vectors: the points of a front.

    ξ_i(λ) = mean over held-out examples of dimension i of J_i under λ

| symbol | field                    | shape                            |
|--------|--------------------------|----------------------------------|
| λ      | ``Measured.preferences`` | [n, m]                           |
| J_i    | ``Measured.examples[i]`` | [n, examples of dimension i]     |
| ξ      | ``Measured.values``      | [n, m]                           |
| base   | ``Measured.base``        | [m], of the model without it     |

J is the log-likelihood of a reply in nats for SFT, DPO's J for pairs, and the reward of one sampled reply a
prompt otherwise; higher is better. Likelihoods are not sampled: a difference between two points is one of the
model, up to the choice of examples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.preference_data import Objective, Reward, encode_examples
from persona_sdk.adapters.preference_likelihood import objectives, with_reference
from persona_sdk.adapters.preference_rewards import check_rewards, encode_prompts, sampled_rewards
from persona_sdk.adapters.preferences import grid
from persona_sdk.adapters.random_state import same_random_state
from persona_sdk.adapters.svd_layers import Layers, svd_layers
from persona_sdk.adapters.twin import twin
from persona_sdk.models import LanguageModel

if TYPE_CHECKING:
    from persona_sdk.adapters.panacea import Panacea

# λ -> J of every example, a tensor a dimension; None is the base model
Objectives: TypeAlias = Callable[[Tensor | None], list[Tensor]]


@dataclass(frozen=True)
class Measured:
    """Objectives at every preference vector; see the module."""

    preferences: Float[Tensor, "n m"]
    examples: tuple[Tensor, ...]
    base: Float[Tensor, " m"]

    @property
    def values(self) -> Float[Tensor, "n m"]:
        """Means over examples."""
        return means(self.examples)


def evaluate(
    model: LanguageModel,
    adapter: "Panacea",
    held_out: Any,
    preferences: Float[Tensor, "n m"] | None = None,
    *,
    rewards: Mapping[str, Reward] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """Objectives of an adapter on held-out data. The model may be in use meanwhile.

    Args:
        model: the base model.
        adapter: what to evaluate.
        held_out: data as for training.
        preferences: where; None is `preferences.grid`.
        rewards: for an adapter that was trained on rewards.
        advance: called after every preference vector.

    Raises:
        IncompatibleAdapterError: the adapter is of another base.
        InvalidInputError: unusable data, or rewards that are missing.
    """
    adapter.check_base(model.fingerprint)
    config, own = adapter.config, twin(model)
    points = grid(len(config.dimensions)) if preferences is None else preferences
    with svd_layers(own, adapter.tensors, config.shape) as layers:
        own.module.eval()
        of = held_out_objectives(own, layers, config, held_out, rewards)
        return Measured(points, measure(of, points, advance=advance), means(of(None)))


def held_out_objectives(
    model: LanguageModel,
    layers: Layers,
    options: PanaceaConfig,
    data: Any,
    rewards: Mapping[str, Reward] | None = None,
) -> Objectives:
    """The objectives of held-out data as a function of λ; encodes the data and DPO's reference once."""
    longest = min(options.max_length, model.context_length)
    if options.objective == "reward":
        scored = check_rewards(rewards, options.dimensions)
        prompts = encode_prompts(model, data, longest - options.max_new_tokens)

        def sampled(preference: Tensor | None) -> list[Tensor]:
            with same_random_state():  # the same random numbers at every λ
                torch.manual_seed(options.seed)
                return sampled_rewards(model, layers, prompts, scored, preference, options)

        return sampled
    examples = encode_examples(model.tokenizer, data, options.dimensions, options.objective, longest)
    if options.objective == "dpo":
        examples = with_reference(model, layers, examples, options.per_device_eval_batch_size)
    return lambda preference: objectives(model, layers, examples, preference, options)


def measure(
    of: Objectives, preferences: Float[Tensor, "n m"], *, advance: Callable[[], None] = lambda: None
) -> tuple[Tensor, ...]:
    """The objectives of every example at every preference vector, ``[n, examples]`` for each dimension."""
    found = []
    for point in preferences:
        found.append(of(point))
        advance()
    return tuple(torch.stack(list(column)) for column in zip(*found, strict=True))


def means(examples: Sequence[Tensor]) -> Float[Tensor, "*n m"]:
    """Means over the examples of each dimension."""
    return torch.stack([values.mean(-1) for values in examples], dim=-1)


def reference_point(base: Float[Tensor, " m"], objective: Objective) -> Float[Tensor, " m"]:
    """Where hypervolumes are measured from, by a rule that looks at the base model alone.

    SFT and rewards: ``b - max(|b|, 1)``. DPO: -3 nats, which is J at the optimum of weight exp(-3) = 0.05.
    The base itself is no measure for DPO: where labels are opposed, nothing is above it in two dimensions.
    """
    return torch.full_like(base, -3.0) if objective == "dpo" else base - base.abs().clamp_min(1)
