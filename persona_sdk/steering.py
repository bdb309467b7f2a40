"""Changing a reply while it is being written: named controls become new gates of running patches.

    stream = alice.stream("Tell me about tides.")
    stream.steer(concise=0.9)                        a control of an attached adapter that has it
    stream.steer(weights={"nurses/tone": 0.2})       the strength of an attachment

The adapter contributes again with the new state or weight. Its factors must be the same, only gates may
differ: then the engine changes gates and touches no weight. What is steered ends with the reply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from persona_sdk.adapters import Adapter, AdapterRequest, State
from persona_sdk.adapters.base import controls_of, steered
from persona_sdk.errors import CompositionError, InvalidInputError
from persona_sdk.plan import LowRankPatch, PlanPart


@dataclass(frozen=True)
class Contributor:
    """One adapter in a plan: how it contributed, and the plan's low-rank patches that are its own.

    Args:
        name: ``owner/name`` of the adapter.
        first: number of its first low-rank patch among the plan's.
    """

    name: str
    adapter: Adapter
    state: State
    request: AdapterRequest
    parts: tuple[PlanPart, ...]
    first: int

    @property
    def controls(self) -> Mapping[str, float]:
        """Present values of its controls."""
        return controls_of(self.adapter, self.state)

    @property
    def patches(self) -> tuple[LowRankPatch, ...]:
        """Its low-rank patches."""
        return tuple(part for part in self.parts if isinstance(part, LowRankPatch))

    def steered(self, controls: Mapping[str, float], weight: float | None) -> "Contributor":
        """The same adapter after a change; controls that it does not have are another one's.

        Raises:
            CompositionError: more than gates would change.
        """
        state = steered(self.adapter, self.state, controls)
        request = self.request if weight is None else replace(self.request, weight=weight)
        parts = self.adapter.contribute(state, request).parts or tuple(map(_off, self.parts))
        if list(map(_without_gate, parts)) != list(map(_without_gate, self.parts)):
            raise CompositionError(
                f"{self.name!r} cannot be steered so: more than its gates would change.",
                hint="Detach and attach it for the next reply instead.",
            )
        return replace(self, state=state, request=request, parts=parts)


class Steering:
    """What may be steered in one running reply."""

    def __init__(self, contributors: Sequence[Contributor]) -> None:
        self._contributors = list(contributors)

    def gates(
        self, controls: Mapping[str, float], weights: Mapping[str, float]
    ) -> dict[int, tuple[float, ...]]:
        """New gates by number of patch. Later calls start from what earlier ones changed.

        Raises:
            InvalidInputError: a control or attachment that this reply does not have, or no finite number.
            CompositionError: more than gates would change.
        """
        for name, value in {**controls, **weights}.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -10 <= value <= 10:  # as for `Persona.attach`; false for NaN too
                raise InvalidInputError(
                    f"{name}={value!r} cannot be used.", hint="Expected a number in [-10, 10]."
                )
        attached = [c.name for c in self._contributors]
        steerable = sorted({name for c in self._contributors for name in c.controls})
        if strangers := set(weights) - set(attached) | set(controls) - set(steerable):
            raise InvalidInputError(
                f"This reply has no {sorted(strangers)[0]!r} to steer.",
                hint=f"Controls: {', '.join(steerable) or 'none'}; "
                f"attachments: {', '.join(attached) or 'none'}.",
            )
        changed = [c.steered(controls, weights.get(c.name)) for c in self._contributors]
        gates = {}
        for before, after in zip(self._contributors, changed, strict=True):
            for place, (old, new) in enumerate(zip(before.patches, after.patches, strict=True)):
                if old.gate != new.gate:
                    gates[before.first + place] = new.gate
        self._contributors = changed
        return gates


def _off(part: PlanPart) -> PlanPart:
    """What an adapter that contributes nothing any more has become: the same part without effect."""
    return replace(part, gate=(0.0,) * part.rank) if isinstance(part, LowRankPatch) else part


def _without_gate(part: PlanPart) -> object:
    return (part.factors, part.rank) if isinstance(part, LowRankPatch) else part
