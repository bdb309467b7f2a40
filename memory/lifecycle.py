"""States of life of a cube, and the moves between them.

    state       meaning                                                        search finds it
    generated   written, never used; the state of a cube without a row         while live
    activated   used, or taken back from the archive or from a merge           while live
    merged      compressed, with others, into a newer version that names it    no
    archived    put aside; history still finds it                              no
    frozen      locked: no edit, merge, retirement, expiry or decay            as before the freeze

``MOVES`` is the one table. The database holds the same one, and its foreign key refuses every row that makes
another move. A frozen cube goes back only to the state it had. There is no row for *expired*: all that is
left of an expired cube is a tombstone with that reason.

Search sees the live set of a revision, not states. The verbs that change both in one transaction, and write
the event, are in `transitions`; the functions here work inside the caller's transaction and write no event.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from persona_sdk.errors import FrozenError, LifecycleError, NotFoundError
from persona_sdk.memory import revisions
from persona_sdk.memory.cube import State, clean_text, utc_now
from persona_sdk.memory.rows import FIRST, chunks
from persona_sdk.memory.schema import cubes, states, to_column

MOVES: Mapping[State, frozenset[State]] = {
    "generated": frozenset({"activated", "merged", "archived", "frozen"}),
    "activated": frozenset({"merged", "archived", "frozen"}),
    "merged": frozenset({"activated", "archived", "frozen"}),
    "archived": frozenset({"activated", "frozen"}),
    "frozen": frozenset({"generated", "activated", "merged", "archived"}),
}

DORMANT: tuple[State, ...] = ("archived", "merged")  # what a cube that becomes live again wakes from


@dataclass(frozen=True)
class Standing:
    """The state of a cube. ``before`` is the one it came from; ``moved``: it has left the first one once."""

    state: State = FIRST
    before: State = FIRST
    legal_basis: str | None = None
    moved: bool = False

    @property
    def legal(self) -> frozenset[State]:
        """The states it may move to."""
        return frozenset({self.before}) if self.state == "frozen" else MOVES[self.state]


def standings(connection: Connection, owner: str, ids: Sequence[str]) -> dict[str, Standing]:
    """The state of each of the owner's cubes among `ids`; what is not there is left out."""
    same = (states.c.owner == cubes.c.owner) & (states.c.cube_id == cubes.c.id)
    columns = (cubes.c.id, states.c.state, states.c.before, states.c.legal_basis)
    query = select(*columns).select_from(cubes.outerjoin(states, same)).where(cubes.c.owner == owner)
    return {
        row.id: Standing()
        if row.state is None
        else Standing(row.state, row.before, row.legal_basis, moved=True)
        for part in chunks(ids)
        for row in connection.execute(query.where(cubes.c.id.in_(part)))
    }


def move(
    connection: Connection,
    owner: str,
    cube_id: str,
    state: State,
    *,
    reason: str = "",
    legal_basis: str | None = None,
) -> None:
    """Give a cube another state.

    Raises:
        LifecycleError: the move is not in the table.
        NotFoundError: the cube is not the owner's.
    """
    have = standings(connection, owner, [cube_id])
    _move(connection, owner, have, [cube_id], state, reason, legal_basis)


def move_each(
    connection: Connection, owner: str, ids: Sequence[str], state: State, *, reason: str = ""
) -> dict[str, State]:
    """Give every one of these cubes another state; errors as `move`. Returns the moves, for the event."""
    return _move(connection, owner, standings(connection, owner, ids), ids, state, reason)


def move_all(
    connection: Connection, owner: str, ids: Iterable[str], state: State, *, reason: str = ""
) -> dict[str, State]:
    """Give cubes another state; those that have it already are left. Returns the moves, for the event."""
    wanted = list(dict.fromkeys(ids))
    have = standings(connection, owner, wanted)
    moving = [cube_id for cube_id in wanted if cube_id not in have or have[cube_id].state != state]
    return _move(connection, owner, have, moving, state, reason)


def wake(connection: Connection, owner: str, ids: Sequence[str], *, reason: str) -> dict[str, State]:
    """Activate those of the cubes that are dormant. Returns the moves, for the event."""
    have = standings(connection, owner, ids)
    asleep = [cube_id for cube_id, now in have.items() if now.state in DORMANT]
    return _move(connection, owner, have, asleep, "activated", reason)


def _move(
    connection: Connection,
    owner: str,
    have: Mapping[str, Standing],
    ids: Sequence[str],
    state: State,
    reason: str,
    legal_basis: str | None = None,
) -> dict[str, State]:
    for cube_id in ids:
        now = have.get(cube_id)
        if now is None:
            raise NotFoundError(f"No cube {cube_id!r:.60} belongs to {owner!r}.", hint="Nothing was changed.")
        if state not in now.legal:
            raise LifecycleError(
                f"A cube cannot go from {now.state!r} to {state!r}.",
                hint=f"From {now.state!r} it may go to: {', '.join(sorted(now.legal))}.",
            )
        values: dict[str, str | None] = {"before": now.state, "state": state, "since": to_column(utc_now())}
        values |= {"reason": clean_text(reason, "reason"), "legal_basis": legal_basis}
        if now.moved:
            mine = (states.c.owner == owner) & (states.c.cube_id == cube_id)
            connection.execute(update(states).where(mine).values(**values))
        else:
            connection.execute(insert(states).values(owner=owner, cube_id=cube_id, **values))
    if ids:
        revisions.touch(connection, owner)
    return dict.fromkeys(ids, state)


def require_unfrozen(connection: Connection, owner: str, ids: Sequence[str]) -> None:
    """Check that none of the owner's cubes is frozen.

    Raises:
        FrozenError: some are.
    """
    if frozen := sorted(_frozen(connection, owner, ids)):
        raise FrozenError(
            f"{len(frozen)} frozen cube(s) would change: {_listed(frozen)}.",
            hint="Nothing was committed. Unfreeze them first.",
        )


def require_erasable(connection: Connection, by_owner: Mapping[str, Sequence[str]], asking: str) -> None:
    """Check that no cube, nor any cube of others derived from it, is frozen with a legal basis.

    Raises:
        FrozenError: some are. Only cubes of the one who asks are named.
    """
    held = {
        owner: sorted(i for i, basis in _frozen(connection, owner, ids).items() if basis is not None)
        for owner, ids in by_owner.items()
    }
    if any(held.values()):
        own = held.get(asking) or []
        names = f": {_listed(own)}" if own else ", all of others and derived from it"
        raise FrozenError(
            f"{sum(map(len, held.values()))} cube(s) are on legal hold{names}.",
            hint="Nothing was erased. Release them first: unfreeze, by whoever may.",
            cube_ids=tuple(own),
        )


def any_frozen(connection: Connection, by_owner: Mapping[str, Sequence[str]]) -> bool:
    """Whether one of the cubes is frozen, on whatever basis."""
    return any(_frozen(connection, owner, ids) for owner, ids in by_owner.items())


def _frozen(connection: Connection, owner: str, ids: Sequence[str]) -> dict[str, str | None]:
    """Frozen cubes and their legal basis."""
    mine = (states.c.owner == owner) & (states.c.state == "frozen")
    query = select(states.c.cube_id, states.c.legal_basis).where(mine)
    return {
        row.cube_id: row.legal_basis
        for part in chunks(ids)
        for row in connection.execute(query.where(states.c.cube_id.in_(part)))
    }


def _listed(ids: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(f"{cube_id:.60}" for cube_id in ids[:most])
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} more"
