"""What the scheduler reasons with: its options, what it may decide, and what a cube is worth.

    expected uses   u = min(hits, strength · 2^(-days since the last use / half-life))     as in `uses`
    value           u · tokens · prefill seconds a token, of a text; of something derived, that of its sources

| symbol               | field                             |
|----------------------|-----------------------------------|
| hits, strength       | `CubeFacts` of the text           |
| half-life            | ``CubeFacts.half_life_days``      |
| prefill seconds      | ``SchedulerOptions.prefill_seconds`` |
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, TypeAlias, get_args

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.memory.cube import TRUST_ORDER, Trust
from persona_sdk.memory.facts import CubeFacts
from persona_sdk.memory.screening import QUARANTINED
from persona_sdk.memory.slots import UNCONFIRMED
from persona_sdk.memory.turns import TURN
from persona_sdk.memory.uses import decayed

Move: TypeAlias = Literal[
    "expire", "archive", "demote_weights", "demote_kv", "text_to_weights", "text_to_kv", "keep"
]
ORDER: tuple[str, ...] = get_args(Move)  # in which they are executed: what frees room comes first


class SchedulerOptions(FrozenConfig):
    """Budgets, prices and patience. The prices are those of SmolLM2-135M on one core; measure your own with
    ``benchmarks.memory --part kv``.
    """

    activation_bytes: int = Field(256 << 20, ge=0, description="of all activation cubes of one owner")
    parametric_bytes: int = Field(64 << 20, ge=0, description="of all parametric cubes of one owner")
    text_bytes: int | None = Field(None, ge=0, description="of all live texts of one owner; None: any")
    prefix_tokens: int = Field(1024, ge=0, description="texts of the stable prefix together")
    prefill_seconds: float = Field(0.005, ge=0, description="to compute a token of a prompt")
    kv_build_fixed: float = Field(0.05, ge=0, description="seconds, to make and store a prefix")
    kv_build_seconds: float = Field(0.005, ge=0, description="a token")
    kv_load_seconds: float = Field(0.0001, ge=0, description="a token, each time it is read")
    kv_bytes: int = Field(46_080, ge=1, description="keys and values of a token")
    kv_min_hits: int = Field(3, ge=1)
    lora_build_fixed: float = Field(60.0, ge=0, description="seconds")
    lora_build_seconds: float = Field(2.0, ge=0, description="a token of the texts, all epochs together")
    lora_bytes: int = Field(10 << 20, ge=1, description="of an adapter")
    background_share: float = Field(
        0.02, ge=0, description="what a second of training in the background counts against one of waiting"
    )
    weights_min_hits: int = Field(5, ge=1)
    weights_min_days: float = Field(7.0, ge=0, description="for which a text has said the same")
    weights_min_texts: int = Field(2, ge=1)
    weights_max_texts: int = Field(64, ge=1)
    least_trust: Trust = Field("user", description="of texts in weights and, unless pinned, in the prefix")
    cold_days: float = Field(
        30.0, gt=0, description="without a use, after which derived cubes go, and texts out of the prefix"
    )
    archive_days: float = Field(180.0, gt=0, description="without a use, after which a text is archived")


@dataclass(frozen=True)
class Decision:
    """One move. ``gain`` and ``cost`` are seconds; ``bytes`` is what the store gains (or, negative, loses).

    ``text_to_kv`` names all texts of the prefix to be, ``text_to_weights`` all that the adapter is to know.
    """

    kind: Move
    cubes: tuple[str, ...]
    gain: float
    cost: float
    bytes: int
    reason: str


def allowed(one: CubeFacts, options: SchedulerOptions, now: datetime) -> str | None:
    """None if a text may speak in every prompt or enter weights, else why not."""
    if one.valid_to is not None and one.valid_to <= now:
        return "It is no longer so."
    if one.valid_from is not None and one.valid_from > now:
        return "It is not so yet."
    if UNCONFIRMED in one.tags:
        return "It contradicts something better founded and is unconfirmed."
    if QUARANTINED in one.tags:
        return "It reads like an instruction and is quarantined."
    if one.semantic_type == TURN:
        return "It is a recorded turn, of which nobody knows whether it is still so."
    if one.state == "frozen":
        return "It is frozen."
    if one.state == "archived":
        return "It is archived."
    if one.sensitivity == "special":
        return "It is of a special category and stays text."
    if TRUST_ORDER.index(one.trust) > TRUST_ORDER.index(options.least_trust):
        return f"Its source is trusted as {one.trust!r}; promotion needs {options.least_trust!r}."
    return None


@dataclass
class Scene:
    """The facts, and what has been decided so far."""

    cubes: dict[str, CubeFacts]
    options: SchedulerOptions
    now: datetime
    made: list[Decision] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def decide(
        self,
        kind: Move,
        cubes: Iterable[str],
        reason: str,
        *,
        gain: float = 0.0,
        cost: float = 0.0,
        size: int = 0,
    ) -> None:
        """Note a decision."""
        self.made.append(Decision(kind, tuple(sorted(cubes)), gain, cost, size, reason))

    def drop(self, kind: Move, one: CubeFacts, reason: str) -> None:
        """Note a decision by which a cube leaves."""
        self.gone.add(one.id)
        self.decide(kind, [one.id], reason, cost=self.value(one), size=-one.bytes)

    def those(self, kind: str, semantic_type: str | None = None) -> list[CubeFacts]:
        """Cubes of a kind that stay, of this semantic type if one is given."""
        return [
            one
            for one in self.cubes.values()
            if one.kind == kind and one.id not in self.gone and semantic_type in (None, one.semantic_type)
        ]

    def uses(self, one: CubeFacts) -> float:
        """Expected uses; never more than there were."""
        if one.last_used is None:
            return 0.0
        left = decayed(one.strength, self.now - one.last_used, one.half_life_days)
        return min(float(one.hits), left)

    def value(self, one: CubeFacts) -> float:
        """Seconds of prefill its expected uses cost as text; of something derived, those of its sources."""
        if one.kind == "plaintext":
            return self.uses(one) * one.tokens * self.options.prefill_seconds
        return sum(self.value(self.cubes[i]) for i in one.sources if self._is_text(i))

    def density(self, one: CubeFacts) -> float:
        """Value for its bytes."""
        return self.value(one) / max(one.bytes, 1)

    def idle_days(self, one: CubeFacts) -> float:
        """Days since it, or a text it was made from, was used."""
        texts = [self.cubes[i].touched for i in one.sources if self._is_text(i)]
        return (self.now - max([one.touched, *texts])) / timedelta(days=1)

    def plain_reason(self, one: CubeFacts) -> str:
        """Why it stays, where nothing better is known."""
        return f"Used {one.hits} times; nothing better to do with it."

    def _is_text(self, cube_id: str) -> bool:
        return cube_id in self.cubes and self.cubes[cube_id].kind == "plaintext"
