"""A store's database in PostgreSQL, by URL; blobs stay in a folder.

    postgresql+psycopg://user@host/database?options=-csearch_path%3Dschema&blobs=/srv/personas

A reader is one ``REPEATABLE READ, READ ONLY`` transaction. A writer takes advisory locks that end with its
transaction, and reads what is committed then:

    writing one owner     the store's lock shared, the owner's lock alone, also before the owner has a row
    writing any owner     the store's lock alone: erasing, sweeping, joining groups

The tables lie in the first schema of the search path. Migrations run once, under the store's lock, in one
transaction. No copy is made before: that is ``pg_dump``, and the administrator's. So is durability, as far
as ``fsync`` and ``synchronous_commit`` are set on the server.

The blobs' folder is the argument ``blobs``, else that of the URL, else one in the user's data folder that
is named by the database. Every process of a store needs the same one. A file in it names the database it
belongs to, because sweeping with another database's rows would delete its blobs.

`PostgreSQL.scrub` vacuums. Erased rows are then unreachable for every client, and it says so; it cannot
speak for bytes in free space of the server's pages, for its log and archives of it, replicas and dumps.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from persona_sdk import files
from persona_sdk.errors import InvalidInputError, StoreError
from persona_sdk.memory.database import Database, newest_version, require_known, translated, upgrade
from persona_sdk.memory.schema import metadata

MARKER = "database.id"

_LABEL = re.compile(r"persona-sdk store ([0-9a-f]{32})")
_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
_SHARED = text("SELECT pg_advisory_xact_lock_shared(:store), pg_advisory_xact_lock(:owner)")
_ALONE = text("SELECT pg_advisory_xact_lock(:store)")
_DEAD = text(
    "SELECT coalesce(sum(n_dead_tup), 0) FROM pg_stat_all_tables WHERE schemaname = current_schema()"
    " AND relname = ANY(:names)"
)


def is_url(place: object) -> bool:
    """Whether a store's place is a URL rather than a folder."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", place) is not None


class PostgreSQL(Database):
    """The tables of one schema of a PostgreSQL database."""

    def __init__(self, engine: Engine, folder: Path, schema: str) -> None:
        super().__init__(engine, folder)
        self._schema = schema
        self._snapshot = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._outside = engine.execution_options(isolation_level="AUTOCOMMIT")

    @classmethod
    def open(cls, place: str, *, blobs: Path | None, busy_timeout: float) -> Self:
        """Connect, migrate, and find the folder of the blobs, creating it if it is missing.

        Raises:
            InvalidInputError: the URL is none of PostgreSQL's, or psycopg is missing.
            SchemaError: the schema is newer than this code, or no store's; it was not changed.
            StoreUnavailableError: the server cannot be reached.
            StoreError: it refuses, or the folder belongs to another database.
        """
        url = _parse(place)
        named = url.query.get("blobs")
        chosen = blobs or (Path(str(named)) if named else None)
        engine = _engine(url.difference_update_query(["blobs"]), busy_timeout)
        try:
            with translated(chosen or Path(MARKER)):
                with engine.begin() as connection:
                    schema = _prepared(connection)
                    identity = _identity(connection)
                folder = chosen or _data_folder() / "persona_sdk" / "stores" / identity
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _bind(folder, identity)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, folder, schema)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """See `Database.reading`."""
        with self._snapshot.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self, owner: str | None = None) -> Iterator[Connection]:
        """See `Database.writing`."""
        # At READ COMMITTED, so that what was committed while we waited for the lock is seen.
        with self.engine.begin() as connection:
            store = {"store": _key(self._schema)}
            if owner is None:
                connection.execute(_ALONE, store)
            else:
                connection.execute(_SHARED, store | {"owner": _key(self._schema, owner)})
            yield connection

    def scrub(self) -> bool:
        """Vacuum all tables; False while anybody may still see an erased row, or without the right to."""
        names = list(metadata.tables)
        try:
            with self._outside.connect() as connection:
                connection.exec_driver_sql(f"VACUUM (INDEX_CLEANUP ON) {', '.join(names)}")
                return int(connection.execute(_DEAD, {"names": names}).scalar_one()) == 0
        except DBAPIError:
            return False


def _parse(place: str) -> URL:
    try:
        url = make_url(place)
    except (ArgumentError, ValueError) as error:
        raise InvalidInputError("The store's URL cannot be read.", hint=_EXPECTED) from error
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise InvalidInputError(f"{url.drivername!r:.40} is no kind of store.", hint=_EXPECTED)
    return url.set(drivername="postgresql+psycopg")


_EXPECTED = "Expected a folder, or postgresql+psycopg://user@host/database."


def _engine(url: URL, busy_timeout: float) -> Engine:
    # Without hide_parameters an error's text would quote what somebody wanted remembered.
    try:
        engine = create_engine(url, hide_parameters=True, isolation_level="READ COMMITTED")
    except ImportError as error:
        raise InvalidInputError(
            "A store in PostgreSQL needs psycopg.", hint='Run: pip install "persona-sdk[scale]"'
        ) from error

    @event.listens_for(engine, "connect")
    def prepare(connection: object, _: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute(f"SET lock_timeout = {max(int(busy_timeout * 1000), 1)}")
        cursor.execute("SET client_encoding = 'UTF8'")
        connection.commit()  # type: ignore[attr-defined]

    return engine


def _key(*parts: str) -> int:
    """A name as the number of an advisory lock. Two names of one number only wait for each other."""
    packed = "\0".join(("persona-sdk", *parts)).encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), signed=True)


def _prepared(connection: Connection) -> str:
    """Migrate the current schema if it needs that, and return its name."""
    schema = connection.exec_driver_sql("SELECT current_schema()").scalar()
    if schema is None:
        raise StoreError(
            "The URL's search path names no schema that exists.", hint="Run CREATE SCHEMA first."
        )
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding != "UTF8":
        raise StoreError(f"The database's encoding is {encoding}.", hint="Create it with ENCODING 'UTF8'.")
    if _version(connection) != newest_version():
        connection.execute(_ALONE, {"store": _key(schema)})
        found = _version(connection)  # again: another process may have migrated while we waited
        if found is not None:
            require_known(found, "The database")
        if found != newest_version():
            _migrate(connection)
    return str(schema)


def _migrate(connection: Connection) -> None:
    try:
        with translated(Path(MARKER)):
            upgrade(connection)
    except StoreError as error:
        hint = "The schema stays as it was. A copy from before a migration is the administrator's: pg_dump."
        raise type(error)(error.message, hint=hint) from error


def _version(connection: Connection) -> str | None:
    """The schema's version, "" when the tables are somebody else's, None when there is none."""
    tables = set(connection.exec_driver_sql(_TABLES).scalars())
    if "alembic_version" not in tables:
        return "" if tables else None
    return str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() or "")


def _identity(connection: Connection) -> str:
    """What names this store, in dumps of the database too: a comment on one of its tables."""
    query = "SELECT obj_description('alembic_version'::regclass, 'pg_class')"
    if found := _LABEL.fullmatch(connection.exec_driver_sql(query).scalar() or ""):
        return found[1]
    connection.exec_driver_sql("LOCK TABLE alembic_version IN EXCLUSIVE MODE")
    if found := _LABEL.fullmatch(connection.exec_driver_sql(query).scalar() or ""):
        return found[1]  # another process opened it while we waited
    identity = uuid.uuid4().hex
    connection.exec_driver_sql(f"COMMENT ON TABLE alembic_version IS 'persona-sdk store {identity}'")
    return identity


def _bind(folder: Path, identity: str) -> None:
    """Make sure that a folder's blobs are those of this database.

    Raises:
        StoreError: they are not.
    """
    marker = folder / MARKER
    if not marker.exists():
        if (folder / "personas.db").exists() or any((folder / "blobs").glob("*/*")):
            raise StoreError(
                f"{folder.name!r} holds the blobs of another store.", hint="Choose an empty folder."
            )
        files.write_atomically(marker, identity.encode())
    if marker.read_text() != identity:
        raise StoreError(
            f"{folder.name!r} holds the blobs of another database.",
            hint=f"Choose another folder; or remove {MARKER}, after restoring a copy of that database.",
        )


def _data_folder() -> Path:
    shared = os.environ.get("XDG_DATA_HOME", "")
    return Path(shared) if os.path.isabs(shared) else Path.home() / ".local" / "share"
