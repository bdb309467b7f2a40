"""Plain LoRA: a low-rank update beside every chosen linear map of the frozen base.

    y = W x + (alpha / r) B A x

    paper    field               shape
    r        rank                integer
    alpha    alpha               number; None means 2 r, so the update is scaled by 2
    A        "<module>.A"        [rank, d_in]
    B        "<module>.B"        [d_out, rank], (alpha / r) folded in
    W        the base's weight   [d_out, d_in], never touched

B starts at zero, so training starts at the base model. Saved, the adapter is a PEFT LoRA folder that peft
and vLLM load; PEFT LoRA folders of other tools load here (`persona_sdk.adapters.peft_format`).

State (all optional): ``{"gate": [...]}``, one number per rank direction, times the attachment's weight.

Reference: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field

from persona_sdk.adapters import folders, lowrank, peft_format
from persona_sdk.adapters.base import Adapter, AdapterRequest, State, language_model
from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.evaluation import Evaluation
from persona_sdk.adapters.training import TrainingOptions, TrainingReport, train_low_rank
from persona_sdk.config import ConfigT
from persona_sdk.errors import IncompatibleAdapterError, InvalidInputError, UnsupportedAdapterError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import Contribution, LowRankPatch
from persona_sdk.tensors import TensorBundle, freeze, low_rank_bundle


class LoRAConfig(TrainingOptions):
    """What to adapt and how to train it; the training options are those of `TrainingOptions`."""

    rank: int = Field(8, ge=1, description="directions per module")
    alpha: float | None = Field(
        None, gt=0, description="the update is scaled by alpha / rank; None: 2 * rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of A, while training")
    target_modules: Literal["all"] | tuple[str, ...] = Field(
        "all", description="ends of module paths, such as 'q_proj' or 'attn.c_proj'; or every linear map"
    )
    base_model_name_or_path: str = Field("", description="filled in by train; written into PEFT folders")
    fan_in_fan_out: bool = Field(False, description="filled in by train; for PEFT: the base uses Conv1D")

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class LoRA(Adapter):
    """A plain LoRA adapter.

    Args:
        base: fingerprint of the base model.
        config: how it was made.
        tensors: low-rank bundle of rank ``config.rank``, scale folded into B.
        report: what training did; None unless this object was just trained.

    Raises:
        IncompatibleAdapterError: the tensors are no low-rank bundle of that rank, or hold NaN.
    """

    family: ClassVar[str] = "lora"
    config_type: ClassVar[type[LoRAConfig]] = LoRAConfig

    config: LoRAConfig
    report: TrainingReport | None = None

    def __post_init__(self) -> None:
        rank = lowrank.rank_of(self.tensors)
        if rank != self.config.rank:
            raise IncompatibleAdapterError(
                f"The tensors have rank {rank} and the configuration says {self.config.rank}.",
                hint="Pass the configuration that belongs to the tensors.",
            )
        folders.require_finite(self.tensors)

    @classmethod
    def train(
        cls,
        model: Any,
        data: Any,
        config: Any = None,
        *,
        progress: bool | None = None,
        checkpoints: Checkpoints | None = None,
        evaluation: Evaluation | None = None,
    ) -> Self:
        """Train on pairs, chats or raw texts (`persona_sdk.adapters.training_data`).

        Args:
            model: a `LanguageModel`, or anything with one as ``.base``; unchanged afterwards.
            data: the rows.
            config: a `LoRAConfig`, a mapping of its options, or None for the defaults.
            progress: show a bar on stderr; None shows it on a terminal.
            checkpoints: where to keep checkpoints, and to go on from.
            evaluation: how to score the weights; the adapter gets those of the best score.

        Raises:
            InvalidInputError: unusable data, options or target modules, or checkpoints of another run.
            AdapterError: training diverged; no adapter is made.
        """
        base, options = language_model(model), cls.configure(config)
        modules = select_modules(base, options.target_modules)
        tensors, report = train_low_rank(
            base,
            data,
            options,
            modules=modules,
            rank=options.rank,
            alpha=options.scale * options.rank,
            dropout=options.dropout,
            progress=progress,
            checkpoints=checkpoints,
            evaluation=evaluation,
        )
        return cls(
            base=base.fingerprint, config=bound(options, base, modules), tensors=tensors, report=report
        )

    @classmethod
    def random(cls, model: Any, config: Any = None, *, std: float = 0.02) -> Self:
        """An untrained adapter with normal factors; ``std=0`` changes nothing. For tests and baselines.

        Args:
            model: a `LanguageModel`, or anything with one as ``.base``.
            config: its rank, target modules and seed are used.
            std: standard deviation of every entry of A and B.
        """
        base, options = language_model(model), cls.configure(config)
        modules, shapes = select_modules(base, options.target_modules), base.linear_shapes()
        generator = torch.Generator().manual_seed(options.seed)
        factors = {
            module: (
                std * torch.randn(options.rank, shapes[module][0], generator=generator),
                std * torch.randn(shapes[module][1], options.rank, generator=generator),
            )
            for module in modules
        }
        config = bound(options, base, modules)
        return cls(base=base.fingerprint, config=config, tensors=low_rank_bundle(factors))

    @classmethod
    def from_tensors(cls, base: str, tensors: TensorBundle, config: Any = None) -> Self:
        """Rebuild from stored parts; without a `config` the rank is taken from the tensors."""
        options = cls.configure({"rank": lowrank.rank_of(tensors)} if config is None else config)
        # float32 of its own: folders hold float32, and the caller's tensors may change.
        own = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
        return cls(base=base, config=options, tensors=freeze(own))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a PEFT LoRA folder that `from_pretrained` reads back with the same digest.

        Raises:
            InvalidInputError: the folder holds something that is not an adapter.
            AdapterError: the disk refused; nothing was changed.
        """
        return self._write(
            folder, {folders.FAMILY: self.family, folders.CONFIG: self.config.model_dump_json()}
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base: Any = None) -> Self:
        """Read a PEFT LoRA folder, saved here or by peft.

        Args:
            folder: the adapter folder.
            base: the base model; needed for folders of other tools, which do not name theirs.

        Raises:
            NotFoundError: there is no such folder.
            UnsupportedAdapterError: a variant that is more than a plain LoRA.
            IncompatibleAdapterError: damaged, or made for another base model.
        """
        found = peft_format.read(folder, base=base)
        if found.header.get(folders.FAMILY, cls.family) != cls.family:
            raise IncompatibleAdapterError(
                f"{folder} holds an adapter of family {found.header[folders.FAMILY]!r}.",
                hint="Load it with persona_sdk.registry.family(name).from_pretrained.",
            )
        return cls(base=found.base, config=_config_of(found), tensors=found.tensors)

    def export_peft(self, folder: str | Path, *, preference: Any = None) -> Path:
        """Write a PEFT LoRA folder for other tools, without this SDK's training configuration.

        Raises:
            UnsupportedAdapterError: a `preference` is given; a plain LoRA has none.
        """
        if preference is not None:
            raise UnsupportedAdapterError(
                "A plain LoRA has no preference to export at.", hint="Call export_peft without preference."
            )
        return self._write(folder, {})

    def contribute(self, state: State, request: AdapterRequest) -> Contribution:
        """One low-rank patch, or nothing where the gate is zero.

        Raises:
            InvalidInputError: the state holds anything but a gate of the right length.
            CompositionError: the gate is not finite.
        """
        gate = tuple(request.weight * value for value in self._gate(state))
        if not any(gate):
            return Contribution()
        patch = LowRankPatch(factors=self.digest, rank=self.config.rank, gate=gate, origin=request.origin)
        return Contribution(parts=(patch,), tensors={self.digest: self.tensors})

    def _gate(self, state: State) -> tuple[float, ...]:
        rank, given = self.config.rank, state.get("gate", ())
        strangers = sorted(set(state) - {"gate"})
        numbers = isinstance(given, Sequence) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in given
        )
        if strangers or not numbers or ("gate" in state and len(given) != rank):
            raise InvalidInputError(
                f"The state {dict(state)!r:.80} does not fit a LoRA of rank {rank}.",
                hint='Expected {} or {"gate": [one number per rank direction]}.',
            )
        return tuple(map(float, given)) or (1.0,) * rank

    def _write(self, folder: str | Path, header: Mapping[str, str]) -> Path:
        targets = self.config.target_modules
        modules = lowrank.modules_of(self.tensors)
        return peft_format.write(
            folder,
            self.tensors,
            base=self.base,
            base_name=self.config.base_model_name_or_path,
            target_modules=peft_format.short_names(modules) if targets == "all" else targets,
            fan_in_fan_out=self.config.fan_in_fan_out,
            header=header,
        )


def select_modules(model: LanguageModel, targets: Literal["all"] | Sequence[str]) -> tuple[str, ...]:
    """Full paths of the linear maps whose path is, or ends with, one of `targets`.

    Raises:
        InvalidInputError: a target that selects nothing; names those there are.
    """
    available = model.linear_shapes()
    if targets == "all":
        return tuple(available)
    chosen = {t: [path for path in available if path == t or path.endswith(f".{t}")] for t in targets}
    nowhere = [target for target, paths in chosen.items() if not paths]
    if nowhere or not chosen:
        known = sorted({path.rpartition(".")[2] for path in available})
        raise InvalidInputError(
            f"target_modules {nowhere or list(targets)} select nothing in {model.name}.",
            hint=f"Expected 'all' or some of: {', '.join(known)}.",
        )
    wanted = {path for paths in chosen.values() for path in paths}
    return tuple(path for path in available if path in wanted)


def bound(options: ConfigT, base: LanguageModel, modules: Sequence[str]) -> ConfigT:
    """A configuration that exports to PEFT, with what its folder must say about the base."""
    facts = {
        "base_model_name_or_path": base.name,
        "fan_in_fan_out": peft_format.is_transposed(base, modules),
    }
    return options.model_copy(update=facts)


def _config_of(found: peft_format.PeftLora) -> LoRAConfig:
    text = found.header.get(folders.CONFIG)
    if text is not None:
        try:
            return LoRAConfig.model_validate_json(text)
        except ValueError as error:
            raise IncompatibleAdapterError(
                f"The adapter's own configuration is damaged: {error}.",
                hint="Copy the adapter again from where it came.",
            ) from error
    rank = lowrank.rank_of(found.tensors)
    return LoRAConfig(
        rank=rank,
        alpha=float(rank),
        target_modules=found.target_modules,
        base_model_name_or_path=found.base_name,
        fan_in_fan_out=found.fan_in_fan_out,
    )
