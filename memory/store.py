"""The store of personas' memory: one folder, one database, one vault of tensors.

    <folder>/personas.db                              the truth (SQLite, WAL)
    <folder>/blobs/<2 hex>/<digest>.safetensors       payload tensors, named by content

`MemoryStore.commit` is the one way in: it appends a revision that adds, retires and regroups, or fails
and changes nothing. Reads are scoped to one owner, never write, and see one consistent revision. Every
method may be called from any thread; writers wait for each other, also across processes.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor

from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError
from persona_sdk.memory import archive, archive_import, database, erasure, revisions, rows, signing
from persona_sdk.memory.archive_format import ArchiveSummary
from persona_sdk.memory.cube import CubeDraft, check_vector, clean_text
from persona_sdk.memory.database import translated
from persona_sdk.memory.encryption import KeyRing
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.receipt import Receipt
from persona_sdk.memory.revisions import Revision
from persona_sdk.memory.vault import Vault, encode


class MemoryStore(StoreReader):
    """An open store. Make one with `MemoryStore.open`; it is a context manager."""

    @classmethod
    def open(cls, path: str | Path, *, busy_timeout: float = 10.0, encryption: KeyRing | None = None) -> Self:
        """Open the store in a folder, creating both, migrating an older schema, sweeping up after crashes.

        Args:
            path: the folder.
            busy_timeout: seconds a write waits for another process's.
            encryption: the master key of an encrypted store; a new store is encrypted when it is given.

        Raises:
            MasterKeyError: the master key is missing or another one, or the store is not encrypted.
            SchemaError: the schema is newer than this code; nothing was changed.
            StoreError: the folder cannot be used.
        """
        folder = Path(path)
        with translated(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            engine = database.open_database(folder / "personas.db", busy_timeout=busy_timeout)
            try:
                store = cls(folder, engine, Vault(folder / "blobs"))
                store.unlock(encryption)
                store.sweep()
                erasure.resume(store)
            except BaseException:
                engine.dispose()
                raise
            return store

    # Writing ------------------------------------------------------------------------------------------

    def commit(
        self,
        owner: str,
        *,
        kind: str = "user",
        add: Sequence[CubeDraft] = (),
        retire: Sequence[str] = (),
        groups: Sequence[str] | None = None,
        message: str | None = None,
        parent: int | None = None,
    ) -> Revision:
        """Append a revision, whole or not at all. The first commit creates the persona.

        Args:
            owner: whose history it is.
            kind: ``"user"`` or ``"group"``.
            add: cubes to add; their ids are the revision's ``added``, in this order.
            retire: ids of live cubes that end here. They stay in history until they are forgotten.
            groups: the persona's groups from now on, in order; None leaves them.
            message: a note for the history; blanked when a cube of the revision is forgotten.
            parent: the revision this was decided on; a newer one is a conflict. None takes the newest.

        Raises:
            InvalidInputError: a value cannot be stored, or the kind does not match.
            NotFoundError: a cube to retire is not live, or a source is gone.
            RevisionConflictError: somebody else committed after `parent`.
            StoreFullError: there is no room.
        """
        validate_id(owner)
        if isinstance(groups, str) or isinstance(retire, str):
            raise InvalidInputError("groups or retire is a string.", hint="Expected a list of ids.")
        note = clean_text(message or "", "message")
        drafts = [draft.checked() for draft in add]
        blobs = [None if draft.payload is None else encode(draft.payload) for draft in drafts]
        encoded = dict(filter(None, blobs))
        with self._lock, self.blobs_written(encoded.items()) as new, self.writing() as connection:
            number = revisions.advance(connection, owner, kind=kind, parent=parent, message=note)
            revisions.close_cubes(connection, owner, list(dict.fromkeys(retire)), number)
            rows.require_sources(connection, {s for draft in drafts for s in draft.header.sources})
            ids = []
            for draft, blob in zip(drafts, blobs, strict=True):
                if blob is not None:
                    self.keep_blob(connection, owner, blob[0], encoded.__getitem__, new)
                ids.append(rows.insert_cube(connection, owner, draft, blob[0] if blob else None, number))
            revisions.open_cubes(connection, owner, ids, number)
            if groups is not None:
                revisions.set_groups(connection, owner, groups, number)
            return revisions.history(connection, owner, since=number - 1)[0]

    def rollback(self, owner: str, revision: int) -> Revision:
        """Append a revision with the cubes and groups of an older one; ``gone`` tells what was forgotten.

        Raises:
            NotFoundError: the owner has no such revision.
        """
        with self.writing() as connection:
            number = revisions.restore(connection, owner, revision)
            return revisions.history(connection, owner, since=number - 1)[0]

    def add_vectors(self, owner: str, encoder: str, vectors: Mapping[str, Tensor]) -> int:
        """Store embeddings of the owner's cubes; derived data, so no revision. Returns how many were new.

        Raises:
            InvalidInputError: a vector is unusable.
            NotFoundError: a cube is not the owner's.
        """
        for vector in vectors.values():
            check_vector(vector, encoder)
        with self.writing() as connection:
            written = rows.insert_vectors(connection, owner, encoder, vectors)
            if written:
                revisions.touch(connection, owner)
            return written

    def forget(self, owner: str, cube_ids: Sequence[str]) -> Receipt:
        """Erase cubes, live or not, and everything derived from them, whoever owns it.

        Raises:
            NotFoundError: a cube is not the owner's; nothing was erased.
        """
        return erasure.forget(self, owner, list(dict.fromkeys(cube_ids)))

    def forget_everything(self, owner: str) -> Receipt:
        """Erase a persona: cubes, derived cubes of others, history, groups and the id itself.

        Raises:
            NotFoundError: there is no such persona.
        """
        return erasure.forget_everything(self, owner)

    def rotate_master_key(self, ring: KeyRing) -> int:
        """Wrap the key of every persona with another master key; how many there are. No data is touched.

        Other processes that have the store open with the old one must open it again.

        Raises:
            InvalidInputError: the store is not encrypted.
            MasterKeyError: the new master key is unusable; the old one is still in use.
        """
        if self._encryption is None:
            raise InvalidInputError("The store is not encrypted.", hint="It has no key to change.")
        with self._lock:
            with self.writing() as connection:
                count = self._encryption.rotate(connection, ring)
            self._encryption.adopt(ring)
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
        )

    def public_key(self) -> bytes | None:
        """The Ed25519 key with which others check this store's receipts and archives.

        None without the extra ``[crypto]``: then only this store can check them.
        """
        return signing.public_key(self.folder)
