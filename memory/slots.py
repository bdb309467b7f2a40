"""Contradiction: statements of one slot on a line of time, each valid until the next one begins.

Similarity measures what a text is about, not whether it agrees, so rivals are found by their slot and never
by distance. A statement begins at ``valid_from``, or when it was said if it gives no date:

    said                           lives_in, as stored
    "I live in Paris"              Paris  [ever,     -       )
    "I moved to Lyon in May 2024"  Paris  [ever,     May 2024)   a new version, the old one retired
                                   Lyon   [May 2024, -       )

So the current view is right, the view as of an earlier day is right, and what arrives late takes its place
in the past. Who says since when something is so says that it is so now: what was said before without a date
had ended by then, also if it was said after that date.

What is frozen or more trusted than the newcomer is never changed: then the newcomer is kept beside it,
without slot and tagged "unconfirmed".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from sqlalchemy import Connection, select

from persona_sdk.memory import rows
from persona_sdk.memory.cube import TRUST_ORDER, CubeHeader, MemCube, Trust
from persona_sdk.memory.schema import cubes
from persona_sdk.memory.statement import attribute_of, slug

UNCONFIRMED = "unconfirmed"  # the tag

Outcome: TypeAlias = Literal["added", "superseded", "refined", "repeated", "unconfirmed", "aside"]


@dataclass(frozen=True)
class Held:
    """A statement in the working set: stored (``cube``) or new, as it is to be from now on."""

    text: str
    header: CubeHeader
    cube: MemCube | None = None

    @classmethod
    def of(cls, cube: MemCube) -> "Held":
        """A stored statement, unchanged."""
        return cls(cube.text or "", cube.header, cube)

    @property
    def changed(self) -> bool:
        """Whether the store has something else, or nothing."""
        return self.cube is None or self.cube.header != self.header or self.cube.text != self.text

    @property
    def start(self) -> datetime:
        """When it begins, for the order of rivals."""
        header = self.header
        if header.valid_from is not None:
            return header.valid_from
        return min(header.created_at, header.valid_to) if header.valid_to else header.created_at

    def get(self, name: str) -> Any:
        """One of the attributes that the writer gave it."""
        return self.header.attributes.get(name)

    def with_header(self, **changes: Any) -> "Held":
        """The same with other header fields."""
        return replace(self, header=self.header.model_copy(update=changes))


@dataclass(frozen=True)
class Settled:
    """What became of a newcomer: the slot's statements from now on, and the one it repeats or refines."""

    outcome: Outcome
    line: list[Held]
    same: Held | None = None


def stated(connection: Connection, owner: str, slots: Sequence[str]) -> list[MemCube]:
    """The owner's live statements of these slots, oldest first."""
    query = select(cubes.c.id).where(cubes.c.owner == owner).order_by(cubes.c.seq)
    found = [
        cube_id
        for part in rows.chunks(slots)
        for cube_id in connection.execute(query.where(cubes.c.slot.in_(part))).scalars()
    ]
    live = rows.live_among(connection, owner, found)
    return list(rows.lookup(connection, owner, [i for i in found if i in live]).values())


def may_change(held: Held, trust: Trust) -> bool:
    """Whether a newcomer of this trust may replace a statement."""
    if held.cube is None:
        return TRUST_ORDER.index(trust) <= TRUST_ORDER.index(held.header.trust)
    frozen = held.cube.state == "frozen"
    return not frozen and TRUST_ORDER.index(trust) <= TRUST_ORDER.index(held.cube.header.trust)


def settle(rivals: Sequence[Held], new: Held) -> Settled:
    """Put a statement among the rivals of its slot.

    ``repeated`` adds nothing; ``refined`` made one of them more precise; ``aside`` is a denial of something
    that is not held. What is ``aside`` or ``unconfirmed`` stands last in the line, without a slot.
    """
    line = sorted(rivals, key=lambda held: held.start)
    trust = new.header.trust
    if (same := _same(line, new)) is not None:
        if not _adds(same, new) or not may_change(same, trust):
            return Settled("repeated", line, same)
        others = [_reopened(held, same.start) for held in line if held is not same]
        closed = _closed([*others, _refined(same, new)])
        allowed = all(may_change(held, trust) for held in closed if held.cube and held.changed)
        return Settled("refined", closed, same) if allowed else Settled("repeated", line, same)
    if _polarity(new) != "positive" and line and _single(new):
        held_then = [held for held in line if held.header.valid(new.start) and _polarity(held) == "positive"]
        if not any(_value(held) == _value(new) for held in held_then):
            return Settled("aside", [*line, without_slot(new)])
    closed = _closed([*_made_room(line, new), new])
    changed = [held for held in closed if held.cube is not None and held.changed]
    if not all(may_change(held, trust) for held in changed):
        return Settled("unconfirmed", [*line, unconfirmed(new)])
    return Settled("superseded" if changed else "added", closed)


def _made_room(line: Sequence[Held], new: Held) -> list[Held]:
    """What was said without dates is over when `new` began, if that was said later of what is still so."""
    if not new.get("dated") or new.header.valid_to is not None or _polarity(new) != "positive":
        return list(line)

    def vague(held: Held) -> bool:
        said_before = held.header.created_at <= new.header.created_at
        return said_before and held.start > new.start and not held.get("dated") and not held.get("ends")

    over = [held for held in line if vague(held)]
    kept = [held for held in line if not vague(held)]
    for held in over:
        kept = [_reopened(other, held.start) for other in kept]
    return [*(held.with_header(valid_from=None, valid_to=new.start) for held in over), *kept]


def without_slot(held: Held) -> Held:
    """The same as a plain statement; its attributes still name the slot it would fill."""
    attributes = {**held.header.attributes, "slot": held.header.slot}
    return held.with_header(slot=None, attributes=attributes)


def unconfirmed(held: Held) -> Held:
    """The same as a candidate that contradicts something better founded."""
    return without_slot(held).with_header(tags=(*held.header.tags, UNCONFIRMED))


def _single(held: Held) -> bool:
    known = attribute_of(held.get("attribute"))
    return known is None or known.single


def _value(held: Held) -> str:
    # "Paris, France" is Paris, said more precisely. An application may fill a slot with a text alone.
    return slug(str(held.get("value") or held.text).split(",")[0])


def _polarity(held: Held) -> str:
    return str(held.get("polarity") or "positive")


def _same(line: Sequence[Held], new: Held) -> Held | None:
    """The statement that says the same and holds when the new one begins, or began too late to do so."""
    alike = [held for held in line if _value(held) == _value(new) and _polarity(held) == _polarity(new)]
    for held in reversed(alike):
        if held.header.valid(new.start):
            return held
        between = [other for other in line if new.start < other.start < held.start]
        if new.start < held.start and not between and not held.get("dated"):
            return held
    return None


def _adds(held: Held, new: Held) -> bool:
    """Whether a statement says more than one of the same value that is held already."""
    dated = bool(new.get("dated")) and new.header.valid_from != held.header.valid_from
    ends = new.header.valid_to is not None and new.header.valid_to != held.header.valid_to
    return dated or ends or len(str(new.get("value")).split(",")) > len(str(held.get("value")).split(","))


def _refined(held: Held, new: Held) -> Held:
    """`held` in the words of `new`, standing on the sources of both."""
    old, header = held.header, new.header
    sources = tuple(dict.fromkeys((*old.sources, *header.sources)))
    dated = new.get("dated")
    attributes = {**header.attributes, "dated": bool(dated or held.get("dated"))}
    fields = {
        "origin": header.origin,
        "valid_from": header.valid_from if dated else old.valid_from,
        "valid_to": header.valid_to or old.valid_to,
        "sources": sources,
        "created_at": old.created_at,
        "attributes": attributes,
    }
    return replace(held, text=new.text).with_header(**fields)


def _reopened(held: Held, moment: datetime) -> Held:
    """Without the end that a rival gave it by beginning at a moment that has turned out wrong."""
    given = held.header.valid_to == moment and not held.get("ends")
    return held.with_header(valid_to=None) if given else held


def _closed(line: Sequence[Held]) -> list[Held]:
    """The statements in order, each ending where the next begins, unless it is said to end before."""
    done = sorted(line, key=lambda held: held.start)
    for place, (earlier, later) in enumerate(pairwise(list(done))):
        start = done[place + 1].start
        said_end = done[place].header.valid_to if earlier.get("ends") else None
        end = min(said_end, start) if said_end else start
        if done[place].header.valid_to != end:
            done[place] = done[place].with_header(valid_to=end)
        if later.header.valid_from is None:
            done[place + 1] = later.with_header(valid_from=end)
    return done
