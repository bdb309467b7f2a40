"""What every way of adding cubes does inside its transaction, once blobs are on disk."""

from collections.abc import Sequence

from sqlalchemy import Connection

from persona_sdk.memory import revisions, rows
from persona_sdk.memory.core import StoreCore
from persona_sdk.memory.cube import CubeDraft
from persona_sdk.tensors import Digest

Encoded = tuple[Digest, bytes]


def add_cubes(
    store: StoreCore,
    connection: Connection,
    owner: str,
    drafts: Sequence[CubeDraft],
    blobs: Sequence[Encoded | None],
    number: int,
) -> list[str]:
    """Write drafts as cubes that are live from revision `number` on; their ids, in the order of the drafts.

    Raises:
        NotFoundError: a source is gone.
    """
    rows.require_sources(connection, {source for draft in drafts for source in draft.header.sources})
    ids = []
    for draft, blob in zip(drafts, blobs, strict=True):
        if blob is not None and not store.vault.holds(blob[0]):
            store.vault.write(*blob)  # deleted by another process after it was written before
        ids.append(rows.insert_cube(connection, owner, draft, blob[0] if blob else None, number))
    revisions.open_cubes(connection, owner, ids, number)
    return ids
