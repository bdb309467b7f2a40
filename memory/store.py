"""The store of personas' memory: one database, one vault of tensors.

    <folder>/personas.db                              the truth (SQLite, WAL), or tables of PostgreSQL
    <folder>/blobs/<2 hex>/<digest>.safetensors       payload tensors, named by content

`MemoryStore.commit` is the one way in: it appends a revision that adds, retires and regroups, or fails
and changes nothing. Reads are scoped to one owner, never write, and see one consistent revision. Every
method may be called from any thread; writers wait for each other, also across processes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

from sqlalchemy import Connection
from torch import Tensor

from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError
from persona_sdk.memory import (
    archive,
    archive_import,
    audit,
    commits,
    erasure,
    events,
    governance,
    lifecycle,
    revisions,
    rows,
    signing,
    snapshots,
    transitions,
)
from persona_sdk.memory.archive_format import ArchiveSummary
from persona_sdk.memory.archive_reader import Contents
from persona_sdk.memory.audit import Fault
from persona_sdk.memory.cube import CubeDraft, State, check_vector, clean_text
from persona_sdk.memory.database import Database, translated
from persona_sdk.memory.encryption import KeyRing
from persona_sdk.memory.events import Event, Head
from persona_sdk.memory.governance import Granted, Principal
from persona_sdk.memory.postgres import PostgreSQL, is_url
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.receipt import Receipt
from persona_sdk.memory.revisions import Revision
from persona_sdk.memory.snapshots import MemoryView, Snapshot, When
from persona_sdk.memory.sqlite import SQLite
from persona_sdk.memory.vault import Vault, encode


class MemoryStore(StoreReader):
    """An open store. Make one with `MemoryStore.open`; it is a context manager."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        blobs: str | Path | None = None,
        busy_timeout: float = 10.0,
        encryption: KeyRing | None = None,
    ) -> Self:
        """Open a store, creating it, migrating an older schema, sweeping up after crashes.

        Args:
            path: the folder; or ``postgresql+psycopg://...``, see `persona_sdk.memory.postgres`.
            blobs: the folder of the tensors of a store in PostgreSQL; None takes the URL's, or one of the
                user's that belongs to that database. A folder's store keeps them in the folder.
            busy_timeout: seconds a write waits for another process's.
            encryption: the master key of an encrypted store; a new store is encrypted when it is given.

        Raises:
            InvalidInputError: the URL names no kind of store, or `blobs` is given with a folder.
            MasterKeyError: the master key is missing or another one, or the store is not encrypted.
            SchemaError: the schema is newer than this code; nothing was changed.
            StoreUnavailableError: the database server cannot be reached.
            StoreError: the folder or the database cannot be used.
        """
        if is_url(path):
            place = None if blobs is None else Path(blobs)
            database: Database = PostgreSQL.open(str(path), blobs=place, busy_timeout=busy_timeout)
        elif blobs is not None:
            raise InvalidInputError(
                "A folder's store keeps its blobs there.", hint="Give blobs only with a URL."
            )
        else:
            folder = Path(path)
            with translated(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            database = SQLite.open(folder, busy_timeout=busy_timeout)
        try:
            with translated(database.folder):
                store = cls(database, Vault(database.folder / "blobs"))
                store.unlock(encryption)
                store.sweep()
                erasure.resume(store)
        except BaseException:
            database.close()
            raise
        return store

    # Writing ------------------------------------------------------------------------------------------

    def commit(
        self,
        owner: str,
        *,
        kind: str | None = "user",
        add: Sequence[CubeDraft] = (),
        retire: Sequence[str] = (),
        groups: Sequence[str] | None = None,
        message: str | None = None,
        parent: int | None = None,
        also: Callable[[Connection, Sequence[str]], None] | None = None,
    ) -> Revision:
        """Append a revision, whole or not at all. The first commit creates the persona.

        Args:
            owner: whose history it is.
            kind: ``"user"`` or ``"group"``; None is the persona's own, which must exist.
            add: cubes to add; their ids are the revision's ``added``, in this order.
            retire: ids of live cubes that end here. They stay in history until they are forgotten.
            groups: the persona's groups from now on, in order; None leaves them.
            message: a note for the history; blanked when a cube of the revision is forgotten.
            parent: the revision this was decided on; a newer one is a conflict. None takes the newest.
            also: for modules of this package: more work on the owner in the same transaction, given the ids
                of the added cubes. What it raises undoes the commit.

        Raises:
            InvalidInputError: a value cannot be stored, or the kind does not match.
            FrozenError: a cube to retire is frozen.
            NotFoundError: a cube to retire is not live, a source is gone, or there is no persona whose kind
                None would be.
            RevisionConflictError: somebody else committed after `parent`.
            StoreFullError: there is no room.
        """
        validate_id(owner)
        if isinstance(groups, str) or isinstance(retire, str):
            raise InvalidInputError("groups or retire is a string.", hint="Expected a list of ids.")
        note = clean_text(message or "", "message")
        drafts = [draft.checked() for draft in add]
        blobs = [None if draft.payload is None else encode(draft.payload) for draft in drafts]
        # Joining a group looks at whether other personas are users, so it excludes their writers too.
        alone = owner if groups is None else None
        with self.blobs_written(filter(None, blobs)) as new, self.writing(alone) as connection:
            number = revisions.advance(connection, owner, kind=kind, parent=parent, message=note)
            lifecycle.require_unfrozen(connection, owner, list(retire))
            revisions.close_cubes(connection, owner, list(dict.fromkeys(retire)), number)
            ids = commits.add_cubes(self, connection, owner, drafts, blobs, number, new)
            if groups is not None:
                revisions.set_groups(connection, owner, groups, number)
            revision = commits.recorded(connection, owner, number, "commit", events.membership(groups))
            if also is not None:
                also(connection, ids)
            return revision

    def rollback(self, owner: str, to: int | str) -> Revision:
        """Append a revision with the cubes and groups of an older one; ``gone`` tells what was forgotten.

        Args:
            owner: whose history.
            to: a revision, or the name of a snapshot.

        Raises:
            FrozenError: a frozen cube would be retired or brought back.
            NotFoundError: the owner has no such revision or snapshot.
        """
        with self.writing() as connection:
            return transitions.restore(connection, owner, snapshots.resolve(connection, owner, to))

    def add_vectors(self, owner: str, encoder: str, vectors: Mapping[str, Tensor]) -> int:
        """Store embeddings of the owner's cubes; derived data, so no revision. Returns how many were new.

        Raises:
            InvalidInputError: a vector is unusable.
            NotFoundError: a cube is not the owner's.
        """
        for vector in vectors.values():
            check_vector(vector, encoder)
        with self.writing(owner) as connection:
            written = rows.insert_vectors(connection, owner, encoder, vectors)
            if written:
                revisions.touch(connection, owner)
            return written

    def forget(self, owner: str, cube_ids: Sequence[str]) -> Receipt:
        """Erase cubes, live or not, and everything derived from them, whoever owns it.

        Raises:
            FrozenError: one of these is frozen with a legal basis; nothing was erased.
            NotFoundError: a cube is not the owner's; nothing was erased.
        """
        return erasure.forget(self, owner, list(dict.fromkeys(cube_ids)))

    def forget_everything(self, owner: str) -> Receipt:
        """Erase a persona: cubes, derived cubes of others, history, groups and the id itself.

        Raises:
            FrozenError: one of these is frozen with a legal basis; nothing was erased.
            NotFoundError: there is no such persona.
        """
        return erasure.forget_everything(self, owner)

    # Lifecycle and governance: thin, see the modules ----------------------------------------------------

    def archive(self, owner: str, cube_ids: Sequence[str], *, reason: str = "") -> Revision:
        """Put cubes aside; `transitions.archive`."""
        return transitions.archive(self, owner, cube_ids, reason=reason)

    def activate(self, owner: str, cube_ids: Sequence[str], *, reason: str = "") -> Revision:
        """Make cubes live and activated; `transitions.activate`."""
        return transitions.activate(self, owner, cube_ids, reason=reason)

    def freeze(self, owner: str, cube_id: str, reason: str, *, legal_basis: str | None = None) -> None:
        """Lock a cube; `transitions.freeze`."""
        transitions.freeze(self, owner, cube_id, reason, legal_basis=legal_basis)

    def unfreeze(self, owner: str, cube_id: str, reason: str, *, may_release: bool = True) -> State:
        """Unlock a cube; `transitions.unfreeze`."""
        return transitions.unfreeze(self, owner, cube_id, reason, may_release=may_release)

    def snapshot(self, owner: str, name: str) -> Snapshot:
        """Name the newest revision; `snapshots.snapshot`."""
        return snapshots.snapshot(self, owner, name)

    def snapshots(self, owner: str) -> list[Snapshot]:
        """The snapshots of an owner, oldest revision first."""
        with self.reading() as connection:
            return snapshots.read(connection, owner)

    def as_of(self, owner: str, when: When) -> MemoryView:
        """The persona at a revision, a snapshot or a time, to be read only.

        Raises:
            InvalidInputError: a time without a time zone.
            NotFoundError: the owner has no such revision or snapshot.
        """
        return snapshots.as_of(self, owner, when)

    def grant(
        self, owner: str, cube_id: str, to: Principal, right: Granted = "read", *, special: bool = False
    ) -> None:
        """Let somebody else read, or write, one cube; `governance.grant`."""
        governance.grant(self, owner, cube_id, to, right, special=special)

    def revoke(self, owner: str, cube_id: str, to: Principal) -> None:
        """Take a grant back; `governance.revoke`."""
        governance.revoke(self, owner, cube_id, to)

    def audit(self, owner: str) -> list[Event]:
        """The audit log of an owner, oldest first; that of the store for `events.STORE`."""
        with self.reading() as connection:
            return events.read(connection, owner)

    def verify_audit(self, owner: str, *, anchor: Head | None = None) -> list[Fault]:
        """What is wrong with the audit log; `audit.verify`."""
        with self.reading() as connection:
            return audit.verify(connection, owner, anchor=anchor)

    # Keys, signatures, archives -----------------------------------------------------------------------

    def rotate_master_key(self, ring: KeyRing) -> int:
        """Wrap the key of every persona with another master key; how many there are. No data is touched.

        Other processes that have the store open with the old one must open it again.

        Raises:
            InvalidInputError: the store is not encrypted.
            MasterKeyError: the new master key is unusable; the old one is still in use.
        """
        if self._encryption is None:
            raise InvalidInputError("The store is not encrypted.", hint="It has no key to change.")
        with self._encryption.changing_to(ring), self.writing() as connection:
            count = self._encryption.rotate(connection, ring)
        self.scrub()  # a copy of what the old master key opens must not stay in the folder
        return count

    def export(self, owner: str, path: str | Path, *, passphrase: str | None = None) -> Path:
        """Write a persona with its history to one signed ``.memcube`` file (`persona_sdk.memory.archive`).

        Its content is clear, also when the store is encrypted, unless a passphrase is given.
        """
        return archive.export(self, owner, Path(path), passphrase=passphrase)

    def inspect_archive(
        self, path: str | Path, *, trusted_keys: Collection[bytes] = (), passphrase: str | None = None
    ) -> ArchiveSummary:
        """Check a ``.memcube`` file as `import_archive` does, and say what it is and who signed it.

        Raises:
            ArchiveError: it is damaged or unsafe, its signature is wrong, or so is the passphrase.
        """
        return archive_import.inspect(self, Path(path), trusted_keys=trusted_keys, passphrase=passphrase)

    def import_archive(
        self,
        path: str | Path,
        *,
        as_id: str | None = None,
        keep_groups: bool = False,
        trusted_keys: Collection[bytes] = (),
        passphrase: str | None = None,
        admit: Callable[[Contents], None] | None = None,
    ) -> str:
        """Take in a ``.memcube`` file as a new persona and return its id.

        Args:
            path: the archive.
            as_id: the id to give it; None keeps the archive's.
            keep_groups: also take over its group memberships. A group of this store may share no more than
                its name with the archive's, and members read what a group remembers, so only on request.
            trusted_keys: Ed25519 public keys (`public_key`) of stores whose archives are believed as this
                store's own are; what others sign is taken in with less trust.
            passphrase: that of the archive, if it has one.
            admit: for modules of this package: looks at the archive that was opened, and raises what it has
                against it.

        Raises:
            ArchiveError: it is damaged or unsafe, its signature or the passphrase is wrong, or the persona
                exists; nothing was written.
        """
        return archive_import.import_archive(
            self,
            Path(path),
            as_id=as_id,
            keep_groups=keep_groups,
            trusted_keys=trusted_keys,
            passphrase=passphrase,
            admit=admit,
        )

    def public_key(self) -> bytes | None:
        """The Ed25519 key with which others check this store's receipts and archives.

        None without the extra ``[crypto]``: then only this store can check them.
        """
        return signing.public_key(self.folder)
