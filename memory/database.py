"""The database of a store: one SQLite file in WAL mode, its connections, its migrations and its errors.

Transactions are begun here, not by the driver: ``BEGIN`` for a reader, ``BEGIN IMMEDIATE`` for a writer,
so that a writer holds SQLite's one write lock, across processes, from its first statement on.

The schema's version is alembic's. A fresh file is migrated to the newest version, an older one is copied
and then migrated in one transaction, and one this code does not know is refused before a byte changes.
"""

import errno
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from persona_sdk import files
from persona_sdk.errors import RevisionConflictError, SchemaError, StoreError, StoreFullError
from persona_sdk.memory.checkpoint import checkpoint, compact, keep_clean

MIGRATIONS = Path(__file__).parent / "migrations"
BACKUP_GLOB = "personas.db.before-*.bak"

# Checkpoints are made by `persona_sdk.memory.checkpoint`.
_PRAGMAS = (
    "foreign_keys=ON",
    "secure_delete=ON",
    "synchronous=FULL",
    "temp_store=MEMORY",
    "wal_autocheckpoint=0",
)
_COMPACT_PAGES, _COMPACT_SHARE = 4096, 0.25  # given back at a time; free before an old file is rewritten
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def open_database(file: Path, *, busy_timeout: float) -> Engine:
    """Open and migrate the database at `file`, creating it if it is missing.

    Raises:
        SchemaError: its schema is newer than this code, or it is no store; it was not changed.
        StoreError: it cannot be opened or written, or it is damaged.
    """
    with translated(file):
        found = _version_on_disk(file)
        if found is not None:
            _require_known(found, file)
        engine = _engine(file, busy_timeout)
        try:
            _use_wal(engine, busy_timeout)
            _migrate(engine, file)
            keep_clean(engine, file)
        except BaseException:
            engine.dispose()
            raise
        return engine


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
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _use_wal(engine: Engine, busy_timeout: float) -> None:
    deadline = time.monotonic() + busy_timeout
    while True:  # SQLite does not wait for this lock by itself when two processes create a store at once
        try:
            with closing(engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if _primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
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


def _require_known(version: str, file: Path) -> None:
    if version not in {script.revision for script in _scripts().walk_revisions()}:
        what = f"a newer schema ({version!r})" if version else "tables that are not a memory store's"
        raise SchemaError(
            f"{file.name} has {what}; it was not changed.",
            hint="Upgrade persona-sdk to the version that wrote it." if version else "Choose another folder.",
        )


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS))


def _migrate(engine: Engine, file: Path) -> None:
    head = _scripts().get_current_head()
    if _version_on_disk(file) == head:
        return
    with engine.execution_options(immediate=True).begin() as connection:
        found = _version_on_disk(file)  # again: another process may have migrated while we waited
        if found == head:
            return
        if found is not None:
            _require_known(found, file)
            _back_up(file, file.with_name(BACKUP_GLOB.replace("*", found)))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


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


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into those of `persona_sdk.errors`."""
    try:
        yield
    except DBAPIError as error:
        raise _typed(error.orig, path) from error
    except (sqlite3.Error, OSError) as error:
        raise _typed(error, path) from error


def _primary(error: object) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _typed(error: BaseException | None, path: Path) -> StoreError:
    code = _primary(error)
    if code == sqlite3.SQLITE_FULL or _no_room(error, code, path):
        return StoreFullError(
            "There is no room left to write.", hint="Nothing was committed. Free space, then retry."
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RevisionConflictError("Another writer holds the store.", hint="Nothing was committed. Retry.")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or isinstance(error, OSError):
        return StoreError(
            f"{path.name!r} cannot be read or written: {error}.", hint="Check the folder's permissions."
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError(
            f"{path.name!r} is damaged or no database: {error}.", hint="Restore it from a copy."
        )
    return StoreError(f"The store failed: {error}.", hint="Nothing was committed.")


def _no_room(error: BaseException | None, code: int, path: Path) -> bool:
    """SQLite reports a disk that fills while it maps shared memory as a plain I/O error."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    if code != sqlite3.SQLITE_IOERR:
        return False
    try:
        return shutil.disk_usage(path if path.is_dir() else path.parent).free < 1 << 16
    except OSError:
        return False
