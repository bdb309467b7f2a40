"""Errors of databases and file systems as those of `persona_sdk.errors`.

    SQLite                    PostgreSQL (SQLSTATE)            here
    FULL, no room for the WAL 53100                            StoreFullError           retryable
    BUSY, LOCKED              40001, 40P01, 55P03              RevisionConflictError    retryable
    -                         08*, 57*, 53*, no state at all   StoreUnavailableError    retryable
    CANTOPEN, READONLY        25006, 42501                     StoreError
    CORRUPT, NOTADB           XX001, XX002                     StoreError
    -                         22*, NUL in a text               InvalidInputError

Messages of PostgreSQL quote the row that was refused, so only its state and class are repeated.
"""

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from persona_sdk.errors import (
    InvalidInputError,
    PersonaError,
    RevisionConflictError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOTHING = "Nothing was committed."
_CONFLICTS = ("40001", "40P01", "55P03")  # not serialisable, deadlock, lock timeout
_AWAY = ("08", "57", "53")  # connection lost, operator intervention, no resources


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of the database and of the file system into those of `persona_sdk.errors`."""
    try:
        yield
    except PoolTimeout as error:
        raise StoreUnavailableError("All connections are in use.", hint=f"{_NOTHING} Retry.") from error
    except DBAPIError as error:
        if error.orig is None or isinstance(error.orig, sqlite3.Error):
            raise _of_sqlite(error.orig, path) from error
        raise _of_postgres(error.orig) from None
    except (sqlite3.Error, OSError) as error:
        raise _of_sqlite(error, path) from error


def sqlite_code(error: object) -> int:
    """SQLite's primary result code, 0 for any other error."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _of_sqlite(error: BaseException | None, path: Path) -> StoreError:
    code = sqlite_code(error)
    if code == sqlite3.SQLITE_FULL or _no_room(error, code, path):
        return StoreFullError("There is no room left to write.", hint=f"{_NOTHING} Free space, then retry.")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RevisionConflictError("Another writer holds the store.", hint=f"{_NOTHING} Retry.")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or isinstance(error, OSError):
        return StoreError(
            f"{path.name!r} cannot be read or written: {error}.", hint="Check the folder's permissions."
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError(
            f"{path.name!r} is damaged or no database: {error}.", hint="Restore it from a copy."
        )
    return StoreError(f"The store failed: {error}.", hint=_NOTHING)


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


def _of_postgres(error: BaseException) -> PersonaError:
    state, kind = str(getattr(error, "sqlstate", None) or ""), type(error).__name__
    what = f"{kind} {state}".rstrip()
    if state == "53100":
        return StoreFullError(
            "The database server has no room left to write.", hint=f"{_NOTHING} Free space, then retry."
        )
    if state in _CONFLICTS:
        return RevisionConflictError("Another writer holds the store.", hint=f"{_NOTHING} Retry.")
    if state[:2] in _AWAY or (not state and kind in ("OperationalError", "InterfaceError", "InternalError")):
        return StoreUnavailableError(
            f"The database server cannot be reached, or dropped the connection ({what}).",
            hint="Retry. A commit that was under way may have been made: compare `head` before and after.",
        )
    if state[:2] == "22" or kind == "DataError":
        return InvalidInputError(
            f"PostgreSQL cannot store a value ({what}).",
            hint=f"{_NOTHING} Texts must not hold the character NUL.",
        )
    if state in ("25006", "42501"):
        return StoreError(
            f"The database cannot be written ({what}).",
            hint="The role needs to own its tables, on a server that is no read-only standby.",
        )
    if state in ("XX001", "XX002"):
        return StoreError(f"The database is damaged ({what}).", hint="Restore it from a backup.")
    return StoreError(f"The store failed ({what}).", hint=_NOTHING)
