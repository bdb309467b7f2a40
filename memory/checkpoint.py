"""Checkpoints of the SQLite store: what is erased is overwritten, in time that depends on what changed.

Every checkpoint is ours (``wal_autocheckpoint=0``). The WAL names the pages that changed since the last one;
it is moved into the database file, the unused bytes of just these pages are zeroed (`residue`), and a new
WAL is begun. So every page of the file is clean at all times, and `MemoryStore.scrub` need not read it.

    phase  under SQLite's write lock
    1      note the pages in ``personas.db-residue``; move the WAL; clean the pages; drop the note
    2      commit a new ``user_version``: the WAL starts anew, and other connections drop cached pages
    3      when wiping: overwrite the old WAL's bytes in its file

A crash in phase 1 leaves the note for the next checkpoint; one before it leaves the WAL. ``user_version``
counts; a database where it is 0 was written by something else and is cleaned from end to end once.
"""

import os
import sqlite3
import struct
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sqlalchemy import Engine, event

from persona_sdk import files
from persona_sdk.memory.residue import Descriptor, changed_pages, overwrite_gaps, wipe_wal

NOTE = "-residue"
WAL_LIMIT = 8 << 20  # bytes of WAL after which a connection that is handed back makes a checkpoint
_SMALL = 1 << 20  # a database of unknown history is cleaned when it is opened up to this size, later above
_COUNT = 0x7FFFFFFF
_ATTEMPTS = 20  # writers may come between two phases


def checkpoint(file: Path, *, timeout: float, wipe: bool = False) -> bool:
    """Move the WAL into the database, clean the pages it changed and begin a new WAL.

    `wipe` also overwrites what the old WAL left in its file, and cleans a database of unknown history.
    False when somebody else reads or writes and keeps the old WAL in use; nothing is lost then.
    """
    wal, note = (file.with_name(file.name + end) for end in ("-wal", NOTE))
    with _connected(file, timeout) as lock, _connected(file, timeout) as mover:
        if not wipe:
            lock.execute("PRAGMA journal_size_limit=0")  # what begins the new WAL then cuts the old one off
        page_size, maps = _pragma(lock, "page_size"), bool(_pragma(lock, "auto_vacuum"))
        for _ in range(_ATTEMPTS):
            with _locked(lock):
                count = _pragma(lock, "user_version")
                whole = wipe and count == 0
                pages = changed_pages(wal)[0] + _noted(note)
                files.write_atomically(note, struct.pack(f">{len(pages)}I", *pages))
                busy, frames, moved = mover.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if busy or frames != moved:
                    return False
                overwrite_gaps(Descriptor.of(file).number, None if whole else pages, page_size, maps=maps)
                note.unlink()
                before = _pragma(lock, "data_version")
            with _locked(lock):
                if _pragma(lock, "data_version") != before:
                    continue
                # A history that is unknown stays so until the whole file was read.
                lock.execute(f"PRAGMA user_version={count % _COUNT + 1 if count or whole else 0}")
            if not wipe:
                return True
            with _locked(lock):
                if _pragma(lock, "data_version") == before:
                    return wipe_wal(wal)
    return False


def _noted(note: Path) -> list[int]:
    data = note.read_bytes() if note.exists() else b""
    return list(struct.unpack(f">{len(data) // 4}I", data))


@contextmanager
def _connected(file: Path, timeout: float) -> Iterator[sqlite3.Connection]:
    uri = f"{file.resolve().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("PRAGMA synchronous=FULL")
        yield connection


@contextmanager
def _locked(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("COMMIT")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def compact(connection: sqlite3.Connection, *, pages: int, share: float) -> None:
    """Give free pages back to the file system.

    Up to `pages` of them at a time; a database that was not made for that is rewritten as a whole, and made
    for it, once more than `share` of it is free.
    """
    if _pragma(connection, "auto_vacuum"):
        connection.executescript(f"PRAGMA incremental_vacuum({pages})")  # a step a page: `execute` makes one
    elif _pragma(connection, "freelist_count") > share * _pragma(connection, "page_count"):
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("VACUUM")


def keep_clean(engine: Engine, file: Path) -> None:
    """Make every checkpoint on behalf of an engine this module's.

    Also the one that SQLite makes by itself when the last connection closes, in order or at the end of the
    program, and the one after a crash.
    """
    process, wal = os.getpid(), file.with_name(f"{file.name}-wal")
    descriptor, pool = Descriptor.of(file), engine.pool
    descriptor.users += 1
    tried = 0  # bytes of WAL at the last attempt; a reader may hold it in use for long

    def attempt(timeout: float, *, wipe: bool = False) -> None:
        # Whoever is in the way, or the next one to open the store, does it later.
        with suppress(sqlite3.Error, OSError):
            if os.getpid() == process and file.exists() and (wipe or set(changed_pages(wal)[0]) - {1}):
                checkpoint(file, timeout=timeout, wipe=wipe)

    @event.listens_for(engine, "checkin")
    def returned(_connection: object, _record: object) -> None:
        nonlocal tried
        with suppress(OSError):
            size = wal.stat().st_size
            tried = min(tried, size)
            if size >= tried + WAL_LIMIT:
                tried = size
                attempt(0.05)

    @event.listens_for(engine, "close")
    def closed(_connection: object, _record: object) -> None:
        attempt(1.0)

    @event.listens_for(engine, "engine_disposed")
    def disposed(_engine: object) -> None:
        # A connection that is still in use must not lose its locks with the descriptor.
        if end.detach() and pool.checkedout() <= 0:  # type: ignore[attr-defined]
            descriptor.release()

    def collected() -> None:
        attempt(1.0)

    end = weakref.finalize(engine, collected)
    with _connected(file, 1.0) as probe:
        unknown = _pragma(probe, "user_version") == 0 and file.stat().st_size <= _SMALL
        attempt(0.2, wipe=unknown)
