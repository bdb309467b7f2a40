"""Uses: how often and how lately a cube helped. Recorded when somebody says so, never by a read.

    at each use    s <- s * 0.5 ** (days / half_life) + 1
    so that        s(t) = sum_i 0.5 ** ((t - t_i) / half_life)

    symbol       field                       meaning
    s            strength                    at ``last_used``; 1 after the first use
    days         at - last_used              a use that is reported late counts as if it had come in time
    half_life    header.half_life_days       of the cube, else HALF_LIFE_DAYS; a frozen cube does not decay

The first use moves a generated cube to activated. Use never touches trust: what is often retrieved is not
for that reason more true.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, insert, select, update

from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import events, lifecycle, rows
from persona_sdk.memory.core import StoreCore
from persona_sdk.memory.cube import MemCube
from persona_sdk.memory.rows import FIRST, chunks
from persona_sdk.memory.schema import from_column, to_column, uses

HALF_LIFE_DAYS = 30.0


@dataclass(frozen=True)
class Use:
    """How much a cube was used. ``half_life_days`` is None for one that does not decay."""

    hits: int
    strength: float
    last_used: datetime
    half_life_days: float | None = HALF_LIFE_DAYS

    def at(self, now: datetime) -> float:
        """The strength that is left at a time."""
        return decayed(self.strength, now - self.last_used, self.half_life_days)


def decayed(strength: float, elapsed: timedelta, half_life_days: float | None) -> float:
    """``s * 0.5 ** (days / half_life)``."""
    days = max(elapsed / timedelta(days=1), 0.0)
    return strength if half_life_days is None else strength * 0.5 ** (days / half_life_days)


def record(store: StoreCore, owner: str, ids: Sequence[str], at: datetime) -> None:
    """Note that cubes were of use at a time.

    Raises:
        InvalidInputError: `at` has no time zone, or no cube is named.
        NotFoundError: a cube is not the owner's; nothing was noted.
    """
    if at.tzinfo is None or isinstance(ids, str) or not ids:
        raise InvalidInputError("A use needs a time with a zone, and ids in a list.", hint="Give both.")
    wanted = list(dict.fromkeys(ids))
    with store.writing(owner) as connection:
        found = rows.lookup(connection, owner, wanted)
        if missing := [cube_id for cube_id in wanted if cube_id not in found]:
            raise NotFoundError(
                f"No cube {missing[0]!r:.60} belongs to {owner!r}.", hint="Nothing was noted."
            )
        before = read(connection, found.values())
        for cube_id, cube in found.items():
            _count(connection, cube, before.get(cube_id), at)
        fresh = [cube_id for cube_id, cube in found.items() if cube.state == FIRST]
        moved = lifecycle.move_all(connection, owner, fresh, "activated", reason="used")
        events.append(connection, owner, "use", {"used": wanted, "states": moved})


def _count(connection: Connection, cube: MemCube, before: Use | None, at: datetime) -> None:
    key = {"owner": cube.owner, "cube_id": cube.id}
    if before is None:
        first = {"hits": 1, "strength": 1.0, "last_used": to_column(at)}
        connection.execute(insert(uses).values(**key, **first))
        return
    newest, half_life = max(at, before.last_used), half_life_of(cube)
    strength = before.at(newest) + decayed(1.0, newest - at, half_life)
    values = {"hits": before.hits + 1, "strength": strength, "last_used": to_column(newest)}
    mine = (uses.c.owner == cube.owner) & (uses.c.cube_id == cube.id)
    connection.execute(update(uses).where(mine).values(**values))


def half_life_of(cube: MemCube) -> float | None:
    """Days in which a use of the cube comes to count half; None: it does not decay."""
    return None if cube.state == "frozen" else cube.header.half_life_days or HALF_LIFE_DAYS


def read(connection: Connection, cubes: Iterable[MemCube]) -> dict[str, Use]:
    """The uses of cubes, all of one owner, by id; a cube that was never used is left out."""
    by_id = {cube.id: cube for cube in cubes}
    found: dict[str, Use] = {}
    for part in chunks(list(by_id)):
        mine = (uses.c.owner == by_id[part[0]].owner) & uses.c.cube_id.in_(part)
        for row in connection.execute(select(uses).where(mine)):
            half_life = half_life_of(by_id[row.cube_id])
            found[row.cube_id] = Use(row.hits, row.strength, from_column(row.last_used), half_life)
    return {cube_id: found[cube_id] for cube_id in by_id if cube_id in found}


def of(store: StoreCore, owner: str) -> dict[str, Use]:
    """The uses of an owner's cubes, by id, oldest cube first."""
    with store.reading() as connection:
        return read(connection, rows.read_cubes(connection, owner))
