"""The receipt of an erasure: what was erased, and a way to look again whether anything is left."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime

from sqlalchemy import select

from persona_sdk.memory.database import BACKUP_GLOB
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.rows import CHUNK
from persona_sdk.memory.schema import cubes, memberships, personas, sources, to_column, vectors
from persona_sdk.tensors import Digest


@dataclass(frozen=True)
class Receipt:
    """What an erasure did. It names ids and hashes only, never content, and nobody but its owner.

    ``cube_ids`` are all cubes that were erased, ``derived`` how many of them only because of a source.
    ``blobs`` are the files that were deleted; a blob that somebody else still names is not among them.
    ``scrubbed`` is False when another process kept old bytes of the store in use; then call
    `MemoryStore.scrub` later. ``sha256`` is that of the other fields as canonical JSON.
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
    sha256: str = ""

    def canonical(self) -> str:
        """The fields but ``sha256`` as JSON with sorted keys."""
        fields = {key: value for key, value in asdict(self).items() if key != "sha256"}
        return json.dumps(fields | {"at": to_column(self.at)}, sort_keys=True, separators=(",", ":"))

    def sealed(self) -> "Receipt":
        """The receipt with its hash filled in."""
        return replace(self, sha256=hashlib.sha256(self.canonical().encode()).hexdigest())

    def verify(self, store: StoreReader) -> bool:
        """Look again: whether nothing the receipt names is left in the store.

        The receipt's own hash guards against accidents, not against forgery: it has no key.
        """
        if self.sealed().sha256 != self.sha256:
            return False
        keys = [cubes.c.id, memberships.c.cube_id, vectors.c.cube_id, sources.c.cube_id, sources.c.source_id]
        with store.reading() as connection:
            for start in range(0, len(self.cube_ids), CHUNK):
                part = self.cube_ids[start : start + CHUNK]
                if any(connection.execute(select(key).where(key.in_(part)).limit(1)).first() for key in keys):
                    return False
            if self.everything:
                created = select(personas.c.created_at).where(personas.c.owner == self.owner)
                since = connection.execute(created).scalar()
                if since is not None and since <= to_column(self.at):
                    return False
            named = set(
                connection.execute(select(cubes.c.blob).where(cubes.c.blob.in_(self.blobs))).scalars()
            )
            if any(store.vault.holds(blob) for blob in self.blobs if blob not in named):
                return False
        return not any(
            file.stat().st_mtime < self.at.timestamp() for file in store.folder.glob(f"{BACKUP_GLOB}*")
        )
