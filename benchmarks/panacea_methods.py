"""Panacea and what it is compared with, trained by the same code on equal total compute.

| method            | what is trained                                   | what λ does afterwards           |
|-------------------|---------------------------------------------------|----------------------------------|
| panacea           | one SVD-LoRA under drawn λ, by `Part.ours`        | gates its preference directions  |
| as published      | the same with one λ a step for all objectives     | the same                         |
| scale at 0        | as published, with s frozen at 0                  | nothing: the control             |
| joint             | one SVD-LoRA at the centre of the simplex         | nothing                          |
| λ in the prompt   | the same, λ in a line of the prompt               | is written into the prompt       |
| one per vector    | one adapter for each of m + 1 vectors             | picks one                        |
| rewarded soups    | one expert for each dimension, at its vertex      | ΔW = Σ_i λ_i B_i A_i             |
| mixture           | nothing: the experts                              | p = Σ_i λ_i p_i                  |
| oracle            | experts with the whole compute each               | p = Σ_i λ_i p_i                  |

All are runs of Panacea's trainer, the baselines with ``fixed_preference``, so parametrisation, optimizer,
loss and data order are the same. All have rank k + m p in every matrix: where one vertex alone is trained,
the directions of the other dimensions could not take part and are given to the shared part.

*Compute* is optimizer steps times the examples that each runs: an item holds one example of every dimension,
and those of weight 0 are skipped, so a step as published costs m of them, or 1 where λ is a vertex. The steps
of a method with n runs are ``S · cost as published / (n · cost of its run)``. `Method.tokens` has the
tokens that were read, to check that; lines with λ in the prompt come on top.

The prompt's λ is drawn for each example of dimension i from p(λ | i) ∝ λ_i p(λ): a vertex as often as for
panacea, then always e_i, else Dirichlet(a + e_i). Equal weights of the dimensions are then an unbiased
estimate of the linear aggregation, E_λ Σ_i λ_i J_i.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.panacea_data import Example, Examples, Study
from persona_sdk.adapters import lowrank, svd_lora
from persona_sdk.adapters.objectives import log_likelihoods
from persona_sdk.adapters.panacea import Panacea
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.preferences import grid
from persona_sdk.adapters.training_data import encode_rows
from persona_sdk.adapters.twin import applied, twin
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle

Vector = tuple[float, ...]
Pair = tuple[str, str]  # prompt and reply


class Scorer:
    """Log-likelihoods of replies under a low-rank bundle; the model may be in use meanwhile.

    Args:
        model: the base.
        batch: rows run at once.
        tell: called after every batch.
    """

    def __init__(
        self, model: LanguageModel, *, batch: int = 16, tell: Callable[[], None] = lambda: None
    ) -> None:
        self._model, self._batch, self._tell = twin(model), batch, tell
        self._model.module.eval()

    def __call__(self, bundle: TensorBundle | None, pairs: Sequence[Pair]) -> Float[Tensor, " rows"]:
        """Nats of each reply with its end token; None is the base."""
        rows = encode_rows(self._model.tokenizer, pairs, self._model.context_length)
        with applied(self._model, bundle):
            return log_likelihoods(self._model, rows, self._batch, advance=self._tell)


class Policy(ABC):
    """A distribution over replies for every preference vector."""

    @abstractmethod
    def log_likelihood(
        self, preferences: Float[Tensor, "points m"], pairs: Sequence[Pair]
    ) -> Float[Tensor, "points rows"]:
        """Log π_λ(reply | prompt) of every pair at every preference vector."""


@dataclass(frozen=True, eq=False)
class Adapted(Policy):
    """The base with the low-rank bundle ``at(λ)``; a bundle that stays the same is run once."""

    score: Scorer
    at: Callable[[Vector], TensorBundle | None]

    def log_likelihood(
        self, preferences: Float[Tensor, "points m"], pairs: Sequence[Pair]
    ) -> Float[Tensor, "points rows"]:
        found: list[Tensor] = []
        last: TensorBundle | None = None
        for preference in preferences.tolist():
            bundle = self.at(tuple(preference))
            found.append(found[-1] if found and bundle is last else self.score(bundle, pairs))
            last = bundle
        return torch.stack(found)


@dataclass(frozen=True, eq=False)
class Prompted(Policy):
    """One adapter that reads λ in the prompt."""

    score: Scorer
    bundle: TensorBundle
    dimensions: tuple[str, ...]

    def log_likelihood(
        self, preferences: Float[Tensor, "points m"], pairs: Sequence[Pair]
    ) -> Float[Tensor, "points rows"]:
        rows = [
            [(with_line(prompt, self.dimensions, preference), reply) for prompt, reply in pairs]
            for preference in preferences.tolist()
        ]
        return torch.stack([self.score(self.bundle, each) for each in rows])


@dataclass(frozen=True, eq=False)
class Mixture(Policy):
    """p = Σ_i λ_i p_i of whole replies, p_i being ``parts`` at vertex i; the optimum of SFT for ideal p_i."""

    parts: Policy

    def log_likelihood(
        self, preferences: Float[Tensor, "points m"], pairs: Sequence[Pair]
    ) -> Float[Tensor, "points rows"]:
        vertices = self.parts.log_likelihood(torch.eye(preferences.shape[1]), pairs).double()
        return torch.logsumexp(preferences.double().log()[:, :, None] + vertices, dim=1).float()


@dataclass(frozen=True, eq=False)
class Method:
    """A trained method.

    Args:
        policy: what it became.
        preferences: the vectors it is evaluated at.
        runs: training runs.
        steps: optimizer steps of all runs.
        tokens: tokens read by all runs.
        seconds: training time of all runs.
    """

    policy: Policy
    preferences: Float[Tensor, "points m"]
    runs: int
    steps: int
    tokens: int
    seconds: float


@dataclass(eq=False)
class Fit:
    """What is needed to train a method, and the account of what it took.

    Args:
        model: the base.
        study: the data.
        options: as published; baselines change λ, steps and where the rank goes.
        score: evaluates policies.
        divisions: of the grid that methods are evaluated on.
        ours: options of panacea that differ from those.
    """

    model: LanguageModel
    study: Study
    options: PanaceaConfig
    score: Scorer
    divisions: int | None = None
    ours: Mapping[str, Any] = field(default_factory=dict)
    made: list[Panacea] = field(default_factory=list)

    def train(self, options: PanaceaConfig, data: Examples | None = None) -> Panacea:
        """One run."""
        examples: Any = self.study.train if data is None else data
        self.made.append(Panacea.train(self.model, examples, options, progress=False))
        return self.made[-1]

    def method(self, policy: Policy, preferences: Float[Tensor, "points m"] | None = None) -> Method:
        """The method with everything trained so far on its account."""
        reports = [adapter.report for adapter in self.made if adapter.report is not None]
        points = grid(len(self.options.dimensions), self.divisions) if preferences is None else preferences
        tokens, seconds = sum(each.tokens for each in reports), sum(each.seconds for each in reports)
        return Method(policy, points, len(reports), sum(each.steps for each in reports), tokens, seconds)

    def adapted(self, adapter: Panacea) -> Adapted:
        """The adapter, λ as its gate."""
        return Adapted(self.score, lambda preference: served(adapter, preference))


def panacea(fit: Fit) -> dict[str, Method]:
    """The method as this SDK recommends it, with as many steps as the published one's compute allows."""
    made = changed(fit.options, **fit.ours)
    steps = round(fit.options.max_steps * cost(fit.options) / cost(made))
    return {"panacea": fit.method(fit.adapted(fit.train(changed(made, max_steps=steps))))}


def published(fit: Fit) -> dict[str, Method]:
    """The method with one λ a step and all objectives run, as in the paper."""
    return {"as published": fit.method(fit.adapted(fit.train(fit.options)))}


def oracle(fit: Fit) -> dict[str, Method]:
    """The mixture of one expert for each dimension, each trained with the whole compute."""
    vertices = [tuple(vertex) for vertex in torch.eye(len(fit.options.dimensions)).tolist()]
    made = [served(fit.train(at_vector(fit.options, vertex, runs=1)), vertex) for vertex in vertices]
    return {"oracle": fit.method(Mixture(Adapted(fit.score, lambda preference: soup(made, preference))))}


def scale_at_0(fit: Fit) -> dict[str, Method]:
    """The control without any preference."""
    return {"scale at 0": fit.method(fit.adapted(fit.train(changed(fit.options, train_scale=False))))}


def joint(fit: Fit) -> dict[str, Method]:
    """One adapter for all dimensions alike."""
    centre = (1 / len(fit.options.dimensions),) * len(fit.options.dimensions)
    bundle = served(fit.train(at_vector(fit.options, centre, runs=1)), centre)
    return {"joint": fit.method(Adapted(fit.score, lambda _: bundle))}


def prompted(fit: Fit) -> dict[str, Method]:
    """One adapter for prompts that say λ."""
    centre = (1 / len(fit.options.dimensions),) * len(fit.options.dimensions)
    options = at_vector(fit.options, centre, runs=1)
    copies = math.ceil(items_read(options) / max(map(len, fit.study.train.values())))
    lines = with_lines(fit.study.train, fit.options, copies)
    bundle = served(fit.train(options, lines), centre)
    return {"λ in the prompt": fit.method(Prompted(fit.score, bundle, fit.options.dimensions))}


def one_per_vector(fit: Fit) -> dict[str, Method]:
    """An adapter for each vertex and one for the centre; it has no other preferences."""
    m = len(fit.options.dimensions)
    vectors = [*map(tuple, torch.eye(m).tolist()), (1 / m,) * m]
    made = {
        vector: served(fit.train(at_vector(fit.options, vector, runs=len(vectors))), vector)
        for vector in vectors
    }
    places = torch.tensor(vectors)

    def at(preference: Vector) -> TensorBundle:
        nearest = (places - torch.tensor(preference)).norm(dim=1).argmin()
        return made[vectors[int(nearest)]]

    return {"one per vector": fit.method(Adapted(fit.score, at), places)}


def experts(fit: Fit) -> dict[str, Method]:
    """Rewarded soups of one expert for each dimension, and their mixture."""
    vertices = [tuple(vertex) for vertex in torch.eye(len(fit.options.dimensions)).tolist()]
    made = [
        served(fit.train(at_vector(fit.options, vertex, runs=len(vertices))), vertex) for vertex in vertices
    ]
    policy = Adapted(fit.score, lambda preference: soup(made, preference))
    return {"rewarded soups": fit.method(policy), "mixture of the experts": fit.method(Mixture(policy))}


_KINDS = (panacea, published, experts, oracle, one_per_vector, joint, prompted, scale_at_0)
KINDS: Mapping[str, Callable[[Fit], dict[str, Method]]] = MappingProxyType(
    {each.__name__: each for each in _KINDS}
)


def served(adapter: Panacea, preference: Vector) -> TensorBundle:
    """The low-rank bundle of a preference."""
    gate = svd_lora.gate(preference, adapter.config.shape)
    return lowrank.concatenate([(adapter.factors, gate)])


def soup(bundles: Sequence[TensorBundle], preference: Vector) -> TensorBundle:
    """Σ_i λ_i ΔW_i, exactly: the factors stand side by side and are never averaged apart."""
    gates = [[weight] * lowrank.rank_of(bundle) for bundle, weight in zip(bundles, preference, strict=True)]
    used = [(bundle, gate) for bundle, gate in zip(bundles, gates, strict=True) if gate[0]]
    return lowrank.concatenate(used)


def changed(options: PanaceaConfig, **fields: Any) -> PanaceaConfig:
    """Options with other fields, checked."""
    return PanaceaConfig(**{**options.model_dump(), **fields})


def at_vector(options: PanaceaConfig, vector: Vector, *, runs: int) -> PanaceaConfig:
    """Options of one of `runs` runs at a fixed preference, with panacea's rank and share of its compute."""
    unused = sum(weight == 0 for weight in vector) * options.preference_rank
    rank = options.rank + unused
    steps = options.max_steps * cost(options) / (runs * cost(options, vector))
    return changed(
        options,
        fixed_preference=vector,
        rank=rank,
        alpha=options.multiplier * rank,
        max_steps=max(round(steps), 1),
    )


def cost(options: PanaceaConfig, vector: Vector | None = None) -> float:
    """Expected examples that one item runs, at a vector or at drawn ones."""
    if options.sampled_objective:
        return 1.0
    if vector is not None:
        return float(sum(weight > 0 for weight in vector))
    vertex = options.vertex_probability
    return vertex + (1 - vertex) * len(options.dimensions)


def items_read(options: PanaceaConfig) -> int:
    """Items that all steps of a run take."""
    return options.max_steps * options.per_device_train_batch_size * options.gradient_accumulation_steps


def with_line(prompt: str, dimensions: Sequence[str], preference: Sequence[float]) -> str:
    """The prompt behind a line that says λ."""
    said = " ".join(f"{name}={weight:.2f}" for name, weight in zip(dimensions, preference, strict=True))
    return f"{said}\n{prompt}"


def with_lines(examples: Examples, options: PanaceaConfig, copies: int) -> dict[str, list[Example]]:
    """`copies` of every example of dimension i, each behind a λ of its own from p(λ | i); see the module."""
    draw, m = np.random.default_rng(options.seed), len(options.dimensions)
    found: dict[str, list[Example]] = {}
    for place, name in enumerate(options.dimensions):
        vertex = np.eye(m)[place]
        found[name] = []
        for example in [*examples[name]] * copies:
            ends = draw.random() < options.vertex_probability
            preference = vertex if ends else draw.dirichlet(options.concentration + vertex)
            line = with_line(example["prompt"], options.dimensions, preference.tolist())
            found[name].append({**example, "prompt": line})
    return found
