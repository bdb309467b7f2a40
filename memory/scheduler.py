"""Which memories become keys and values, which become weights, and which leave: facts in, decisions out.

    expected uses   u = min(hits, strength · 2^(-days since the last use / half-life))
    gain            u · tokens · prefill seconds a token          what prompts need not compute
    cost, keys      fixed + tokens · build seconds a token        of all that stands in the prefix
    cost, weights   (fixed + tokens · training seconds a token) · share that somebody waits for

| move            | when                                                                                |
|-----------------|-------------------------------------------------------------------------------------|
| text_to_kv      | gain > cost, each text earns its own share, and all fit the bytes and tokens allowed |
| text_to_weights | stable, used often, of a trusted source, neither special nor ending, gain > cost     |
| demote_kv       | a source changed, cold, or of least value for its bytes where not all fit            |
| demote_weights  | likewise                                                                             |
| archive         | text that is idle for long, or of least value for its bytes where not all fit        |
| expire          | its time has passed                                                                  |
| keep            | everything else, with the reason                                                     |

`decide` is a pure function: the same facts in any order give the same decisions. What is frozen is never
touched. `persona_sdk.promotion` executes decisions; they name ids and numbers, never a text.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Literal

from persona_sdk.memory.decisions import ORDER, Decision, Scene, SchedulerOptions, allowed
from persona_sdk.memory.facts import ADAPTER, PREFIX, PROMOTION, REJECTION, CubeFacts

__all__ = ["Decision", "SchedulerOptions", "decide", "explain"]


def decide(facts: Iterable[CubeFacts], options: SchedulerOptions, now: datetime) -> tuple[Decision, ...]:
    """What to do with an owner's cubes, in the order in which to do it; every cube is in some decision.

    Args:
        facts: of all live cubes of one owner, in any order.
        options: budgets, prices and patience.
        now: the present.
    """
    scene = Scene({one.id: one for one in sorted(facts, key=lambda one: one.id)}, options, now)
    _end(scene)
    _decide_weights(scene)
    _decide_prefix(scene)
    named = {cube_id for decision in scene.made for cube_id in decision.cubes}
    for one in scene.cubes.values():
        if one.id not in named:
            value = scene.value(one) if one.kind == "plaintext" else 0.0
            scene.decide("keep", [one.id], scene.notes.get(one.id, scene.plain_reason(one)), gain=value)
    return tuple(sorted(scene.made, key=lambda made: (ORDER.index(made.kind), made.cubes)))


def explain(decisions: Sequence[Decision]) -> tuple[str, ...]:
    """The decisions as lines of text, for people: what would be done, to how many cubes, and why."""
    return tuple(
        f"{made.kind:<15} {len(made.cubes):>4} x {made.cubes[0][:8]:<8}  gain {made.gain:9.3f} s  "
        f"cost {made.cost:9.3f} s  {made.bytes:+12,d} B  {made.reason}"
        for made in decisions
    )


def _end(scene: Scene) -> None:
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
        for one in sorted(
            (m for m in movable if m.id not in scene.gone), key=lambda one: (scene.density(one), one.id)
        ):
            if excess <= 0:
                break
            scene.drop(
                "archive", one, f"Texts take {excess} bytes too many, and it is worth least for its size."
            )
            excess -= one.bytes


def _decide_weights(scene: Scene) -> None:
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


def _stable_texts(scene: Scene) -> list[CubeFacts]:
    """The texts that may and should be in weights, the most valuable first; notes why others are not."""
    options, found = scene.options, []
    for one in scene.those("plaintext"):
        age = (scene.now - one.stable_since) / timedelta(days=1)
        if (why := allowed(one, options, scene.now)) is not None:
            scene.notes[one.id] = why
        elif one.expires_at is not None:
            scene.notes[one.id] = "It will expire, which weights cannot."
        elif one.valid_to is not None:
            scene.notes[one.id] = "It will be over, which weights cannot notice."
        elif one.hits < options.weights_min_hits:
            scene.notes[one.id] = f"Used {one.hits} times; weights need {options.weights_min_hits}."
        elif age < options.weights_min_days:
            scene.notes[one.id] = f"Unchanged for {age:.1f} days; weights need {options.weights_min_days:g}."
        elif scene.value(one) > 0:
            found.append(one)
    return sorted(found, key=lambda one: (-scene.value(one), one.id))[: options.weights_max_texts]


def _decide_prefix(scene: Scene) -> None:
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


def _choose(scene: Scene, given: Sequence[CubeFacts], before: Collection[str], room: int) -> list[CubeFacts]:
    """Texts, besides the given ones, that earn a place in every prompt: most used first, while they fit."""
    options, chosen = scene.options, []
    taught = {i for one in scene.those("parametric", ADAPTER) if one.derived for i in one.sources}
    tokens = sum(one.tokens for one in given)
    known = {one.id for one in given}
    for one in sorted(scene.those("plaintext"), key=lambda one: (-scene.uses(one), one.id)):
        price = options.kv_load_seconds if one.id in before else options.kv_build_seconds
        if one.id in known or one.id in taught or allowed(one, options, scene.now) is not None:
            continue
        if one.id not in before and one.hits < options.kv_min_hits:
            continue
        if one.id in before and scene.idle_days(one) > options.cold_days:
            continue
        if scene.value(one) <= one.tokens * price:
            continue
        after = tokens + one.tokens
        if after <= options.prefix_tokens and after * options.kv_bytes <= room:
            tokens = after
            chosen.append(one)
    return chosen


def _fitting(
    scene: Scene,
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
