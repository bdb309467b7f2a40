"""History by intervals: what a commit, a rollback and a look into the past do to the tables.

Every function works inside the caller's transaction and takes the owner it is about. A revision number n
is one point of an owner's history; the cubes of n are those whose interval covers n. A rollback to k is a
new revision that closes and opens intervals until its live set is that of k, less what was forgotten.
"""

import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, bindparam, func, insert, or_, select, update

from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError, NotFoundError, RevisionConflictError
from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory import schema
from persona_sdk.memory.cube import utc_now
from persona_sdk.memory.schema import group_memberships, live_at, memberships, personas, revisions, tombstones


@dataclass(frozen=True)
class Revision:
    """One point of a persona's history. ``parent`` is 0 for the first one.

    ``added`` and ``retired`` are cube ids; both keep naming cubes that were forgotten since. For a
    rollback, ``restores`` is the revision whose state it brought back and ``gone`` what of that state had
    been forgotten.
    """

    owner: str
    number: int
    parent: int
    message: str
    created_at: datetime
    added: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    restores: int | None = None
    gone: tuple[str, ...] = ()


@dataclass(frozen=True)
class PersonaRecord:
    """A persona of the store: its kind, newest revision and number of live cubes."""

    id: str
    kind: str
    revision: int
    cubes: int
    created_at: datetime


_HEAD = select(personas.c.head).where(personas.c.owner == bindparam("of"))
_MARK = select(personas.c.head, personas.c.stamp).where(personas.c.owner == bindparam("of"))


def head(connection: Connection, owner: str) -> int:
    """The newest revision of an owner, 0 when there is none."""
    return connection.execute(_HEAD, {"of": owner}).scalar() or 0


def mark(connection: Connection, owner: str) -> tuple[int, str]:
    """The newest revision and the stamp of an owner's rows; 0 and "" when there is none."""
    row = connection.execute(_MARK, {"of": owner}).first()
    return (row.head, row.stamp) if row else (0, "")


def records(connection: Connection, owner: str | None = None) -> list[PersonaRecord]:
    """All personas, or that one if it is there, in the order of their ids."""
    live = select(func.count()).where(
        memberships.c.owner == personas.c.owner, memberships.c.to_revision.is_(None)
    )
    query = select(personas, live.scalar_subquery().label("live"))
    found = connection.execute(query if owner is None else query.where(personas.c.owner == owner))
    known = [PersonaRecord(p.owner, p.kind, p.head, p.live, schema.from_column(p.created_at)) for p in found]
    return sorted(known, key=lambda persona: persona.id)  # a database's order is that of its language


def resolve(connection: Connection, owner: str, revision: int | None) -> int:
    """The revision that is meant: the newest for None, else a known one; 0 is the state before the first.

    Raises:
        NotFoundError: the owner has no such revision.
    """
    newest = head(connection, owner)
    if revision is None:
        return newest
    if isinstance(revision, bool) or not isinstance(revision, int) or not 0 <= revision <= newest:
        raise NotFoundError(
            f"No revision {revision} belongs to {owner!r}.", hint=f"Its newest revision is {newest}."
        )
    return revision


def advance(
    connection: Connection,
    owner: str,
    *,
    message: str,
    kind: str | None = None,
    parent: int | None = None,
    restores: int | None = None,
) -> int:
    """Append a revision and return its number. `kind` creates the persona when there is none.

    Raises:
        InvalidInputError: the persona is of another kind.
        NotFoundError: there is no such persona and no kind is given.
        RevisionConflictError: `parent` is given and is not the newest revision.
    """
    row = connection.execute(
        select(personas.c.kind, personas.c.head).where(personas.c.owner == owner)
    ).first()
    newest = row.head if row else 0
    if parent is not None and parent != newest:
        raise RevisionConflictError(
            f"The newest revision of {owner!r} is {newest}, not {parent}.", hint="Read it again, then retry."
        )
    if row is None:
        create(connection, owner, kind)
    elif kind is not None and row.kind != kind:
        raise InvalidInputError(f"{owner!r} is a {row.kind}.", hint=f"It cannot be committed to as a {kind}.")
    note = ciphers.writing(connection, owner).seal_message(newest + 1, message)
    values = {"number": newest + 1, "message": note, "created_at": schema.to_column(utc_now())}
    connection.execute(insert(revisions).values(owner=owner, restores=restores, **values))
    touch(connection, owner, head=newest + 1)
    return newest + 1


def create(connection: Connection, owner: str, kind: str | None) -> None:
    """Write the row of a new persona, at revision 0.

    Raises:
        InvalidInputError: `kind` is unknown, or the id of a user is in use as a group.
        NotFoundError: no kind is given.
    """
    if kind is None:
        raise NotFoundError(f"There is no persona {owner!r}.", hint="A persona begins with its first commit.")
    if kind not in ("user", "group"):
        raise InvalidInputError(f"{kind!r} is no kind of persona.", hint="Expected 'user' or 'group'.")
    named = select(group_memberships.c.seq).where(group_memberships.c.group_id == owner).limit(1)
    if kind == "user" and connection.execute(named).first():
        # Whoever listed this id as a group would otherwise read the new user's memory.
        raise InvalidInputError(f"{owner!r} is in use as a group.", hint="Choose another id for the user.")
    values = {"kind": kind, "head": 0, "stamp": "", "created_at": schema.to_column(utc_now())}
    connection.execute(insert(personas).values(owner=owner, **values))


def touch(connection: Connection, owner: str, **values: int) -> None:
    """Give the owner a new stamp: whatever was derived from its rows is stale."""
    stamp = uuid.uuid4().hex
    connection.execute(update(personas).where(personas.c.owner == owner).values(stamp=stamp, **values))


def live_ids(connection: Connection, owner: str, revision: int) -> list[str]:
    """Ids of the cubes that are live at a revision, oldest first."""
    joined = memberships.join(schema.cubes)
    query = select(memberships.c.cube_id).select_from(joined).where(live_at(memberships, owner, revision))
    return list(connection.execute(query.order_by(schema.cubes.c.seq)).scalars())


def group_ids(connection: Connection, owner: str, revision: int) -> list[str]:
    """Groups the owner belongs to at a revision, in the order they were given."""
    table = group_memberships
    query = select(table.c.group_id).where(live_at(table, owner, revision)).order_by(table.c.seq)
    return list(connection.execute(query).scalars())


def open_cubes(connection: Connection, owner: str, ids: Iterable[str], number: int) -> None:
    """Make cubes live from revision `number` on."""
    rows = [{"owner": owner, "cube_id": cube_id, "from_revision": number} for cube_id in ids]
    if rows:
        connection.execute(insert(memberships), rows)


def close_cubes(connection: Connection, owner: str, ids: Sequence[str], number: int) -> None:
    """End the live interval of cubes at revision `number`.

    Raises:
        NotFoundError: one of them is not live.
    """
    _close(connection, memberships, memberships.c.cube_id.name, owner, ids, number)


def _close(
    connection: Connection, table: Table, key: str, owner: str, ids: Sequence[str], number: int
) -> None:
    for name in ids:
        rows = (table.c.owner == owner) & (table.c[key] == name) & table.c.to_revision.is_(None)
        if not connection.execute(update(table).where(rows).values(to_revision=number)).rowcount:
            raise NotFoundError(
                f"No live cube {name!r:.60} belongs to {owner!r}.", hint="Nothing was committed."
            )


def set_groups(connection: Connection, owner: str, groups: Iterable[str], number: int) -> None:
    """Make `groups`, in this order, the owner's groups from revision `number` on.

    Raises:
        InvalidInputError: a group is the owner itself, or a user.
    """
    wanted = list(dict.fromkeys(validate_id(group, "group id") for group in groups))
    for group in wanted:
        require_group(connection, owner, group)
    have = group_ids(connection, owner, number)
    # Intervals are read in the order they were opened, so the groups after the first difference are reopened.
    same = next((i for i, pair in enumerate(zip(have, wanted, strict=False)) if pair[0] != pair[1]), None)
    keep = min(len(have), len(wanted)) if same is None else same
    _close(connection, group_memberships, "group_id", owner, have[keep:], number)
    rows = [{"owner": owner, "group_id": group, "from_revision": number} for group in wanted[keep:]]
    if rows:
        connection.execute(insert(group_memberships), rows)


def require_group(connection: Connection, owner: str, group: str) -> None:
    """Check that `owner` may belong to `group`, which need not exist yet.

    Raises:
        InvalidInputError: it is the owner itself, or a user.
    """
    if owner == group:
        raise InvalidInputError(
            f"{owner!r} cannot be a group of itself.", hint="Use another id for the group."
        )
    if connection.execute(select(personas.c.kind).where(personas.c.owner == group)).scalar() == "user":
        raise InvalidInputError(f"{group!r} is a user.", hint="Only a group can be joined.")


def restore(connection: Connection, owner: str, revision: int) -> int:
    """Append a revision whose live cubes and groups are those of `revision`; return its number."""
    target = resolve(connection, owner, revision)
    now = head(connection, owner)
    number = advance(connection, owner, message=f"rollback to {target}", restores=target)
    want, have = live_ids(connection, owner, target), live_ids(connection, owner, now)
    close_cubes(connection, owner, [cube_id for cube_id in have if cube_id not in set(want)], number)
    open_cubes(connection, owner, [cube_id for cube_id in want if cube_id not in set(have)], number)
    set_groups(connection, owner, group_ids(connection, owner, target), number)
    return number


def history(connection: Connection, owner: str, *, since: int = 0) -> list[Revision]:
    """The revisions after number `since`, oldest first."""
    query = select(revisions).where(revisions.c.owner == owner, revisions.c.number > since)
    found = connection.execute(query.order_by(revisions.c.number)).all()
    rolled_back = any(row.restores is not None for row in found)
    kept = _spans(connection, memberships, owner, since)
    buried = _spans(connection, tombstones, owner, 0 if rolled_back else since)  # `gone` asks about all
    added: dict[int, list[str]] = defaultdict(list)
    retired: dict[int, list[str]] = defaultdict(list)
    for row in (*kept, *buried):
        added[row.from_revision].append(row.cube_id)
        retired[row.to_revision].append(row.cube_id)

    def gone(row_number: int, restores: int | None) -> tuple[str, ...]:
        if restores is None:
            return ()
        then = [b.cube_id for b in buried if b.from_revision <= restores < b.to_revision]
        still = {b.cube_id for b in buried if b.from_revision <= row_number < b.to_revision}
        return tuple(cube_id for cube_id in then if cube_id not in still)

    cipher = ciphers.reading(connection, owner)
    return [
        Revision(
            owner=owner,
            number=row.number,
            parent=row.number - 1,
            message=cipher.open_message(row.number, row.message),
            created_at=schema.from_column(row.created_at),
            added=tuple(added[row.number]),
            retired=tuple(retired[row.number]),
            restores=row.restores,
            gone=gone(row.number, row.restores),
        )
        for row in found
    ]


def _spans(connection: Connection, table: Table, owner: str, since: int) -> Sequence[Any]:
    """The owner's rows of an interval table that begin or end after revision `since`."""
    recent = or_(table.c.from_revision > since, table.c.to_revision > since)
    return connection.execute(select(table).where(table.c.owner == owner, recent).order_by("seq")).all()
