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

import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from sqlalchemy import Connection, delete, func, insert, select, update

from persona_sdk import files
from persona_sdk.errors import NotFoundError, StoreError
from persona_sdk.memory import derived, events, governance, lifecycle, revisions, signing
from persona_sdk.memory.cube import hashed, utc_now
from persona_sdk.memory.derived import Derived
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.receipt import Receipt
from persona_sdk.memory.rows import chunks, lookup, owned
from persona_sdk.memory.schema import (
    BY_CUBE,
    BY_OWNER,
    FORGOTTEN,
    ByteLength,
    cubes,
    erasures,
    group_memberships,
    memberships,
    personas,
    sources,
    to_column,
    tombstones,
    vectors,
)
from persona_sdk.memory.schema import events as event_rows
from persona_sdk.memory.schema import revisions as revision_rows
from persona_sdk.tensors import Digest

PENDING = "erasing-*.pending"

_CubeKey = tuple[str, str]  # owner, cube id


@dataclass
class _Tally:
    """What the transaction erased, counted while it did."""

    rows: int = 0
    vectors: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Erased:
    """An erasure whose rows and files are gone, and what is left to do: scrub, sign, tell."""

    receipt: Receipt
    note: Path
    told: list[Derived]


def forget(store: StoreReader, owner: str, ids: Sequence[str]) -> Receipt:
    """See `MemoryStore.forget`."""

    def chosen(connection: Connection) -> list[str]:
        found = owned(connection, owner, ids)
        if missing := [cube_id for cube_id in ids if cube_id not in found]:
            raise NotFoundError(
                f"No cube {missing[0]!r:.60} belongs to {owner!r}.", hint="Nothing was erased."
            )
        if not ids:
            raise NotFoundError("No cube to forget was named.", hint="Nothing was erased.")
        return _with_parents(connection, owner, ids)

    return _finished(store, [_erase(store, owner, chosen, everything=False)])[0]


def forget_everything(store: StoreReader, owner: str) -> Receipt:
    """See `MemoryStore.forget_everything`."""

    def chosen(connection: Connection) -> list[str]:
        if not revisions.head(connection, owner):
            raise NotFoundError(f"There is no persona {owner!r}.", hint="Nothing was erased.")
        return list(connection.execute(select(cubes.c.id).where(cubes.c.owner == owner)).scalars())

    return _finished(store, [_erase(store, owner, chosen, everything=True)])[0]


def expire(store: StoreReader, chosen: Mapping[str, Callable[[Connection], Iterable[str]]]) -> list[Receipt]:
    """For `persona_sdk.memory.expiry`: erase of each owner what is chosen in the owner's transaction."""

    def erase(owner: str, choose: Callable[[Connection], Iterable[str]]) -> _Erased:
        def all_versions(connection: Connection) -> list[str]:
            return _with_parents(connection, owner, list(choose(connection)))

        return _erase(store, owner, all_versions, everything=False, expired=True)

    return _finished(store, [erase(owner, choose) for owner, choose in chosen.items()])


def reach(connection: Connection, owner: str, ids: Sequence[str]) -> dict[str, list[str]]:
    """What goes when these cubes go, by owner: earlier versions, and everything derived from any of them."""
    versions = _with_parents(connection, owner, ids)
    return _with_derived(connection, [(owner, cube_id) for cube_id in versions])


def _erase(
    store: StoreReader,
    owner: str,
    chosen: Callable[[Connection], list[str]],
    *,
    everything: bool,
    expired: bool = False,
) -> _Erased:
    at, tally = utc_now(), _Tally()
    signing.require_key(store.folder)
    with store.writing() as connection, _pending(store.folder) as note:
        asked = chosen(connection)
        by_owner = _with_derived(connection, [(owner, cube_id) for cube_id in asked])
        lifecycle.require_erasable(connection, by_owner, owner)
        told = derived.collect(connection, by_owner, {(owner, cube_id) for cube_id in asked})
        blobs = {blob for who, ids in by_owner.items() for blob in _blobs_of(connection, who, ids)}
        store.vault.suspect(blobs)  # or a crash after the transaction would leave them for good
        for who, ids in by_owner.items():
            if everything and who == owner:
                continue
            number = revisions.advance(connection, who, message="expire" if expired else "forget")
            _bury(connection, who, ids, number, at, tally, reason="expired" if expired else "forgotten")
            # Others learn that something of theirs is gone, not who asked for it.
            actor = None if who == owner else events.SYSTEM
            events.append(connection, who, "expire" if expired else "forget", {"erased": ids}, actor=actor)
        if everything:
            _remove_persona(connection, owner, by_owner.get(owner, []), at, tally)
    store.announce({owner, *by_owner})
    deleted: dict[Digest, int] = {}
    complete = True
    try:
        deleted = store.drop_unnamed(sorted(blobs))
    except StoreError:  # the rows are gone already, so say what is left instead of losing the receipt
        complete = False
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
        scrubbed=complete,
        retrainable=derived.retrainable(told),
    )
    return _Erased(receipt, note, told)


def _finished(store: StoreReader, erased: Sequence[_Erased]) -> list[Receipt]:
    """Make the bytes go, once for all of them; sign what was done, and tell who listens."""
    scrubbed, receipts = bool(erased) and store.scrub(), []
    for one in erased:
        done = scrubbed and one.receipt.scrubbed
        if done:
            one.note.unlink(missing_ok=True)
        receipts.append(replace(one.receipt, scrubbed=done).signed(store.folder))
    for one in erased:
        store.announce_derived(one.told)
    return receipts


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
            for part in chunks(ids):
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


def _blobs_of(connection: Connection, owner: str, ids: Sequence[str]) -> set[Digest]:
    query = select(cubes.c.blob).where(cubes.c.owner == owner, cubes.c.blob.is_not(None))
    return {
        blob
        for part in chunks(ids)
        for blob in connection.execute(query.where(cubes.c.id.in_(part))).scalars()
    }


def _bury(
    connection: Connection,
    owner: str,
    ids: Sequence[str],
    number: int,
    at: datetime,
    tally: _Tally,
    reason: str,
) -> None:
    """Replace cubes by tombstones whose open intervals end at revision `number`."""
    table = memberships
    for part in chunks(ids):
        mine = (table.c.owner == owner) & table.c.cube_id.in_(part)
        spans = connection.execute(select(table).where(mine).order_by(table.c.seq)).all()
        stones = [
            {
                "owner": owner,
                "cube_id": span.cube_id,
                "at": to_column(at),
                "from_revision": span.from_revision,
                "to_revision": number if span.to_revision is None else span.to_revision,
                "reason": reason,
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


def _delete_cubes(connection: Connection, owner: str, ids: Sequence[str], tally: _Tally) -> None:
    """Delete cubes with all rows that hang on them, and count."""
    text = func.coalesce(cubes.c.text, "")
    size = func.coalesce(func.sum(ByteLength(cubes.c.header) + ByteLength(text)), 0)
    for part in chunks(ids):
        mine = (cubes.c.owner == owner) & cubes.c.id.in_(part)
        tally.bytes += connection.execute(select(size).where(mine)).scalar_one()
        for table in BY_CUBE:
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
    governance.withdraw(connection, owner)
    # The persona goes before its events: those of one that is there cannot be deleted.
    for table in (*BY_OWNER, personas, event_rows):
        tally.rows += connection.execute(delete(table).where(table.c.owner == owner)).rowcount
    # Whoever makes a group of this name later must not find the old members in it.
    members = group_memberships.c.group_id == owner
    for member in set(connection.execute(select(group_memberships.c.owner).where(members)).scalars()):
        revisions.touch(connection, member)
        events.append(connection, member, "group_erased", actor=events.SYSTEM)
    tally.rows += connection.execute(delete(group_memberships).where(members)).rowcount
    counts = {"cubes": len(ids), "vectors": tally.vectors, "revisions": count}
    persona = hashed(owner)
    values = {"owner": persona, "at": to_column(at), "counts": json.dumps(counts)}
    connection.execute(insert(erasures).values(**values))
    events.append(connection, events.STORE, "erase", {"persona": persona, **counts})
