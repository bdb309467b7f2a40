"""What a persona or a group prefers: weights by name, for every adapter in reach that has controls so called.

    state of an attachment ◁ the groups' preferences, the first group's last ◁ the persona's own

A ◁ B is `Steerable.steered`: the named controls as said, the family decides about the others. A preference is
a cube of its own in its owner's history, so it reaches the adapters that a group attached, and those attached
later. It is checked when it is said. When it is read, what an adapter cannot use any more is passed over.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from persona_sdk.adapters import Adapter, State
from persona_sdk.adapters.base import controls_of, steered
from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError
from persona_sdk.memory import CubeDraft, CubeHeader, MemCube

SEMANTIC_TYPE = "preference"  # of kind parametric; the texts of that type are something else


_LARGEST = 1e6


class PreferenceFacts(FrozenConfig):
    """What a preference's cube says in its attributes."""

    weights: dict[str, float]


def draft(weights: Mapping[str, float], reach: Sequence[tuple[Adapter, State]]) -> CubeDraft:
    """The cube of a preference over what these adapters have controls for.

    Args:
        weights: by name of the control.
        reach: the adapters and the states they are in now.

    Raises:
        InvalidInputError: a name that no adapter has, or weights that one cannot use.
    """
    known = {name for adapter, state in reach for name in controls_of(adapter, state)}
    for name, value in weights.items():
        if name not in known:
            raise InvalidInputError(
                f"No adapter in reach has {name!r} to be preferred.",
                hint=f"Known: {', '.join(sorted(known))}." if known else "Attach one that has preferences.",
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= _LARGEST:  # true for NaN too
            raise InvalidInputError(
                f"{name}={value!r:.40} cannot be preferred.", hint=f"Expected at most {_LARGEST:g} in size."
            )
    for adapter, state in reach:
        steered(adapter, state, weights)
    facts = PreferenceFacts(weights={name: float(value) for name, value in weights.items()})
    header = CubeHeader(title="preference", semantic_type=SEMANTIC_TYPE, attributes=facts.model_dump())
    return CubeDraft(kind="parametric", header=header)


def stated(cubes: Iterable[MemCube]) -> list[MemCube]:
    """The preferences among an owner's live parametric cubes: one at most, unless an old one was revived."""
    return [cube for cube in cubes if cube.header.semantic_type == SEMANTIC_TYPE]


def weights_of(cubes: Iterable[MemCube]) -> Mapping[str, float]:
    """What an owner prefers; nothing where an archive put something else there."""
    found: dict[str, Any] = {}
    for cube in stated(cubes):
        with suppress(InvalidInputError):
            found = PreferenceFacts.parse(cube.header.attributes).weights
    return found


def applied(adapter: Adapter, state: State, preferences: Iterable[Mapping[str, float]]) -> State:
    """The state under preferences, in order, without those that this adapter cannot use."""
    for weights in preferences:
        with suppress(InvalidInputError):
            state = steered(adapter, state, weights)
    return state
