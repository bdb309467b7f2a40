"""Which memories become keys and values, which become weights, and which leave: facts in, decisions out.

    expected uses   u = min(hits, strength · 2^(-days since the last use / half-life))
    gain            u · tokens · prefill seconds a token          what prompts need not compute
    cost, keys      fixed + tokens · build seconds a token        of all that stands in the prefix
    cost, weights   (fixed + tokens · training seconds a token) · share that somebody waits for

| move            | when                                                                                |
|-----------------|-------------------------------------------------------------------------------------|
| text_to_kv      | gain > cost, each text earns its own share, and all fit the bytes and tokens allowed |
| text_to_weights | stable, used often, of a trusted source, neither special nor expiring, gain > cost   |
| demote_kv       | a source changed, cold, or of least value for its bytes where not all fit            |
| demote_weights  | likewise                                                                             |
| archive         | text that is idle for long, or of least value for its bytes where not all fit        |
| expire          | its time has passed                                                                  |
| keep            | everything else, with the reason                                                     |

`decide` is a pure function: the same facts in any order give the same decisions. What is frozen is never
touched. `persona_sdk.promotion` executes decisions; they name ids and numbers, never a text.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, TypeAlias, get_args

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.memory.cube import TRUST_ORDER, Trust
from persona_sdk.memory.facts import ADAPTER, PREFIX, PROMOTION, REJECTION, CubeFacts

Move: TypeAlias = Literal[
    "expire", "archive", "demote_weights", "demote_kv", "text_to_weights", "text_to_kv", "keep"
]
_ORDER: tuple[str, ...] = get_args(Move)  # in which they are executed: what frees room comes first


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
    lora_build_fixed: float = Field(30.0, ge=0, description="seconds")
    lora_build_seconds: float = Field(0.5, ge=0, description="a token of the texts, all epochs together")
    lora_bytes: int = Field(10 << 20, ge=1, description="of an adapter")
    background_share: float = Field(
        0.02, ge=0, description="what a second of training in the background counts against one of waiting"
    )
    weights_min_hits: int = Field(5, ge=1)
    weights_min_days: float = Field(7.0, ge=0, description="for which a text has said the same")
    weights_min_texts: int = Field(2, ge=1)
    weights_max_texts: int = Field(64, ge=1)
    least_trust: Trust = Field("user", description="of texts in weights and, unless pinned, in the prefix")
    half_life_days: float = Field(14.0, gt=0, description="of a use")
    cold_days: float = Field(30.0, gt=0, description="without a use, after which what was derived is dropped")
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


def decide(facts: Iterable[CubeFacts], options: SchedulerOptions, now: datetime) -> tuple[Decision, ...]:
    """What to do with an owner's cubes, in the order in which to do it; every cube is in some decision.

    Args:
        facts: of all live cubes of one owner, in any order.
        options: budgets, prices and patience.
        now: the present.
    """
    scene = _Scene({one.id: one for one in sorted(facts, key=lambda one: one.id)}, options, now)
    _end(scene)
    _decide_weights(scene)
    _decide_prefix(scene)
    named = {cube_id for decision in scene.made for cube_id in decision.cubes}
    for one in scene.cubes.values():
        if one.id not in named:
            value = scene.value(one) if one.kind == "plaintext" else 0.0
            scene.decide("keep", [one.id], scene.notes.get(one.id, scene.plain_reason(one)), gain=value)
    return tuple(sorted(scene.made, key=lambda made: (_ORDER.index(made.kind), made.cubes)))


def explain(decisions: Sequence[Decision]) -> tuple[str, ...]:
    """The decisions as lines of text, for people: what would be done, to how many cubes, and why."""
    return tuple(
        f"{made.kind:<15} {len(made.cubes):>4} x {made.cubes[0][:8]:<8}  gain {made.gain:9.3f} s  "
        f"cost {made.cost:9.3f} s  {made.bytes:+12,d} B  {made.reason}"
        for made in decisions
    )


def allowed(one: CubeFacts, options: SchedulerOptions) -> str | None:
    """None if a text may speak in every prompt or enter weights, else why not."""
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
class _Scene:
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
        self.made.append(Decision(kind, tuple(sorted(cubes)), gain, cost, size, reason))

    def drop(self, kind: Move, one: CubeFacts, reason: str) -> None:
        self.gone.add(one.id)
        self.decide(kind, [one.id], reason, cost=self.value(one), size=-one.bytes)

    def those(self, kind: str, *types: str) -> list[CubeFacts]:
        """Cubes of a kind that stay, of these semantic types if any are given."""
        return [
            one
            for one in self.cubes.values()
            if one.kind == kind and one.id not in self.gone and (not types or one.semantic_type in types)
        ]

    def uses(self, one: CubeFacts) -> float:
        """Expected uses; never more than there were."""
        if one.last_used is None:
            return 0.0
        days = max((self.now - one.last_used) / timedelta(days=1), 0.0)
        return min(float(one.hits), one.strength * math.exp2(-days / self.options.half_life_days))

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
        return f"Used {one.hits} times; nothing better to do with it."

    def _is_text(self, cube_id: str) -> bool:
        return cube_id in self.cubes and self.cubes[cube_id].kind == "plaintext"


def _end(scene: _Scene) -> None:
    """Expire what is over, archive what is idle, and the least valuable texts if there are too many."""
    options = scene.options
    for one in list(scene.cubes.values()):
        if one.state != "frozen" and one.expires_at is not None and one.expires_at <= scene.now:
            scene.drop("expire", one, "Its time has passed.")
    texts = [one for one in scene.those("plaintext") if one.state not in ("frozen", "archived")]
    movable = [one for one in texts if not one.pinned and one.priority <= 0]
    for one in movable:
        if scene.idle_days(one) > options.archive_days:
            scene.drop("archive", one, f"Not used for {scene.idle_days(one):.0f} days.")
    if options.text_bytes is not None:
        left = [one for one in texts if one.id not in scene.gone]
        excess = sum(one.bytes for one in left) - options.text_bytes
        for one in sorted((m for m in movable if m in left), key=lambda one: (scene.density(one), one.id)):
            if excess <= 0:
                break
            scene.drop(
                "archive", one, f"Texts take {excess} bytes too many, and it is worth least for its size."
            )
            excess -= one.bytes


def _decide_weights(scene: _Scene) -> None:
    """Drop adapters that are outdated, cold or do not fit; make one from the stable, often used texts."""
    options = scene.options
    made = [one for one in scene.those("parametric", ADAPTER) if one.derived and one.state != "frozen"]
    others = sum(one.bytes for one in scene.those("parametric") if one not in made)
    kept = _fitting(scene, "demote_weights", made, options.parametric_bytes - others)
    wanted = _stable_texts(scene)
    taught = {cube_id for one in kept for cube_id in one.sources}
    refused = {cube_id for one in scene.those("parametric", REJECTION) for cube_id in one.sources}
    new = [one for one in wanted if one.id not in taught]
    if not new:
        return None
    tokens = sum(one.tokens for one in wanted)
    gain = sum(scene.value(one) for one in new)
    cost = options.background_share * (options.lora_build_fixed + tokens * options.lora_build_seconds)
    room = options.parametric_bytes - others
    ids = {one.id for one in wanted}
    if len(wanted) < options.weights_min_texts:
        why = f"Weights take {options.weights_min_texts} texts; {len(wanted)} are stable and used enough."
    elif ids <= refused:
        why = "Weights did not learn these texts well enough when they were last tried."
    elif options.lora_bytes > room:
        why = f"An adapter takes {options.lora_bytes} bytes; {max(room, 0)} are free."
    elif gain <= cost:
        why = f"Weights would gain {gain:.3g} s for {cost:.3g} s."
    else:
        size = options.lora_bytes - sum(one.bytes for one in kept)
        reason = f"{len(wanted)} texts are stable and used often; {len(new)} of them are not in weights yet."
        return scene.decide("text_to_weights", ids, reason, gain=gain, cost=cost, size=size)
    scene.notes.update({one.id: why for one in new})
    return None


def _stable_texts(scene: _Scene) -> list[CubeFacts]:
    """The texts that may and should be in weights, the most valuable first; notes why others are not."""
    options, found = scene.options, []
    for one in scene.those("plaintext"):
        age = (scene.now - one.stable_since) / timedelta(days=1)
        if (why := allowed(one, options)) is not None:
            scene.notes[one.id] = why
        elif one.expires_at is not None:
            scene.notes[one.id] = "It will expire, which weights cannot."
        elif one.hits < options.weights_min_hits:
            scene.notes[one.id] = f"Used {one.hits} times; weights need {options.weights_min_hits}."
        elif age < options.weights_min_days:
            scene.notes[one.id] = f"Unchanged for {age:.1f} days; weights need {options.weights_min_days:g}."
        elif scene.value(one) > 0:
            found.append(one)
    return sorted(found, key=lambda one: (-scene.value(one), one.id))[: options.weights_max_texts]


def _decide_prefix(scene: _Scene) -> None:
    """Choose the texts of the stable prefix; keep, replace or drop the keys and values there are."""
    options = scene.options
    made = [one for one in scene.those("activation", PREFIX) if one.derived and one.state != "frozen"]
    others = sum(one.bytes for one in scene.those("activation") if one not in made)
    room = options.activation_bytes - others
    promoted = {i for one in scene.those("activation", PROMOTION) if one.derived for i in one.sources}
    pinned = [one for one in scene.those("plaintext") if one.pinned and one.state != "archived"]
    standing = [scene.cubes[i] for i in sorted(promoted) if i in scene.cubes and not scene.cubes[i].pinned]
    before = {one.id for one in standing if one.state != "frozen"}
    frozen = [one for one in standing if one.state == "frozen"]
    chosen = _choose(scene, [*pinned, *frozen], before, room)
    leaving = sorted(before - {one.id for one in chosen} - scene.gone)
    if leaving:
        scene.decide(
            "demote_kv", leaving, "No longer used enough, allowed, or within the bytes, for every prompt."
        )
    covered = set() if leaving else {i for one in made if one.complete for i in one.sources}
    prefix = [*pinned, *frozen, *chosen]
    new = [one for one in prefix if one.id not in covered]
    tokens = sum(one.tokens for one in prefix)
    gain, cost = sum(map(scene.value, new)), options.kv_build_fixed + tokens * options.kv_build_seconds
    size = tokens * options.kv_bytes
    if new and gain > cost and size <= room and tokens <= options.prefix_tokens:
        for one in made:
            scene.drop("demote_kv", one, "Another prefix takes its place.")
        reason = f"{len(prefix)} texts, {tokens} tokens, are worth more than it costs to compute them once."
        scene.decide("text_to_kv", [one.id for one in prefix], reason, gain=gain, cost=cost, size=size)
        return
    for one in new:
        if one.id not in before:
            scene.notes[one.id] = f"Keys and values would gain {gain:.3g} s for {cost:.3g} s."
    _fitting(scene, "demote_kv", made, room, leaving)


def _choose(scene: _Scene, given: Sequence[CubeFacts], before: Collection[str], room: int) -> list[CubeFacts]:
    """Texts, besides the given ones, that earn a place in every prompt: most used first, while they fit."""
    options, chosen = scene.options, []
    taught = {i for one in scene.those("parametric", ADAPTER) if one.derived for i in one.sources}
    tokens = sum(one.tokens for one in given)
    known = {one.id for one in given}
    for one in sorted(scene.those("plaintext"), key=lambda one: (-scene.uses(one), one.id)):
        price = options.kv_load_seconds if one.id in before else options.kv_build_seconds
        if one.id in known or one.id in taught or allowed(one, options) is not None:
            continue
        if one.id not in before and one.hits < options.kv_min_hits:
            continue
        if scene.value(one) <= one.tokens * price:
            continue
        after = tokens + one.tokens
        if after <= options.prefix_tokens and after * options.kv_bytes <= room:
            tokens = after
            chosen.append(one)
    return chosen


def _fitting(
    scene: _Scene,
    kind: Literal["demote_kv", "demote_weights"],
    made: Sequence[CubeFacts],
    room: int,
    leaving: Collection[str] = (),
) -> list[CubeFacts]:
    """Derived cubes that stay: complete, warm, of no text of `leaving`, of the most value for their bytes."""
    kept, options = [], scene.options
    for one in sorted(made, key=lambda one: (-scene.density(one), one.id)):
        if not one.complete:
            scene.drop(kind, one, "A memory it was made from has changed or is gone.")
        elif any(i in scene.gone or i in leaving for i in one.sources):
            scene.drop(kind, one, "A memory it was made from leaves.")
        elif scene.idle_days(one) > options.cold_days:
            scene.drop(
                kind, one, f"Neither it nor its sources were used for {scene.idle_days(one):.0f} days."
            )
        elif one.bytes > room:
            scene.drop(kind, one, f"{one.bytes} bytes do not fit, and others are worth more for theirs.")
        else:
            room -= one.bytes
            kept.append(one)
    return kept
