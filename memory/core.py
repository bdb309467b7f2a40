"""What every part of an open store stands on: its connections, its one write lock, its vault.

`erasure` and `archive` are written against this class and `persona_sdk.memory.reader`; callers see
`persona_sdk.memory.MemoryStore`.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, select

from persona_sdk.errors import PersonaError, StoreError
from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory import encryption
from persona_sdk.memory.database import Database, translated
from persona_sdk.memory.derived import Derived
from persona_sdk.memory.encryption import Encryption, KeyRing
from persona_sdk.memory.rows import chunks
from persona_sdk.memory.schema import cubes
from persona_sdk.memory.vault import Vault
from persona_sdk.tensors import Digest

logger = logging.getLogger("persona_sdk.memory")


class StoreCore:
    """An open store: transactions, blobs and the listeners that hear of erasures."""

    def __init__(self, database: Database, vault: Vault) -> None:
        self.folder = database.folder
        self.vault = vault
        self._database: Database | None = database
        self._process = os.getpid()
        self._encryption: Encryption | None = None
        self._forget_listeners: list[Callable[[str], None]] = []
        self._derived_listeners: list[Callable[[Sequence[Derived]], None]] = []

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A read transaction. For modules of this package: whoever uses it names the owner in every query."""
        self._require_process()
        with translated(self.folder), self._open_database().reading() as connection:
            yield ciphers.use(connection, self._encryption)

    @contextmanager
    def writing(self, owner: str | None = None) -> Iterator[Connection]:
        """A write transaction, for modules of this package; rolled back when the block raises.

        It excludes every other writer; with `owner`, whose rows are then the only ones to be written, it
        may exclude no more than those of that owner and those that name none.
        """
        self._require_process()
        with translated(self.folder), self._open_database().writing(owner) as connection:
            yield ciphers.use(connection, self._encryption)

    def unlock(self, ring: KeyRing | None) -> None:
        """Check the master key, and use it from now on; for a store that is being opened.

        Raises:
            MasterKeyError: it is missing, another one, or the store is not encrypted.
        """
        with self.reading() if ring is None else self.writing() as connection:
            self._encryption = encryption.unlock(connection, ring)
        if self._encryption is not None:
            self.on_forget(self._encryption.drop)

    def _require_process(self) -> None:
        # Connections do not survive a fork: SQLite's parent would delete the log the child writes to, and
        # two processes would speak to PostgreSQL at once.
        if os.getpid() != self._process:
            raise StoreError(
                "The store was opened before this process was forked.", hint="Open it again in each process."
            )

    def _open_database(self) -> Database:
        if self._database is None:
            raise StoreError("The store is closed.", hint="Open it again with MemoryStore.open.")
        return self._database

    def close(self) -> None:
        """Close all connections; any later use of the store is a `StoreError`."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def blobs_written(self, blobs: Iterable[tuple[Digest, bytes]]) -> Iterator[list[str]]:
        """Write encoded blobs before the transaction of the block; take the new ones back if it fails.

        Yields the names of the new files. In an encrypted store nothing is written yet, since the key may be
        made in the transaction only.
        """
        new: list[str] = []
        encoded = [] if self._encryption else list(blobs)
        try:
            with translated(self.folder), self.vault.settling([name for name, _ in encoded]) as written:
                for name, data in encoded:
                    if self.vault.write(name, data):
                        new.append(name)
                written()
                yield new
        except BaseException:
            with contextlib.suppress(PersonaError):
                self.drop_unnamed(new)
            raise

    def keep_blob(
        self,
        connection: Connection,
        owner: str,
        name: Digest,
        data: bytes | Callable[[], bytes],
        new: list[str],
    ) -> None:
        """Within the transaction that names a blob: see that it is there, and add it to `new` if it was not.

        After `blobs_written` it is not when the store is encrypted, or when another process deleted it.
        """
        cipher = ciphers.writing(connection, owner)
        file_name = cipher.file_name(name)
        if self._encryption is None and self.vault.holds(file_name):
            return
        if self.vault.write(name, data() if callable(data) else data, cipher):
            new.append(file_name)

    def drop_unnamed(self, digests: Sequence[Digest]) -> dict[Digest, int]:
        """Delete the blobs that no row names any more; their sizes. Excludes every writer meanwhile."""
        if not digests:
            return {}
        with self.vault.settling(digests) as written:
            with self.writing() as connection:
                named = named_blobs(connection, digests)
                deleted = {name: self.vault.delete(name) for name in digests if name not in named}
            written()
            return deleted

    def sweep(self) -> None:
        """Delete what crashes left behind. Nothing is locked when there is nothing to do."""
        with self.reading() as connection:
            found = self.vault.candidates(partial(named_blobs, connection))
        if found:
            with contextlib.suppress(PersonaError):
                self._drop_orphans()

    def _drop_orphans(self, **age: float) -> None:
        with self.writing() as connection:
            for file in self.vault.candidates(partial(named_blobs, connection), **age):
                file.unlink(missing_ok=True)

    def on_forget(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the owner whenever cubes of it were erased."""
        self._forget_listeners.append(listener)

    def on_derived_erased(self, listener: Callable[[Sequence[Derived]], None]) -> None:
        """Call `listener` with what an erasure took because it was derived, once its bytes are gone too.

        It is the place to train weights again from the sources that remain; it runs in the thread that
        forgot, and is not called when nothing was derived.
        """
        self._derived_listeners.append(listener)

    def announce_derived(self, derived: Sequence[Derived]) -> None:
        """For `erasure`: tell those who asked with `on_derived_erased`."""
        for listener in self._derived_listeners if derived else ():
            try:
                listener(derived)
            except Exception:  # somebody else's code, as below
                logger.exception("a listener failed when something derived was erased")

    def announce(self, owners: Iterable[str]) -> None:
        """For `erasure`: tell those who asked with `on_forget`."""
        for owner in owners:
            for listener in self._forget_listeners:
                try:
                    listener(owner)
                except Exception:  # somebody else's code; the erasure and its receipt must not be lost
                    logger.exception("a listener failed when something was forgotten")

    def scrub(self) -> bool:
        """Make erased bytes vanish from the folder; False if another process keeps them in use."""
        try:
            # Orphans of any age: writers look again inside their transaction, which this one excludes.
            self._drop_orphans(min_age=0.0)
        except StoreError:
            return False
        return self._open_database().scrub()


def named_blobs(connection: Connection, digests: Sequence[Digest]) -> set[Digest]:
    """Those of `digests` that a row names, whoever's it is."""
    found: set[Digest] = set()
    for part in chunks(digests):
        found |= set(connection.execute(select(cubes.c.blob).where(cubes.c.blob.in_(part))).scalars())
    return found
