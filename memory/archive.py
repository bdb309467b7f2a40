"""A persona as one ``.memcube`` file: a zip of JSON lines and safetensors, history included.

    manifest.json                 format, owner, kind, counts, SHA-256 and size of every other member
    cubes.jsonl                   one cube a line, oldest first; a forgotten one as id and time only
    revisions.jsonl               one revision a line: the cubes and groups it added and retired
    vectors.safetensors           one matrix per encoder; cubes name their row
    blobs/<digest>.safetensors    payloads

The same persona gives the same bytes. `import_archive` checks everything (`archive_reader`) before it
writes anything. Archives are not signed, so none can speak for the system: cubes of trust ``system`` come
in as ``import``. Cube ids are kept, except those this store has seen before, which get a new one.
"""

import hashlib
import uuid
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from sqlalchemy import Connection, insert, select, update

from persona_sdk import files
from persona_sdk.config import FrozenConfig, validate_id
from persona_sdk.errors import NotFoundError
from persona_sdk.memory import events, revisions, rows
from persona_sdk.memory.archive_format import (
    BLOBS,
    BY_ENCODER,
    CUBES,
    MANIFEST,
    REVISIONS,
    VECTORS,
    BuriedRecord,
    CubeRecord,
    Manifest,
    Member,
    RevisionRecord,
)
from persona_sdk.memory.archive_reader import Contents, damaged, opened, refuse
from persona_sdk.memory.cube import CubeDraft, CubeHeader
from persona_sdk.memory.database import translated
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.schema import (
    cubes,
    from_column,
    group_memberships,
    memberships,
    personas,
    to_column,
    tombstones,
    vectors,
)
from persona_sdk.memory.schema import revisions as revision_rows
from persona_sdk.memory.vault import SUFFIX, encode
from persona_sdk.tensors import Digest

_EPOCH = (1980, 1, 1, 0, 0, 0)


def export(store: StoreReader, owner: str, path: Path) -> Path:
    """See `MemoryStore.export`.

    Raises:
        NotFoundError: there is no such persona.
        StoreError: the file cannot be written, or a blob is damaged; nothing is left at `path`.
    """
    with store.reading() as connection:
        manifest, members, blobs = _collect(connection, owner)
    with translated(path), files.replacing(path) as partial, zipfile.ZipFile(partial, "x") as archive:
        for name, data in members.items():
            manifest.members[name] = _put(archive, name, data)
        for blob in blobs:
            name, (_, data) = f"{BLOBS}{blob}{SUFFIX}", encode(store.load_blob(owner, blob))
            manifest.members[name] = _put(archive, name, data)
        _put(archive, MANIFEST, manifest.model_dump_json().encode())
    return path


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> Member:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    info.compress_type = zipfile.ZIP_STORED if name.endswith(SUFFIX) else zipfile.ZIP_DEFLATED
    info.external_attr = 0o600 << 16
    archive.writestr(info, data)
    return Member(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def _collect(connection: Connection, owner: str) -> tuple[Manifest, dict[str, bytes], list[Digest]]:
    """The rows of one owner as members of an archive, and the blobs they name."""
    persona = connection.execute(select(personas).where(personas.c.owner == owner)).first()
    if persona is None:
        raise NotFoundError(f"There is no persona {owner!r}.", hint="Nothing was exported.")
    mine = select(vectors).where(vectors.c.owner == owner).order_by(vectors.c.seq)
    place: dict[str, dict[str, int]] = defaultdict(dict)
    matrices: dict[str, list[torch.Tensor]] = defaultdict(list)
    for row in connection.execute(mine):
        place[row.cube_id][row.encoder] = len(matrices[row.encoder])
        matrices[row.encoder].append(rows.to_vector(row.data))
    kept = [
        CubeRecord(
            id=cube.id,
            kind=cube.kind,
            text=cube.text,
            blob=cube.blob,
            header=cube.header,
            revision=cube.revision,
            vectors=place.get(cube.id, {}),
        )
        for cube in rows.read_cubes(connection, owner)
    ]
    stones = connection.execute(select(tombstones).where(tombstones.c.owner == owner).order_by("seq"))
    buried = {row.cube_id: BuriedRecord(id=row.cube_id, forgotten_at=from_column(row.at)) for row in stones}
    past = _revision_records(connection, owner)
    members = {
        CUBES: _lines([*buried.values(), *kept]),
        REVISIONS: _lines(past),
    }
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


def import_archive(
    store: StoreReader, path: Path, *, as_id: str | None = None, keep_groups: bool = False
) -> str:
    """See `MemoryStore.import_archive`."""
    target = None if as_id is None else validate_id(as_id)
    with opened(path) as contents:
        owner = target or contents.manifest.owner
        if not keep_groups:
            contents.group_spans.clear()
        blobs = contents.blob_names()
        with store.blobs_written(map(contents.blob, blobs)), store.writing() as connection:
            _admit(connection, owner, contents)
            for name in blobs:
                if not store.vault.holds(name):
                    store.vault.write(*contents.blob(name))
            _write(connection, owner, contents)
            events.append(connection, owner, "import")
    return owner


def _admit(connection: Connection, owner: str, contents: Contents) -> None:
    """Refuse an archive that would overwrite a persona or blur who is a user and who a group."""
    refuse(revisions.head(connection, owner) > 0, f"There is a persona {owner!r} already")
    groups = {span.name for span in contents.group_spans}
    with damaged():
        for group in groups:
            revisions.require_group(connection, owner, group)
        revisions.create(connection, owner, contents.manifest.kind)


def _write(connection: Connection, owner: str, contents: Contents) -> None:
    manifest, known = contents.manifest, _taken(connection, contents)
    ids = {name: uuid.uuid4().hex if name in known else name for name in (s.name for s in contents.spans)}
    for past in contents.revisions:
        when = to_column(past.created_at)
        values = {
            "number": past.number,
            "message": past.message,
            "created_at": when,
            "restores": past.restores,
        }
        connection.execute(insert(revision_rows).values(owner=owner, **values))
    for cube in contents.cubes:
        header = _reowned(cube.header, manifest.owner, owner, ids)
        draft = CubeDraft(kind=cube.kind, text=cube.text, header=header)
        rows.insert_cube(connection, owner, draft, cube.blob, cube.revision, cube_id=ids[cube.id])
    for encoder in sorted({encoder for cube in contents.cubes for encoder in cube.vectors}):
        matrix = contents.vectors[f"{BY_ENCODER}{encoder}"]
        order = sorted(
            (cube.vectors[encoder], ids[cube.id]) for cube in contents.cubes if encoder in cube.vectors
        )
        rows.insert_vectors(connection, owner, encoder, {cube_id: matrix[row] for row, cube_id in order})
    for span in contents.spans:
        values = {"cube_id": ids[span.name], "from_revision": span.start, "to_revision": span.end}
        buried = contents.buried.get(span.name)
        if buried is None:
            connection.execute(insert(memberships).values(owner=owner, **values))
        else:
            connection.execute(
                insert(tombstones).values(owner=owner, at=to_column(buried.forgotten_at), **values)
            )
    for span in contents.group_spans:
        values = {"group_id": span.name, "from_revision": span.start, "to_revision": span.end}
        connection.execute(insert(group_memberships).values(owner=owner, **values))
    when = to_column(manifest.created_at)
    connection.execute(update(personas).where(personas.c.owner == owner).values(created_at=when))
    revisions.touch(connection, owner, head=len(contents.revisions))


def _taken(connection: Connection, contents: Contents) -> set[str]:
    """Ids of the archive that this store has seen, whoever's they are."""
    wanted, taken = list({span.name for span in contents.spans}), set()
    for start in range(0, len(wanted), rows.CHUNK):
        part = wanted[start : start + rows.CHUNK]
        for column in (cubes.c.id, tombstones.c.cube_id):
            taken |= set(connection.execute(select(column).where(column.in_(part))).scalars())
    return taken


def _reowned(header: CubeHeader, before: str, owner: str, ids: Mapping[str, str]) -> CubeHeader:
    own = [
        source.model_copy(update={"owner": owner, "cube_id": ids.get(source.cube_id, source.cube_id)})
        if source.owner == before
        else source
        for source in header.sources
    ]
    trust = "import" if header.trust == "system" else header.trust
    return header.model_copy(update={"sources": tuple(own), "trust": trust})
