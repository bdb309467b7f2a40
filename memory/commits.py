"""What every way of adding cubes, and of appending a revision, does inside its transaction."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from persona_sdk.memory import events, revisions, rows
from persona_sdk.memory.core import StoreCore
from persona_sdk.memory.cube import CubeDraft
from persona_sdk.memory.revisions import Revision
from persona_sdk.tensors import Digest

Encoded = tuple[Digest, bytes]


def add_cubes(
    store: StoreCore,
    connection: Connection,
    owner: str,
    drafts: Sequence[CubeDraft],
    blobs: Sequence[Encoded | None],
    number: int,
    new: list[str],
) -> list[str]:
    """Write drafts as cubes that are live from revision `number` on; their ids, in the order of the drafts.

    Blobs that are not there yet are written too, and their files added to `new` (`StoreCore.blobs_written`).

    Raises:
        NotFoundError: a source is gone.
    """
    rows.require_sources(connection, {source for draft in drafts for source in draft.header.sources})
    ids = []
    for draft, blob in zip(drafts, blobs, strict=True):
        if blob is not None:
            store.keep_blob(connection, owner, *blob, new)
        ids.append(rows.insert_cube(connection, owner, draft, blob[0] if blob else None, number))
    revisions.open_cubes(connection, owner, ids, number)
    return ids


def recorded(
    connection: Connection, owner: str, number: int, kind: str, details: Mapping[str, Any]
) -> Revision:
    """The revision `number`, the newest one, after its event was appended."""
    past = revisions.history(connection, owner, since=number - 1)
    events.append(connection, owner, kind, details, past=past)
    return past[0]
