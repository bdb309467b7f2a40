"""What the contract suite needs to know of a family: how to make small adapters of it.

A new family adds one entry to `FAMILIES`; a test fails while a registered family has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from persona_sdk.adapters import Adapter, LoRA, Panacea, State
from persona_sdk.models import LanguageModel


@dataclass(frozen=True)
class Family:
    """Makers of one family's test objects.

    Args:
        zero: an adapter that must leave the base's output as it is, with its `zero_state`.
        random: an adapter with large weights, for a seed; equal seeds give equal adapters.
        zero_state: the state that goes with `zero`.
        state: a state under which `random` changes the output.
    """

    zero: Callable[[LanguageModel], Adapter]
    random: Callable[[LanguageModel, int], Adapter]
    zero_state: State
    state: State


def _lora(model: LanguageModel, seed: int) -> Adapter:
    return LoRA.random(model, {"rank": 3, "seed": seed}, std=0.3)


def _panacea(model: LanguageModel, seed: int, std: float = 0.3) -> Adapter:
    options = {"dimensions": ("concise", "warm", "formal"), "rank": 2, "alpha": 4.0, "seed": seed}
    return Panacea.random(model, options, std=std)


FAMILIES: Mapping[str, Family] = {
    "lora": Family(
        zero=lambda model: LoRA.random(model, {"rank": 2}, std=0.0),
        random=_lora,
        zero_state={},
        state={"gate": [1.0, 0.5, -0.5]},
    ),
    "panacea": Family(
        zero=lambda model: _panacea(model, 0, std=0.0),
        random=_panacea,
        zero_state={"preference": {"warm": 1.0}},
        state={"preference": {"concise": 0.7, "formal": 0.3}},
    ),
}


def unknown_state() -> dict[str, Any]:
    """A state no family understands."""
    return {"no family has this key": 1}
