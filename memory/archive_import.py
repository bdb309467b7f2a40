"""Taking in a ``.memcube`` file: as a persona of this store, with its history, or not at all.

Everything is checked (`archive_reader`) before anything is written. An archive that this store or a trusted
key has signed is believed; from any other, cubes of trust ``system`` come in as ``import`` and frozen ones as
they were before, so that it can neither speak for the system nor forbid to forget. Under another id no
archive speaks for the system. A signature that is wrong is refused. Cube ids are kept, except those this
store has seen before, which get a new one.
"""

import uuid
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select, update

from persona_sdk.config import validate_id
from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory import events, revisions, rows, signing
from persona_sdk.memory.archive_format import BY_ENCODER, ArchiveSummary
from persona_sdk.memory.archive_reader import Contents, damaged, opened, refuse
from persona_sdk.memory.cube import CubeDraft, CubeHeader, hashed
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.schema import (
    cubes,
    group_memberships,
    memberships,
    moves,
    personas,
    snapshots,
    states,
    to_column,
    tombstones,
    uses,
)
from persona_sdk.memory.schema import revisions as revision_rows
from persona_sdk.tensors import Digest


def inspect(
    store: StoreReader, path: Path, *, trusted_keys: Collection[bytes] = (), passphrase: str | None = None
) -> ArchiveSummary:
    """See `MemoryStore.inspect_archive`."""
    with opened(path, passphrase) as contents:
        manifest, signature = contents.manifest, contents.signature
        return ArchiveSummary(
            format=manifest.format,
            owner=manifest.owner,
            kind=manifest.kind,
            created_at=manifest.created_at,
            counts=manifest.counts,
            signature="known" if _trusted(store, contents, trusted_keys) else "unknown",
            key_id=None if signature is None else signature.key_id,
        )


def _trusted(store: StoreReader, contents: Contents, keys: Collection[bytes]) -> bool:
    """Whether the archive is signed by this store or one of `keys`; a wrong signature is refused."""
    if contents.signature is None:
        return False
    found = signing.standing(store.folder, contents.signed, contents.signature, keys)
    refuse(found == "invalid", "The archive's signature is not that of its manifest")
    return found == "known"


def import_archive(
    store: StoreReader,
    path: Path,
    *,
    as_id: str | None = None,
    keep_groups: bool = False,
    trusted_keys: Collection[bytes] = (),
    passphrase: str | None = None,
    admit: Callable[[Contents], None] | None = None,
) -> str:
    """See `MemoryStore.import_archive`."""
    target = None if as_id is None else validate_id(as_id)
    with opened(path, passphrase) as contents:
        if admit is not None:
            admit(contents)
        owner, trusted = target or contents.manifest.owner, _trusted(store, contents, trusted_keys)
        if not keep_groups:
            contents.group_spans.clear()
        blobs = contents.blob_names()
        with store.blobs_written(map(contents.blob, blobs)) as new, store.writing() as connection:
            _admit(connection, owner, contents)
            for name in blobs:
                store.keep_blob(connection, owner, name, partial(_blob, contents, name), new)
            told = _write(connection, owner, contents, trusted=trusted)
            events.append(connection, owner, "import", told)
    return owner


def _blob(contents: Contents, name: Digest) -> bytes:
    return contents.blob(name)[1]


def _admit(connection: Connection, owner: str, contents: Contents) -> None:
    """Refuse an archive that would overwrite a persona or blur who is a user and who a group."""
    refuse(revisions.head(connection, owner) > 0, f"There is a persona {owner!r} already")
    groups = {span.name for span in contents.group_spans}
    with damaged():
        for group in groups:
            revisions.require_group(connection, owner, group)
        revisions.create(connection, owner, contents.manifest.kind)


def _write(connection: Connection, owner: str, contents: Contents, *, trusted: bool) -> dict[str, Any]:
    """Write all rows; what the event of the import tells of them."""
    manifest, known = contents.manifest, _taken(connection, contents)
    cipher = ciphers.writing(connection, owner)
    ids = {name: uuid.uuid4().hex if name in known else name for name in (s.name for s in contents.spans)}
    for past in contents.revisions:
        when = to_column(past.created_at)
        values = {
            "number": past.number,
            "message": cipher.seal_message(past.number, past.message),
            "created_at": when,
            "restores": past.restores,
        }
        connection.execute(insert(revision_rows).values(owner=owner, **values))
    for cube in contents.cubes:
        # What the system said of one persona it did not say of another, whoever signed.
        speaks = trusted and owner == manifest.owner
        header = _reowned(cube.header, manifest.owner, owner, ids, trusted=speaks)
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
            values |= {"at": to_column(buried.forgotten_at), "reason": buried.reason}
            connection.execute(insert(tombstones).values(owner=owner, **values))
    for span in contents.group_spans:
        values = {"group_id": span.name, "from_revision": span.start, "to_revision": span.end}
        connection.execute(insert(group_memberships).values(owner=owner, **values))
    told = _write_lives(connection, owner, contents, ids, trusted=trusted)
    when = to_column(manifest.created_at)
    connection.execute(update(personas).where(personas.c.owner == owner).values(created_at=when))
    revisions.touch(connection, owner, head=len(contents.revisions))
    return told


def _write_lives(
    connection: Connection, owner: str, contents: Contents, ids: Mapping[str, str], *, trusted: bool
) -> dict[str, Any]:
    """States of life, uses and snapshots. Only a trusted archive can forbid its owner to forget a cube."""
    told: dict[str, Any] = {"states": {}, "snapshots": {}}
    legal = {(move.before, move.state) for move in connection.execute(select(moves)).all()}
    for cube in contents.cubes:
        if (life := cube.state) is not None:
            refuse((life.before, life.state) not in legal, "A cube is in a state that nothing leads to")
            if life.state == "frozen" and not trusted:
                thawed = {"before": "generated", "state": life.before, "legal_basis": None}
                life = None if life.before == "generated" else life.model_copy(update=thawed)
        if life is not None:
            values = life.model_dump() | {"since": to_column(life.since)}
            connection.execute(insert(states).values(owner=owner, cube_id=ids[cube.id], **values))
            told["states"][ids[cube.id]] = life.state
        if cube.use is not None:
            values = cube.use.model_dump() | {"last_used": to_column(cube.use.last_used)}
            connection.execute(insert(uses).values(owner=owner, cube_id=ids[cube.id], **values))
    for snapshot in contents.snapshots:
        values = snapshot.model_dump() | {"at": to_column(snapshot.at)}
        connection.execute(insert(snapshots).values(owner=owner, **values))
        told["snapshots"][hashed(snapshot.name)] = snapshot.revision
    return told


def _taken(connection: Connection, contents: Contents) -> set[str]:
    """Ids of the archive that this store has seen, whoever's they are."""
    wanted, taken = list({span.name for span in contents.spans}), set()
    for part in rows.chunks(wanted):
        for column in (cubes.c.id, tombstones.c.cube_id):
            taken |= set(connection.execute(select(column).where(column.in_(part))).scalars())
    return taken


def _reowned(
    header: CubeHeader, before: str, owner: str, ids: Mapping[str, str], *, trusted: bool
) -> CubeHeader:
    own = [
        source.model_copy(update={"owner": owner, "cube_id": ids.get(source.cube_id, source.cube_id)})
        if source.owner == before
        else source
        for source in header.sources
    ]
    trust = "import" if header.trust == "system" and not trusted else header.trust
    parents = tuple(ids.get(name, name) for name in header.parents)
    return header.model_copy(update={"sources": tuple(own), "parents": parents, "trust": trust})
