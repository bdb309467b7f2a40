"""The time machine: names for revisions, and looking at a persona as it was.

Two times are apart. `as_of` picks a revision, that is, what was *recorded* by then: the newest whose commit
is not later. `MemoryView.cubes(valid_at=...)` picks among its cubes those whose statement was *valid* in the
world at some time. "What did we believe on day D about day E" is ``as_of(D).cubes(valid_at=E)``.

A view shows content as it was and states of life as they are now. What has been forgotten is gone from all
views.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeAlias, runtime_checkable

from sqlalchemy import Connection, func, insert, select

from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import events, revisions
from persona_sdk.memory.core import StoreCore
from persona_sdk.memory.cube import MemCube, aware, hashed, utc_now
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.schema import from_column, snapshots, to_column
from persona_sdk.memory.schema import revisions as revision_rows

When: TypeAlias = datetime | int | str


@dataclass(frozen=True)
class Snapshot:
    """A name for a revision of an owner."""

    owner: str
    name: str
    revision: int
    at: datetime


@runtime_checkable
class Recaller(Protocol):
    """What a view needs of a retriever. `persona_sdk.memory.Retriever` is one."""

    def recall(
        self, owners: Sequence[str], query: str, k: int = 5, revisions: Mapping[str, int] | None = None
    ) -> list[Any]:
        """The best passages at the given revisions."""
        ...


@dataclass(frozen=True)
class MemoryView:
    """A persona at one revision, to be read only. ``at`` is the time that was asked for, if one was."""

    owner: str
    revision: int
    at: datetime | None
    _store: StoreReader = field(repr=False, compare=False)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups it belonged to."""
        return self._store.groups(self.owner, revision=self.revision)

    def cubes(self, kind: str | None = None, *, valid_at: datetime | None = None) -> list[MemCube]:
        """The cubes that were live, oldest first; those whose statement holds at `valid_at`, if given."""
        moment = None if valid_at is None else aware(valid_at)
        found = self._store.cubes(self.owner, revision=self.revision, kind=kind)
        return [cube for cube in found if moment is None or cube.header.valid(moment)]

    def recall(self, retriever: Recaller, query: str, k: int = 5) -> list[Any]:
        """Search what was live, with the retriever of the same store."""
        return retriever.recall([self.owner], query, k, revisions={self.owner: self.revision})


def snapshot(store: StoreCore, owner: str, name: str) -> Snapshot:
    """Name the newest revision.

    Raises:
        InvalidInputError: the name is taken, or is none: it follows the rules of ids and is not all digits.
        NotFoundError: there is no such persona.
    """
    if validate_id(name, "snapshot name").isdigit():
        raise InvalidInputError(f"{name!r:.60} would read as a revision.", hint="Put a letter into the name.")
    with store.writing(owner) as connection:
        number = revisions.head(connection, owner)
        if not number:
            raise NotFoundError(
                f"There is no persona {owner!r}.", hint="A persona begins with its first commit."
            )
        if _named(connection, owner, name) is not None:
            raise InvalidInputError(f"There is a snapshot {name!r} already.", hint="Choose another name.")
        found = Snapshot(owner, name, number, utc_now())
        values = {"owner": owner, "name": name, "revision": number, "at": to_column(found.at)}
        connection.execute(insert(snapshots).values(**values))
        events.append(connection, owner, "snapshot", {"snapshots": {hashed(name): number}})
        return found


def read(connection: Connection, owner: str) -> list[Snapshot]:
    """The snapshots of an owner, oldest revision first."""
    query = select(snapshots).where(snapshots.c.owner == owner)
    found = connection.execute(query.order_by(snapshots.c.revision, snapshots.c.at))
    return [Snapshot(row.owner, row.name, row.revision, from_column(row.at)) for row in found]


def resolve(connection: Connection, owner: str, when: When) -> int:
    """The revision that is meant by a number, the name of a snapshot, or a time.

    Raises:
        InvalidInputError: a time without a time zone.
        NotFoundError: the owner has no such revision or snapshot.
    """
    if isinstance(when, datetime):
        table, moment = revision_rows, to_column(aware(when))
        query = select(func.max(table.c.number)).where(table.c.owner == owner, table.c.created_at <= moment)
        return connection.execute(query).scalar() or 0
    if isinstance(when, str):
        found = _named(connection, owner, when)
        if found is None:
            raise NotFoundError(
                f"No snapshot {when!r:.60} belongs to {owner!r}.", hint="See the list of snapshots."
            )
        return found
    return revisions.resolve(connection, owner, when)


def as_of(store: StoreReader, owner: str, when: When) -> MemoryView:
    """See `MemoryStore.as_of`."""
    with store.reading() as connection:
        number = resolve(connection, owner, when)
    return MemoryView(owner, number, when if isinstance(when, datetime) else None, store)


def _named(connection: Connection, owner: str, name: str) -> int | None:
    query = select(snapshots.c.revision).where(snapshots.c.owner == owner, snapshots.c.name == name)
    return connection.execute(query).scalar()
