"""The receipt of an erasure: what was erased, and a way to look again whether anything is left."""

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, select

from persona_sdk.errors import InvalidInputError
from persona_sdk.memory import signing
from persona_sdk.memory.core import named_blobs
from persona_sdk.memory.cube import canonical, hashed
from persona_sdk.memory.database import BACKUP_GLOB
from persona_sdk.memory.derived import Retrainable
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.rows import chunks
from persona_sdk.memory.schema import BY_CUBE, BY_OWNER, cubes, events, personas, sources, to_column
from persona_sdk.memory.signing import Signature
from persona_sdk.tensors import Digest

_PublicKey: TypeAlias = bytes  # the class below has a field called bytes


@dataclass(frozen=True)
class Receipt:
    """What an erasure did. It names ids and hashes only, never content, and nobody but its owner.

    ``cube_ids`` are all cubes that were erased, ``derived`` how many of them only because of a source.
    ``blobs`` are the files that were deleted; one that somebody else still names is not among them.
    ``scrubbed`` is False when another process kept old bytes of the store in use; then call
    `MemoryStore.scrub` later. ``retrainable`` are weights that went because of one source and have others.
    ``sha256`` is that of the other fields but the signature as canonical JSON, which is what is signed.
    """

    owner: str
    at: datetime
    everything: bool
    cube_ids: tuple[str, ...]
    derived: int
    rows: int
    vectors: int
    blobs: tuple[Digest, ...]
    bytes: int
    scrubbed: bool
    retrainable: tuple[Retrainable, ...] = ()
    sha256: str = ""
    signature: Signature | None = None

    def canonical(self) -> str:
        """The fields but ``sha256`` and ``signature`` as JSON with sorted keys."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("sha256", "signature")}
        return canonical(fields | {"at": to_column(self.at)})

    def sealed(self) -> "Receipt":
        """The receipt with its hash filled in."""
        return replace(self, sha256=hashed(self.canonical()))

    def signed(self, folder: Path) -> "Receipt":
        """The receipt with its hash and the signature of the store in `folder` filled in."""
        return replace(self.sealed(), signature=signing.sign(folder, self.canonical().encode()))

    def to_json(self) -> str:
        """All fields as JSON, to be kept or handed on."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "Receipt":
        """Inverse of `to_json`. It is believed only when it verifies.

        Raises:
            InvalidInputError: this is no receipt.
        """
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            raise InvalidInputError(
                "This is no receipt.", hint="Expected what Receipt.to_json gave."
            ) from error

    def verify_signature(self, public_key: _PublicKey) -> bool:
        """Whether the store with this Ed25519 public key issued the receipt as it is; needs no store.

        Raises:
            StoreError: the extra ``[crypto]`` is not installed.
        """
        if self.signature is None or self.sealed().sha256 != self.sha256:
            return False
        return signing.verify(self.canonical().encode(), self.signature, public_key)

    def verify(self, store: StoreReader) -> bool:
        """Whether `store` issued the receipt as it is, and nothing that it names is left there now."""
        if self.signature is None or self.sealed().sha256 != self.sha256:
            return False
        if signing.standing(store.folder, self.canonical().encode(), self.signature, ()) != "known":
            return False
        with store.reading() as connection:
            if self._rows_left(connection):
                return False
            named = named_blobs(connection, self.blobs)
            if any(store.vault.holds(blob) for blob in self.blobs if blob not in named):
                return False
        return not any(
            file.stat().st_mtime < self.at.timestamp() for file in store.folder.glob(f"{BACKUP_GLOB}*")
        )

    def _rows_left(self, connection: Connection) -> bool:
        columns: list[Any] = [cubes.c.id, sources.c.source_id, *(table.c.cube_id for table in BY_CUBE)]
        for part in chunks(self.cube_ids):
            if any(connection.execute(select(c).where(c.in_(part)).limit(1)).first() for c in columns):
                return True
        if not self.everything:
            return False
        created = select(personas.c.created_at).where(personas.c.owner == self.owner)
        since = connection.execute(created).scalar()
        if since is not None:  # a later persona of the same id is not what was erased
            return bool(since <= to_column(self.at))
        return any(
            connection.execute(select(table.c.owner).where(table.c.owner == self.owner).limit(1)).first()
            for table in (*BY_OWNER, events)
        )


_ADAPTER = TypeAdapter(Receipt)
