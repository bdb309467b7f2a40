"""A persona as one ``.memcube`` file: a zip of JSON lines and safetensors, history included.

    manifest.json                 format, owner, kind, counts, SHA-256 and size of every other member
    signature.json                the store's signature of manifest.json, and so of everything
    cubes.jsonl                   one cube a line, oldest first, with its state and use; a forgotten one as
                                  id, time and reason only
    revisions.jsonl               one revision a line: the cubes and groups it added and retired
    snapshots.jsonl               names for revisions, if there are any
    vectors.safetensors           one matrix per encoder; cubes name their row
    blobs/<digest>.safetensors    payloads

The same persona of the same store gives the same bytes. Left out is what names others or this store only:
grants, the audit log, keys and pending tasks. Content is clear, also from an encrypted store, unless a
passphrase is given (`archive_passphrase`). `archive_import` reads it.
"""

import hashlib
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from io import BufferedIOBase, BytesIO
from pathlib import Path

import torch
from safetensors.torch import save
from sqlalchemy import Connection, select

from persona_sdk import files
from persona_sdk.config import FrozenConfig
from persona_sdk.errors import NotFoundError
from persona_sdk.memory import archive_passphrase, revisions, rows, signing
from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory.archive_format import (
    BLOBS,
    BY_ENCODER,
    CUBES,
    MANIFEST,
    REVISIONS,
    SIGNATURE,
    SNAPSHOTS,
    VECTORS,
    BuriedRecord,
    CubeRecord,
    Manifest,
    Member,
    RevisionRecord,
    SnapshotRecord,
    StateRecord,
    UseRecord,
)
from persona_sdk.memory.archive_reader import MAX_RATIO, MIN_BOMB
from persona_sdk.memory.database import translated
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.schema import (
    from_column,
    group_memberships,
    personas,
    snapshots,
    states,
    tombstones,
    uses,
    vectors,
)
from persona_sdk.memory.vault import SUFFIX, encode
from persona_sdk.tensors import Digest

_EPOCH = (1980, 1, 1, 0, 0, 0)


def export(store: StoreReader, owner: str, path: Path, *, passphrase: str | None = None) -> Path:
    """See `MemoryStore.export`.

    Raises:
        InvalidInputError: the passphrase is empty.
        NotFoundError: there is no such persona.
        StoreError: the file cannot be written, or a blob is damaged; nothing is left at `path`.
    """
    with translated(path), files.replacing(path) as partial:
        if passphrase is None:
            with partial.open("xb") as file:
                _write(store, owner, file)
        else:
            whole = BytesIO()
            _write(store, owner, whole)
            partial.write_bytes(archive_passphrase.seal(whole.getvalue(), passphrase))
    return path


def _write(store: StoreReader, owner: str, file: BufferedIOBase) -> None:
    with store.reading() as connection:
        manifest, members, blobs = _collect(connection, owner)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            manifest.members[name] = _put(archive, name, data)
        for blob in blobs:
            name, (_, data) = f"{BLOBS}{blob}{SUFFIX}", encode(store.load_blob(owner, blob))
            manifest.members[name] = _put(archive, name, data)
        told = manifest.model_dump_json().encode()
        _put(archive, MANIFEST, told)
        _put(archive, SIGNATURE, signing.sign(store.folder, told).model_dump_json().encode())


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> Member:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    # Text that shrinks like a bomb is stored as it is, so that it is not taken for one.
    dense = name.endswith(SUFFIX) or (
        len(data) > MIN_BOMB and len(data) > MAX_RATIO // 2 * len(zlib.compress(data))
    )
    info.compress_type = zipfile.ZIP_STORED if dense else zipfile.ZIP_DEFLATED
    info.external_attr = 0o600 << 16
    archive.writestr(info, data)
    return Member(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def _collect(connection: Connection, owner: str) -> tuple[Manifest, dict[str, bytes], list[Digest]]:
    """The rows of one owner as members of an archive, and the blobs they name."""
    persona = connection.execute(select(personas).where(personas.c.owner == owner)).first()
    if persona is None:
        raise NotFoundError(f"There is no persona {owner!r}.", hint="Nothing was exported.")
    mine = select(vectors).where(vectors.c.owner == owner).order_by(vectors.c.seq)
    cipher = ciphers.reading(connection, owner)
    place: dict[str, dict[str, int]] = defaultdict(dict)
    matrices: dict[str, list[torch.Tensor]] = defaultdict(list)
    for row in connection.execute(mine):
        place[row.cube_id][row.encoder] = len(matrices[row.encoder])
        matrices[row.encoder].append(rows.to_vector(cipher.open_vector(row.cube_id, row.encoder, row.data)))
    lives, used = _states(connection, owner), _uses(connection, owner)
    kept = [
        CubeRecord(
            id=cube.id,
            kind=cube.kind,
            text=cube.text,
            blob=cube.blob,
            header=cube.header,
            revision=cube.revision,
            vectors=place.get(cube.id, {}),
            state=lives.get(cube.id),
            use=used.get(cube.id),
        )
        for cube in rows.read_cubes(connection, owner)
    ]
    stones = connection.execute(select(tombstones).where(tombstones.c.owner == owner).order_by("seq"))
    buried = {
        row.cube_id: BuriedRecord(id=row.cube_id, forgotten_at=from_column(row.at), reason=row.reason)
        for row in stones
    }
    past = _revision_records(connection, owner)
    members = {
        CUBES: _lines([*buried.values(), *kept]),
        REVISIONS: _lines(past),
    }
    if named := _snapshots(connection, owner):
        members[SNAPSHOTS] = _lines(named)
    if matrices:
        members[VECTORS] = save(
            {f"{BY_ENCODER}{name}": torch.stack(found) for name, found in matrices.items()}
        )
    manifest = Manifest(
        owner=owner,
        kind=persona.kind,
        created_at=from_column(persona.created_at),
        counts={"cubes": len(kept), "forgotten": len(buried), "revisions": len(past)},
        members={},
    )
    return manifest, members, list(dict.fromkeys(cube.blob for cube in kept if cube.blob is not None))


def _states(connection: Connection, owner: str) -> dict[str, StateRecord]:
    return {
        row.cube_id: StateRecord(
            before=row.before,
            state=row.state,
            since=from_column(row.since),
            reason=row.reason,
            legal_basis=row.legal_basis,
        )
        for row in connection.execute(select(states).where(states.c.owner == owner))
    }


def _uses(connection: Connection, owner: str) -> dict[str, UseRecord]:
    return {
        row.cube_id: UseRecord(hits=row.hits, strength=row.strength, last_used=from_column(row.last_used))
        for row in connection.execute(select(uses).where(uses.c.owner == owner))
    }


def _snapshots(connection: Connection, owner: str) -> list[SnapshotRecord]:
    query = select(snapshots).where(snapshots.c.owner == owner).order_by(snapshots.c.name)
    return [
        SnapshotRecord(name=row.name, revision=row.revision, at=from_column(row.at))
        for row in connection.execute(query)
    ]


def _revision_records(connection: Connection, owner: str) -> list[RevisionRecord]:
    joined: dict[int, list[str]] = defaultdict(list)
    left: dict[int, list[str]] = defaultdict(list)
    table = group_memberships
    for row in connection.execute(select(table).where(table.c.owner == owner).order_by(table.c.seq)):
        joined[row.from_revision].append(row.group_id)
        left[row.to_revision].append(row.group_id)
    return [
        RevisionRecord(
            number=past.number,
            message=past.message,
            created_at=past.created_at,
            restores=past.restores,
            added=past.added,
            retired=past.retired,
            joined=tuple(joined[past.number]),
            left=tuple(left[past.number]),
        )
        for past in revisions.history(connection, owner)
    ]


def _lines(records: Iterable[FrozenConfig]) -> bytes:
    return b"".join(record.model_dump_json().encode() + b"\n" for record in records)
