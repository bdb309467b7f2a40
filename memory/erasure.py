"""Forgetting: erase cubes, everything derived from them, and the bytes.

One transaction replaces the rows of the cubes, and of all cubes that name them as sources, transitively
and whoever owns them, by tombstones (id, time, the revisions it was live in). Messages of revisions that
added or retired one of them are blanked, since a caller may have put anything there. Each owner concerned
gets a revision ``forget``. Then blob files that nobody names any more are deleted, copies of the database
from before a migration too, and what SQLite and its WAL keep of the rows is overwritten. In an encrypted
store the key of an erased persona is gone too, and with it what backups elsewhere hold of that persona.

The transaction leaves a file ``erasing-*.pending``, which goes when all of that is done. After a crash the
next `MemoryStore.open` finds it and does the rest.
"""

import hashlib
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, LargeBinary, cast, delete, func, insert, select, update

from persona_sdk import files
from persona_sdk.errors import NotFoundError, StoreError
from persona_sdk.memory import derived, revisions, signing
from persona_sdk.memory.cube import utc_now
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.receipt import Receipt
from persona_sdk.memory.rows import CHUNK, lookup
from persona_sdk.memory.schema import (
    cubes,
    erasures,
    events,
    grants,
    group_memberships,
    keys,
    memberships,
    pending,
    personas,
    snapshots,
    sources,
    states,
    to_column,
    tombstones,
    uses,
    vectors,
)
from persona_sdk.memory.schema import revisions as revision_rows
from persona_sdk.tensors import Digest

FORGOTTEN = "(forgotten)"
PENDING = "erasing-*.pending"

_CubeKey = tuple[str, str]  # owner, cube id


@dataclass
class _Tally:
    """What the transaction erased, counted while it did."""

    rows: int = 0
    vectors: int = 0
    bytes: int = 0


def forget(store: StoreReader, owner: str, ids: Sequence[str]) -> Receipt:
    """See `MemoryStore.forget`."""

    def chosen(connection: Connection) -> list[str]:
        found = set(_select_in(connection, owner, ids))
        if missing := [cube_id for cube_id in ids if cube_id not in found]:
            raise NotFoundError(
                f"No cube {missing[0]!r:.60} belongs to {owner!r}.", hint="Nothing was erased."
            )
        if not ids:
            raise NotFoundError("No cube to forget was named.", hint="Nothing was erased.")
        return _with_parents(connection, owner, ids)

    return _erase(store, owner, chosen, everything=False)


def forget_everything(store: StoreReader, owner: str) -> Receipt:
    """See `MemoryStore.forget_everything`."""

    def chosen(connection: Connection) -> list[str]:
        if not revisions.head(connection, owner):
            raise NotFoundError(f"There is no persona {owner!r}.", hint="Nothing was erased.")
        return list(connection.execute(select(cubes.c.id).where(cubes.c.owner == owner)).scalars())

    return _erase(store, owner, chosen, everything=True)


def _erase(
    store: StoreReader, owner: str, chosen: Callable[[Connection], list[str]], *, everything: bool
) -> Receipt:
    at, tally = utc_now(), _Tally()
    signing.require_key(store.folder)
    with store.writing() as connection, _pending(store.folder) as pending_file:
        asked = chosen(connection)
        by_owner = _with_derived(connection, [(owner, cube_id) for cube_id in asked])
        told = derived.collect(connection, by_owner, {(owner, cube_id) for cube_id in asked})
        blobs = {blob for who, ids in by_owner.items() for blob in _blobs_of(connection, who, ids)}
        for who, ids in by_owner.items():
            if everything and who == owner:
                continue
            number = revisions.advance(connection, who, message="forget")
            _bury(connection, who, ids, number, at, tally)
        if everything:
            _remove_persona(connection, owner, by_owner.get(owner, []), at, tally)
    store.announce({owner, *by_owner})
    deleted: dict[Digest, int] = {}
    complete = True
    try:
        deleted = store.drop_unnamed(sorted(blobs))
    except StoreError:  # the rows are gone already, so say what is left instead of losing the receipt
        complete = False
    scrubbed = store.scrub() and complete
    if scrubbed:
        pending_file.unlink(missing_ok=True)
    gone = list(dict.fromkeys([*asked, *(cube_id for ids in by_owner.values() for cube_id in ids)]))
    receipt = Receipt(
        owner=owner,
        at=at,
        everything=everything,
        cube_ids=tuple(gone),
        derived=len(gone) - len(asked),
        rows=tally.rows,
        vectors=tally.vectors,
        blobs=tuple(deleted),
        bytes=tally.bytes + sum(deleted.values()),
        scrubbed=scrubbed,
        retrainable=derived.retrainable(told),
    ).signed(store.folder)
    store.announce_derived(told)
    return receipt


@contextmanager
def _pending(folder: Path) -> Iterator[Path]:
    """Note, within the transaction, that an erasure is not finished; the note goes with a failed one."""
    note = folder / PENDING.replace("*", uuid.uuid4().hex)
    files.write_atomically(note, b"")
    try:
        yield note
    except BaseException:
        note.unlink(missing_ok=True)
        raise


def resume(store: StoreReader) -> None:
    """Finish the erasures of processes that were killed, when a store is opened."""
    if not any(store.folder.glob(PENDING)):
        return
    with store.writing():  # whoever is erasing now has noted it in the transaction that we wait for
        found = list(store.folder.glob(PENDING))
    if store.scrub():
        for note in found:
            note.unlink(missing_ok=True)


def _with_parents(connection: Connection, owner: str, ids: Sequence[str]) -> list[str]:
    """The cubes and all earlier versions of them that are still there."""
    found: dict[str, None] = {}
    todo = list(ids)
    while todo:
        cubes_then = lookup(connection, owner, todo)
        found |= dict.fromkeys(cubes_then)
        todo = [name for cube in cubes_then.values() for name in cube.header.parents if name not in found]
    return list(found)


def _with_derived(connection: Connection, start: Iterable[_CubeKey]) -> dict[str, list[str]]:
    """The cubes and everything derived from them, by owner."""
    found: dict[_CubeKey, None] = dict.fromkeys(start)
    todo = list(found)
    while todo:
        fresh: dict[_CubeKey, None] = {}
        for owner, ids in _grouped(todo).items():
            for part in _chunks(ids):
                named = (sources.c.source_owner == owner) & sources.c.source_id.in_(part)
                query = select(sources.c.owner, sources.c.cube_id).where(named)
                fresh |= {(row.owner, row.cube_id): None for row in connection.execute(query)}
        todo = [key for key in fresh if key not in found]
        found |= dict.fromkeys(todo)
    return _grouped(found)


def _grouped(keys: Iterable[_CubeKey]) -> dict[str, list[str]]:
    by_owner: dict[str, list[str]] = defaultdict(list)
    for owner, cube_id in keys:
        by_owner[owner].append(cube_id)
    return by_owner


def _chunks(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))


def _select_in(connection: Connection, owner: str, ids: Sequence[str]) -> list[str]:
    query = select(cubes.c.id).where(cubes.c.owner == owner)
    return [
        i for part in _chunks(ids) for i in connection.execute(query.where(cubes.c.id.in_(part))).scalars()
    ]


def _blobs_of(connection: Connection, owner: str, ids: Sequence[str]) -> set[Digest]:
    query = select(cubes.c.blob).where(cubes.c.owner == owner, cubes.c.blob.is_not(None))
    return {
        b for part in _chunks(ids) for b in connection.execute(query.where(cubes.c.id.in_(part))).scalars()
    }


def _bury(
    connection: Connection, owner: str, ids: Sequence[str], number: int, at: datetime, tally: _Tally
) -> None:
    """Replace cubes by tombstones whose open intervals end at revision `number`."""
    table = memberships
    for part in _chunks(ids):
        mine = (table.c.owner == owner) & table.c.cube_id.in_(part)
        spans = connection.execute(select(table).where(mine).order_by(table.c.seq)).all()
        stones = [
            {
                "owner": owner,
                "cube_id": span.cube_id,
                "at": to_column(at),
                "from_revision": span.from_revision,
                "to_revision": number if span.to_revision is None else span.to_revision,
            }
            for span in spans
        ]
        connection.execute(insert(tombstones), stones)
        touched = {stone["from_revision"] for stone in stones} | {span.to_revision for span in spans}
        numbers = revision_rows.c.number
        written = (
            (revision_rows.c.owner == owner) & numbers.in_(touched - {None}) & (revision_rows.c.message != "")
        )
        connection.execute(update(revision_rows).where(written, numbers != number).values(message=FORGOTTEN))
    _delete_cubes(connection, owner, ids, tally)


def _byte_length(column: Any) -> Any:
    return func.length(cast(column, LargeBinary))


def _delete_cubes(connection: Connection, owner: str, ids: Sequence[str], tally: _Tally) -> None:
    """Delete cubes with all rows that hang on them, and count."""
    size = func.coalesce(
        func.sum(_byte_length(cubes.c.header) + _byte_length(func.coalesce(cubes.c.text, ""))), 0
    )
    for part in _chunks(ids):
        mine = (cubes.c.owner == owner) & cubes.c.id.in_(part)
        tally.bytes += connection.execute(select(size).where(mine)).scalar_one()
        for table in (memberships, sources, vectors, states, uses, grants, pending):
            hanging = (table.c.owner == owner) & table.c.cube_id.in_(part)
            if table is vectors:
                lengths = select(func.coalesce(func.sum(func.length(vectors.c.data)), 0)).where(hanging)
                tally.bytes += connection.execute(lengths).scalar_one()
            count = connection.execute(delete(table).where(hanging)).rowcount
            tally.rows += count
            tally.vectors += count if table is vectors else 0
        tally.rows += connection.execute(delete(cubes).where(mine)).rowcount


def _remove_persona(
    connection: Connection, owner: str, ids: Sequence[str], at: datetime, tally: _Tally
) -> None:
    """Delete every row of a persona and leave counts under the hash of its id."""
    _delete_cubes(connection, owner, ids, tally)
    count = connection.execute(select(func.count()).where(revision_rows.c.owner == owner)).scalar_one()
    for table in (tombstones, group_memberships, snapshots, events, keys, revision_rows, personas):
        tally.rows += connection.execute(delete(table).where(table.c.owner == owner)).rowcount
    # Whoever makes a group of this name later must not find the old members in it.
    members = group_memberships.c.group_id == owner
    for member in set(connection.execute(select(group_memberships.c.owner).where(members)).scalars()):
        revisions.touch(connection, member)
    tally.rows += connection.execute(delete(group_memberships).where(members)).rowcount
    counts = {"cubes": len(ids), "vectors": tally.vectors, "revisions": count}
    hashed = hashlib.sha256(owner.encode()).hexdigest()
    values = {"owner": hashed, "at": to_column(at), "counts": json.dumps(counts)}
    connection.execute(insert(erasures).values(**values))
