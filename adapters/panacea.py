"""Panacea: one adapter that serves every preference vector over named dimensions.

    W(λ) = W0 + c · U diag([σ, s∘λ]) Vᵀ                          `persona_sdk.adapters.svd_lora`

| paper | field                   | shape                                                       |
|-------|-------------------------|-------------------------------------------------------------|
| m     | ``dimensions``          | names, in order                                             |
| k     | ``rank``                | integer                                                     |
| p     | ``preference_rank``     | integer; 1 in the paper                                     |
| c     | ``multiplier``          | ``alpha / rank``                                            |
| s     | ``scale_per_dimension`` | one a matrix, as in the paper, or one a dimension           |
| λ     | state["preference"]     | weights by name; request state, in no tensor and no file    |

λ is the gate of the plan part, so one copy of the weights serves a batch with a λ of its own in every row,
and λ may change in the middle of a reply. ``weight=0`` is the base model; λ = 0 would not be, as σ stays on.

Source: Zhong et al. 2024, Panacea: Pareto Alignment via Preference Adaptation for LLMs, arXiv 2402.02030.
The width-free initialisation, p > 1, a scale per dimension and the sampled objective are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, final

import torch

from persona_sdk.adapters import folders, lowrank, peft_format, svd_lora
from persona_sdk.adapters.base import Adapter, AdapterRequest, State, language_model
from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.lora import bound, select_modules
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.preference_data import Reward
from persona_sdk.adapters.preference_training import train
from persona_sdk.adapters.preferences import complete
from persona_sdk.adapters.training import TrainingReport
from persona_sdk.errors import InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import Contribution, LowRankPatch
from persona_sdk.tensors import LazyBundle, TensorBundle, digest, freeze, present

PREFERENCE = "preference"


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Panacea(Adapter):
    """An adapter that follows a preference vector.

    Args:
        base: fingerprint of the base model.
        config: how it was made.
        tensors: U, V, sigma and s of every module, float32.
        report: what training did; None unless this object was just trained.

    Raises:
        IncompatibleAdapterError: tensors of another shape, or NaN in them.
    """

    family: ClassVar[str] = "panacea"
    config_type: ClassVar[type[PanaceaConfig]] = PanaceaConfig

    config: PanaceaConfig
    report: TrainingReport | None = None

    def __post_init__(self) -> None:
        svd_lora.check(self.tensors, self.config.shape)
        folders.require_finite(self.tensors)

    @classmethod
    def train(
        cls,
        model: Any,
        data: Any,
        config: Any = None,
        *,
        rewards: Mapping[str, Reward] | None = None,
        held_out: Any = None,
        checkpoints: Checkpoints | None = None,
        progress: bool | None = None,
        callbacks: Sequence[Any] = (),
    ) -> Self:
        """Train on data of every dimension (`persona_sdk.adapters.preference_data`).

        Args:
            model: a `LanguageModel`, or anything with one as ``.base``; unchanged afterwards.
            data: rows by dimension; for ``objective="reward"`` a list of prompts.
            config: a `PanaceaConfig` or a mapping of its options.
            rewards: by dimension, for ``objective="reward"``: ``(prompt, reply) -> number``.
            held_out: data of the same form; training stops early on its hypervolume.
            checkpoints: where to keep the state of the run; it goes on from there. Rewards and held-out data
                are not part of what tells one run from another: use a new folder when they change.
            progress: show a bar on stderr; None shows it on a terminal.
            callbacks: further ``transformers.TrainerCallback`` objects, such as those for TensorBoard.

        Raises:
            InvalidInputError: unusable data, options or target modules.
            AdapterError: training diverged; no adapter is made.
        """
        base, options = language_model(model), cls.configure(config)
        tensors, report = train(
            base,
            data,
            options,
            start=initial_tensors(base, options)[0],
            rewards=rewards,
            held_out=held_out,
            checkpoints=checkpoints,
            progress=progress,
            callbacks=callbacks,
        )
        return cls(base=base.fingerprint, config=_bound(options, base), tensors=tensors, report=report)

    @classmethod
    def random(cls, model: Any, config: Any, *, std: float = 0.02) -> Self:
        """An untrained adapter with normal σ and s; ``std=0`` changes nothing. For tests and baselines."""
        base, options = language_model(model), cls.configure(config)
        tensors, generator = initial_tensors(base, options)
        noise = {
            name: std * torch.randn(tensor.shape, generator=generator)
            for name, tensor in sorted(tensors.items())
            if name.endswith((".sigma", ".s"))
        }
        return cls(base=base.fingerprint, config=_bound(options, base), tensors=freeze({**tensors, **noise}))

    @property
    def factors(self) -> TensorBundle:
        """The low-rank bundle that is served, made anew: everything but λ is folded into it."""
        return svd_lora.fold(present(self.tensors), self.config.shape)

    @cached_property
    def factors_digest(self) -> str:
        """Content hash of `factors`. They are not kept themselves: who serves them has a copy."""
        return digest(self.factors)

    def preference(self, state: State) -> tuple[float, ...]:
        """λ of a state; without one, the centre of the simplex.

        Raises:
            InvalidInputError: an unknown key or name, or a weight that cannot be used.
        """
        strangers = sorted(map(str, set(state) - {PREFERENCE}))
        given = state.get(PREFERENCE, {})
        if strangers or not isinstance(given, Mapping):
            raise InvalidInputError(
                f"The state {dict(state)!r:.80} does not fit a Panacea adapter.",
                hint=f'Expected {{"{PREFERENCE}": {{name: weight}}}} with '
                f"{', '.join(self.config.dimensions)}.",
            )
        return complete(self.config.dimensions, given)

    def controls(self, state: State) -> dict[str, float]:
        """The preference by name; see `Steerable`."""
        return dict(zip(self.config.dimensions, self.preference(state), strict=True))

    def steered(self, state: State, controls: Mapping[str, float]) -> State:
        """The state after some weights were named; the others share what is left of 1."""
        after = complete(self.config.dimensions, controls, self.preference(state))
        return {**state, PREFERENCE: dict(zip(self.config.dimensions, after, strict=True))}

    def contribute(self, state: State, request: AdapterRequest) -> Contribution:
        """One low-rank patch whose gate is λ, or nothing where the strength is zero."""
        preference = self.preference(state)
        if request.weight == 0:
            return Contribution()
        shape = self.config.shape
        gate = svd_lora.gate(preference, shape, request.weight)
        patch = LowRankPatch(factors=self.factors_digest, rank=shape.total, gate=gate, origin=request.origin)
        served = LazyBundle(cache(lambda: self.factors))
        return Contribution(parts=(patch,), tensors={self.factors_digest: served})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a folder of one safetensors file and a card; λ is in neither.

        Raises:
            InvalidInputError: the folder holds something that is not an adapter.
            AdapterError: the disk refused; nothing was changed.
        """
        return folders.write_adapter(
            folder, self.tensors, family=self.family, base=self.base, config=self.config, card=self._card()
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base: Any = None) -> Self:
        """Read a folder that `save_pretrained` wrote.

        Raises:
            NotFoundError: there is no such folder.
            IncompatibleAdapterError: damaged, of another family, or made for another base model.
        """
        tensors, fingerprint, config = folders.read_adapter(folder, cls.family, cls.config_type)
        adapter = cls(base=fingerprint, config=config, tensors=tensors)
        if base is not None:
            adapter.check_base(language_model(base).fingerprint, name=Path(folder).name)
        return adapter

    def export_peft(self, folder: str | Path, *, preference: Mapping[str, float] | None = None) -> Path:
        """Write the adapter at one preference as a PEFT LoRA folder; None is the centre.

        Raises:
            InvalidInputError: a preference that cannot be used.
        """
        state = {} if preference is None else {PREFERENCE: preference}
        gate = svd_lora.gate(self.preference(state), self.config.shape)
        merged = lowrank.concatenate([(self.factors, gate)])
        return peft_format.write(
            folder,
            merged,
            base=self.base,
            base_name=self.config.base_model_name_or_path,
            target_modules=peft_format.short_names(lowrank.modules_of(merged)),
            fan_in_fan_out=self.config.fan_in_fan_out,
        )

    def _card(self) -> str:
        config, name = self.config, self.config.base_model_name_or_path or "unknown"
        rows = {
            "dimensions": ", ".join(config.dimensions),
            "base model": f"`{name}`, fingerprint `{self.base}`",
            "rank": f"{config.rank} shared, {config.preference_rank} a dimension",
            "trained with": f"{config.objective}, {config.aggregation}",
            "sha256 of the tensors": f"`{self.digest}`",
        }
        table = "".join(f"| {what} | {value} |\n" for what, value in rows.items())
        head = f"---\nlibrary_name: persona-sdk\nbase_model: {name}\n---\n# Panacea adapter\n\n"
        return f"{head}| | |\n|---|---|\n{table}"


def initial_tensors(base: LanguageModel, options: PanaceaConfig) -> tuple[TensorBundle, torch.Generator]:
    """U, V, σ and s before training, and the generator that drew them."""
    generator, shapes = torch.Generator().manual_seed(options.seed), base.linear_shapes()
    tensors: dict[str, torch.Tensor] = {}
    for module in select_modules(base, options.target_modules):
        sides = svd_lora.initial(*shapes[module], options.shape, generator, options.init)
        tensors |= {f"{module}.{side}": value for side, value in zip(svd_lora.SIDES, sides, strict=True)}
    return freeze(tensors), generator


def _bound(options: PanaceaConfig, base: LanguageModel) -> PanaceaConfig:
    return bound(options, base, select_modules(base, options.target_modules))
