"""What an erasure took with it because it was derived, told to those who can make it again.

An adapter trained on ten texts is erased with any one of them. Nine remain, and whoever trains adapters may
train a new one from these. This module only says what is left to train from; memory knows no trainers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from persona_sdk.memory import rows
from persona_sdk.memory.cube import Kind, Origin, Source


@dataclass(frozen=True)
class Derived:
    """A cube that was erased because of a source.

    ``sources`` are those that remain, with the owners and hashes they were recorded with; none when it had
    no other. ``live`` is False for one that was only part of the past.
    """

    owner: str
    cube_id: str
    kind: Kind
    semantic_type: str
    origin: Origin
    sources: tuple[Source, ...]
    live: bool


@dataclass(frozen=True)
class Retrainable:
    """Weights that were erased and could be trained again: their id, and those of the sources that remain."""

    cube_id: str
    sources: tuple[str, ...]


def collect(
    connection: Connection, by_owner: Mapping[str, Sequence[str]], asked: Collection[tuple[str, str]]
) -> list[Derived]:
    """Describe the cubes of `by_owner` that were not `asked` for, before they are erased."""
    going = {(owner, cube_id) for owner, ids in by_owner.items() for cube_id in ids}
    found = []
    for owner, ids in by_owner.items():
        wanted = [cube_id for cube_id in ids if (owner, cube_id) not in asked]
        live = rows.live_among(connection, owner, wanted)
        for cube in rows.lookup(connection, owner, wanted).values():
            left = [s for s in cube.header.sources if (s.owner, s.cube_id) not in going]
            kept = tuple(s for s in left if rows.lookup(connection, s.owner, [s.cube_id]))
            what = (cube.kind, cube.header.semantic_type, cube.header.origin)
            found.append(Derived(owner, cube.id, *what, kept, cube.id in live))
    return found


def retrainable(derived: Sequence[Derived]) -> tuple[Retrainable, ...]:
    """The live weights among `derived` that have a source left."""
    return tuple(
        Retrainable(item.cube_id, tuple(source.cube_id for source in item.sources))
        for item in derived
        if item.kind == "parametric" and item.live and item.sources
    )
