"""The contract of an adapter family: four verbs, one class.

    train(model, data, config)        -> an adapter, bound to the base it was trained on
    save_pretrained / from_pretrained -> a folder of safetensors and JSON
    contribute(state, request)        -> plan parts and the tensors they name
    adapt(state, feedback)            -> an update, for families that learn online (`LearnsOnline`)

An adapter is immutable: its configuration, its tensors and the fingerprint of its base. What differs from
persona to persona (a preference vector, a chosen control, a strength) is *state*: small, JSON-able, kept by
the store and passed in. So one adapter in memory serves every persona that uses it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

from persona_sdk.config import FrozenConfig
from persona_sdk.errors import IncompatibleAdapterError, InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import Contribution
from persona_sdk.tensors import Digest, TensorBundle, digest, freeze

State: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """What a family may look at when it contributes to one request.

    Args:
        origin: label written into the plan part, e.g. ``"nurses/tone"``.
        weight: strength of the attachment; 1.0 is as trained.
        text: the user's latest message, for families that depend on the input.
    """

    origin: str
    weight: float = 1.0
    text: str = ""


def language_model(model: Any) -> LanguageModel:
    """`model` itself, or the `LanguageModel` it keeps as ``.base``.

    Raises:
        InvalidInputError: neither.
    """
    found = model if isinstance(model, LanguageModel) else getattr(model, "base", None)
    if not isinstance(found, LanguageModel):
        raise InvalidInputError(
            f"A {type(model).__name__} is no base model.",
            hint="Pass a LanguageModel, or a PersonaModel, which has one as .base.",
        )
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter(ABC):
    """Base of every adapter. Subclasses are final: one family, one class, one file.

    Args:
        base: fingerprint of the base model.
        config: the family's frozen configuration.
        tensors: the weights, as a read-only bundle.
    """

    family: ClassVar[str]
    config_type: ClassVar[type[FrozenConfig]]

    base: str
    config: FrozenConfig
    tensors: TensorBundle

    @classmethod
    @abstractmethod
    def train(cls, model: Any, data: Any, config: Any = None) -> Self:
        """Train on a base model (a `LanguageModel`, or anything with one as ``.base``)."""

    @classmethod
    def from_tensors(cls, base: str, tensors: TensorBundle, config: Any = None) -> Self:
        """Rebuild an adapter from parts that were stored: a fingerprint, a bundle, a configuration.

        Args:
            base: fingerprint of the base model.
            tensors: the weights.
            config: the family's configuration, or a mapping that makes one, or None for the defaults.

        Raises:
            IncompatibleAdapterError: the tensors are not a whole adapter of this family.
        """
        return cls(base=base, config=cls.configure(config), tensors=freeze(tensors))

    @classmethod
    def configure(cls, config: Any = None) -> Any:
        """The family's configuration from an instance, a mapping of options, or None for the defaults.

        Raises:
            InvalidInputError: an unknown or unusable option, or the configuration of another family.
        """
        if config is None or isinstance(config, Mapping):
            return cls.config_type.parse(dict(config or {}))
        if not isinstance(config, cls.config_type):
            raise InvalidInputError(
                f"{cls.__name__} cannot use a {type(config).__name__}.",
                hint=f"Pass a {cls.config_type.__name__} or a mapping of its options.",
            )
        return config

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the adapter as a folder; nothing is left behind when it fails."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: str | Path, *, base: Any = None) -> Self:
        """Read a folder; `base` (a `LanguageModel`) is checked against the adapter's own."""

    @abstractmethod
    def contribute(self, state: State, request: AdapterRequest) -> Contribution:
        """The plan parts of this adapter for one request. Pure: no side effects, no randomness."""

    @cached_property
    def digest(self) -> Digest:
        """Content hash of the weights."""
        return digest(self.tensors)

    def check_base(self, fingerprint: str, *, name: str = "this adapter") -> None:
        """Raise `IncompatibleAdapterError` unless the adapter was made for that base model."""
        if self.base != fingerprint:
            raise IncompatibleAdapterError(
                f"{name} was made for base model {self.base[:12]} but this one is {fingerprint[:12]}.",
                hint="Load the matching base model, or train the adapter again on this one.",
            )


@dataclass(frozen=True, kw_only=True)
class Update:
    """The outcome of one online update: the new state and tensors, or the reason there is none."""

    accepted: bool
    reason: str
    state: State
    tensors: TensorBundle | None = None


@runtime_checkable
class LearnsOnline(Protocol):
    """A family that can learn from feedback inside a conversation."""

    def adapt(self, state: State, feedback: Any) -> Update:
        """One update from one piece of feedback."""
        ...


@runtime_checkable
class Steerable(Protocol):
    """A family whose gates follow named numbers, so that they may change while a reply is being written."""

    def controls(self, state: State) -> Mapping[str, float]:
        """Present values of the controls, by name."""
        ...

    def steered(self, state: State, controls: Mapping[str, float]) -> State:
        """The state with some controls changed; raises `InvalidInputError` for values it cannot use."""
        ...


def controls_of(adapter: Adapter, state: State) -> Mapping[str, float]:
    """Present values of an adapter's controls; none for a family that is not `Steerable`."""
    return adapter.controls(state) if isinstance(adapter, Steerable) else {}


def steered(adapter: Adapter, state: State, controls: Mapping[str, float]) -> State:
    """The state after those of the named controls were changed that the adapter has.

    Raises:
        InvalidInputError: values that it cannot use.
    """
    if not controls or not isinstance(adapter, Steerable):
        return state
    known = adapter.controls(state)
    own = {name: value for name, value in controls.items() if name in known}
    return adapter.steered(state, own) if own else state


@runtime_checkable
class ExportsPeft(Protocol):
    """A low-rank family that can be written as a plain PEFT LoRA folder."""

    def export_peft(self, folder: str | Path, *, preference: Any = None) -> Path:
        """Write a folder that peft and vLLM load unchanged."""
        ...
