"""A store's database as one SQLite file in WAL mode.

Transactions are begun here, not by the driver: ``BEGIN`` for a reader, ``BEGIN IMMEDIATE`` for a writer,
so that a writer holds SQLite's one write lock, across processes, from its first statement on. Threads of
one process wait for each other here, because SQLite's own waiting is polling.

Checkpoints are made by `persona_sdk.memory.checkpoint`, so that erased bytes go in time that depends on what
changed. A file of an older schema is copied before it is migrated.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import URL, Connection, Engine, create_engine, event

from persona_sdk import files
from persona_sdk.memory.checkpoint import checkpoint, compact, keep_clean
from persona_sdk.memory.database import (
    BACKUP_GLOB,
    Database,
    newest_version,
    require_known,
    translated,
    upgrade,
)
from persona_sdk.memory.database_errors import sqlite_code

_PRAGMAS = (
    "foreign_keys=ON",
    "secure_delete=ON",
    "synchronous=FULL",
    "temp_store=MEMORY",
    "wal_autocheckpoint=0",
)
_COMPACT_PAGES, _COMPACT_SHARE = 4096, 0.25  # given back at a time; free before an old file is rewritten


class SQLite(Database):
    """The file ``personas.db`` of a folder."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        super().__init__(engine, folder)
        self._immediate = engine.execution_options(immediate=True)
        self._lock = threading.RLock()

    @classmethod
    def open(cls, folder: Path, *, busy_timeout: float) -> Self:
        """Open and migrate the database of `folder`, creating it if it is missing.

        Raises:
            SchemaError: its schema is newer than this code, or it is no store; it was not changed.
            StoreError: it cannot be opened or written, or it is damaged.
        """
        file = folder / "personas.db"
        with translated(file):
            found = _version_on_disk(file)
            if found is not None:
                require_known(found, file.name)
            engine = _engine(file, busy_timeout)
            try:
                _use_wal(engine, busy_timeout)
                _migrate(engine, file)
                keep_clean(engine, file)
            except BaseException:
                engine.dispose()
                raise
            return cls(engine, folder)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """See `Database.reading`."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self, owner: str | None = None) -> Iterator[Connection]:
        """See `Database.writing`; a file has one writer, whoever it writes for."""
        with self._lock, self._immediate.begin() as connection:
            yield connection

    def scrub(self) -> bool:
        """See `scrub`."""
        with self._lock:
            return scrub(self.engine, self.folder)


def _engine(file: Path, busy_timeout: float) -> Engine:
    # Without hide_parameters an error's text would quote what somebody wanted remembered.
    url = URL.create("sqlite", database=str(file))
    engine = create_engine(url, connect_args={"timeout": busy_timeout}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        # Only a new file can be made to give back single pages; in another one this would be a write.
        if cursor.execute("PRAGMA page_count").fetchone()[0] == 0:
            cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        # By the driver itself: every read begins with this, and sqlalchemy's way takes ten times as long.
        cursor = connection.connection.cursor()
        cursor.execute("BEGIN IMMEDIATE" if immediate else "BEGIN")
        cursor.close()

    return engine


def _use_wal(engine: Engine, busy_timeout: float) -> None:
    deadline = time.monotonic() + busy_timeout
    while True:  # SQLite does not wait for this lock by itself when two processes create a store at once
        try:
            with closing(engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if sqlite_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _version_on_disk(file: Path) -> str | None:
    """The schema version of a file, "" when it is some other database, None when it is new or empty."""
    if not file.exists() or file.stat().st_size == 0:
        return None
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as probe:
        tables = {name for (name,) in probe.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" not in tables:
            return "" if tables else None
        row = probe.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(row[0]) if row else ""


def _migrate(engine: Engine, file: Path) -> None:
    head = newest_version()
    if _version_on_disk(file) == head:
        return
    with engine.execution_options(immediate=True).begin() as connection:
        found = _version_on_disk(file)  # again: another process may have migrated while we waited
        if found == head:
            return
        if found is not None:
            require_known(found, file.name)
            _back_up(file, file.with_name(BACKUP_GLOB.replace("*", found)))
        upgrade(connection)


def _back_up(file: Path, target: Path) -> None:
    # Named like the backup, so that `scrub` finds what a crash leaves of it.
    partial = target.with_name(f"{target.name}.tmp")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(partial)) as copy:
        source.backup(copy)
    files.sync(partial)
    partial.replace(target)
    files.sync(target.parent)


def scrub(engine: Engine, folder: Path) -> bool:
    """Give free pages back, overwrite what is left of erased rows and drop backups of older schemas.

    The time depends on what changed, not on the size of the store. Returns whether all of it was possible;
    it is not while another process reads or writes.
    """
    try:
        for backup in folder.glob(f"{BACKUP_GLOB}*"):
            backup.unlink(missing_ok=True)
        files.sync(folder)
        with closing(engine.raw_connection()) as raw:
            assert isinstance(raw.driver_connection, sqlite3.Connection)
            compact(raw.driver_connection, pages=_COMPACT_PAGES, share=_COMPACT_SHARE)
        return checkpoint(folder / "personas.db", timeout=1.0, wipe=True)
    except (sqlite3.Error, OSError):
        return False
