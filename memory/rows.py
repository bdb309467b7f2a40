"""Cubes and vectors as rows: how they are written, read back and scoped to one owner.

Every function works inside the caller's transaction and takes the owner it is about.
"""

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from sqlalchemy import Connection, Select, Table, bindparam, func, insert, select
from torch import Tensor

from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory.cipher import CLEAR, OwnerCipher
from persona_sdk.memory.cube import CubeDraft, CubeHeader, MemCube, Source, State, check_vector
from persona_sdk.memory.schema import cubes, live_at, memberships, sources, states, to_column, vectors
from persona_sdk.tensors import Digest

FIRST: State = "generated"  # of a cube that has no row in `states`
CHUNK = 500  # ids in one statement; SQLite limits the parameters of a statement


def chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """`ids` in parts that one statement can take."""
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))


def to_cube(row: Any, cipher: OwnerCipher = CLEAR) -> MemCube:
    """The cube in a row of the ``cubes`` table, opened with its owner's cipher."""
    header, blob = cipher.open_header(row.id, row.header, row.blob)
    text = None if row.text is None else cipher.open_text(row.id, row.text)
    parsed, state = CubeHeader.stored(header), row.state or FIRST
    return MemCube(row.id, row.owner, row.kind, text, blob, parsed, row.revision, state)


def select_cubes(*, join: Table | None = None) -> Select[Any]:
    """All columns of cubes, with their state; `join` is another table that hangs on them."""
    same = (states.c.owner == cubes.c.owner) & (states.c.cube_id == cubes.c.id)
    tables = cubes.outerjoin(states, same) if join is None else cubes.join(join).outerjoin(states, same)
    return select(cubes, states.c.state).select_from(tables)


# What every commit and every search executes is built once: building a statement and the key of its compiled
# form takes longer than executing it.
_LOOKUP = select_cubes().where(
    cubes.c.owner == bindparam("of"), cubes.c.id.in_(bindparam("ids", expanding=True))
)
_OWNED = select(cubes.c.id).where(
    cubes.c.owner == bindparam("of"), cubes.c.id.in_(bindparam("ids", expanding=True))
)
_LIVE = select(memberships.c.cube_id).where(
    memberships.c.owner == bindparam("of"),
    memberships.c.to_revision.is_(None),
    memberships.c.cube_id.in_(bindparam("ids", expanding=True)),
)
_EMBEDDED = select(vectors.c.cube_id).where(
    vectors.c.owner == bindparam("of"),
    vectors.c.encoder == bindparam("by"),
    vectors.c.cube_id.in_(bindparam("ids", expanding=True)),
)
_BYTES_LONG = (
    select(func.length(vectors.c.data))
    .where(vectors.c.owner == bindparam("of"), vectors.c.encoder == bindparam("by"))
    .limit(1)
)
_ADD_CUBE, _ADD_SOURCE, _ADD_VECTOR = insert(cubes), insert(sources), insert(vectors)


def read_cubes(
    connection: Connection, owner: str, *, revision: int | None = None, kind: str | None = None
) -> list[MemCube]:
    """Cubes live at a revision, or all there ever were and were not forgotten, oldest first."""
    query = select_cubes(join=None if revision is None else memberships).where(cubes.c.owner == owner)
    if revision is not None:
        query = query.where(live_at(memberships, owner, revision))
    if kind is not None:
        query = query.where(cubes.c.kind == kind)
    cipher = ciphers.reading(connection, owner)
    return [to_cube(row, cipher) for row in connection.execute(query.order_by(cubes.c.seq))]


def lookup(connection: Connection, owner: str, ids: Sequence[str]) -> dict[str, MemCube]:
    """The owner's cubes among `ids`, live or not; what is not there is left out."""
    found: dict[str, MemCube] = {}
    cipher = ciphers.reading(connection, owner)
    for part in chunks(ids):
        rows = connection.execute(_LOOKUP, {"of": owner, "ids": part})
        found |= {row.id: to_cube(row, cipher) for row in rows}
    return {cube_id: found[cube_id] for cube_id in ids if cube_id in found}


def live_among(connection: Connection, owner: str, ids: Sequence[str]) -> set[str]:
    """Those of the owner's cubes among `ids` that are live now."""
    return _named_by(_LIVE, connection, owner, ids)


def owned(connection: Connection, owner: str, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that are cubes of the owner, live or not."""
    return _named_by(_OWNED, connection, owner, ids)


def _named_by(query: Select[str], connection: Connection, owner: str, ids: Sequence[str]) -> set[str]:
    return {
        found
        for part in chunks(ids)
        for found in connection.execute(query, {"of": owner, "ids": part}).scalars()
    }


def live(connection: Connection, owner: str, ids: Sequence[str]) -> dict[str, MemCube]:
    """The owner's cubes among `ids` that are live now, in their order."""
    names = live_among(connection, owner, ids)
    return lookup(connection, owner, [cube_id for cube_id in ids if cube_id in names])


def insert_cube(
    connection: Connection,
    owner: str,
    draft: CubeDraft,
    blob: Digest | None,
    number: int,
    cube_id: str | None = None,
) -> str:
    """Write a draft as a cube of revision `number`; return its id. Opens no interval."""
    name, cipher = cube_id or uuid.uuid4().hex, ciphers.writing(connection, owner)
    header = draft.header.model_dump_json()
    require_readable(header)
    text = None if draft.text is None else cipher.seal_text(name, draft.text)
    values: dict[str, Any] = {"owner": owner, "id": name, "kind": draft.kind, "text": text}
    values |= {"revision": number, "slot": draft.header.slot}
    values["header"], values["blob"] = cipher.seal_header(name, header, blob)
    for moment in ("valid_from", "valid_to", "expires_at"):
        found = getattr(draft.header, moment)
        values[moment] = None if found is None else to_column(found)
    connection.execute(_ADD_CUBE, values)
    if links := {(source.owner, source.cube_id) for source in draft.header.sources}:
        rows = [
            {"owner": owner, "cube_id": name, "source_owner": o, "source_id": i} for o, i in sorted(links)
        ]
        connection.execute(_ADD_SOURCE, rows)
    if draft.vector is not None and draft.encoder is not None:
        _write_vectors(connection, owner, draft.encoder, {name: draft.vector})  # new: it has none yet
    return name


def require_readable(header: str) -> None:
    """Raise `InvalidInputError` for a header that could be written but never read again, such as one with
    attributes nested deeper than the reader goes, or made without validation.
    """
    try:
        CubeHeader.model_validate_json(header)
    except ValueError as error:
        raise InvalidInputError(
            "The header of a cube could be written but not read again.",
            hint="Keep attributes flat and plain JSON.",
        ) from error


def require_sources(connection: Connection, wanted: Collection[Source]) -> None:
    """Check that every source exists with the content it is said to have had.

    Something derived from a cube that was forgotten meanwhile must not outlive it.

    Raises:
        NotFoundError: one does not, or has other content.
    """
    for source in wanted:
        cube = lookup(connection, source.owner, [source.cube_id]).get(source.cube_id)
        if cube is None or cube.sha256 != source.sha256:
            raise NotFoundError(
                f"The source {source.cube_id!r:.60} is gone or has other content.",
                hint="Derive from what is there now; nothing was committed.",
            )


def insert_vectors(connection: Connection, owner: str, encoder: str, given: Mapping[str, Tensor]) -> int:
    """Write the vectors of cubes that have none yet for this encoder; return how many were written.

    Raises:
        InvalidInputError: a vector is unusable or of another length than the encoder's others.
        NotFoundError: a cube is not the owner's.
    """
    if missing := set(given) - owned(connection, owner, list(given)):
        raise NotFoundError(
            f"No cube {min(missing)!r:.60} belongs to {owner!r}.", hint="Nothing was written."
        )
    present: set[str] = set()
    for part in chunks(list(given)):
        asked = {"of": owner, "by": encoder, "ids": part}
        present |= set(connection.execute(_EMBEDDED, asked).scalars())
    return _write_vectors(connection, owner, encoder, given, present)


def _write_vectors(
    connection: Connection,
    owner: str,
    encoder: str,
    given: Mapping[str, Tensor],
    present: Collection[str] = (),
) -> int:
    bytes_long = connection.execute(_BYTES_LONG, {"of": owner, "by": encoder}).scalar()
    fresh, cipher = [], ciphers.writing(connection, owner)
    for cube_id, vector in given.items():
        plain = check_vector(vector, encoder).numpy().astype("<f4").tobytes()
        data = cipher.seal_vector(cube_id, encoder, plain)
        if len(data) != (bytes_long := bytes_long or len(data)):
            raise InvalidInputError(
                f"A vector of length {len(plain) // 4} was given.",
                hint=f"This encoder's have {(bytes_long - cipher.overhead) // 4}.",
            )
        if cube_id not in present:
            fresh.append({"owner": owner, "cube_id": cube_id, "encoder": encoder, "data": data})
    if fresh:
        connection.execute(_ADD_VECTOR, fresh)
    return len(fresh)


def to_vector(data: bytes) -> Float32[Tensor, "d"]:
    """The vector in a row of the ``vectors`` table."""
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))


def vector_ids(connection: Connection, owner: str, encoder: str, revision: int) -> list[str]:
    """Ids of the live cubes that have a vector of this encoder, in the order of `read_vectors`."""
    query = _live_vectors(select(vectors.c.cube_id), owner, encoder, revision)
    return list(connection.execute(query).scalars())


def read_vectors(
    connection: Connection, owner: str, encoder: str, revision: int, *, skip: int = 0
) -> tuple[list[str], Float32[Tensor, "n d"]]:
    """The live vectors of an encoder after the first `skip`; ``[0, 0]`` when there is none."""
    query = _live_vectors(select(vectors.c.cube_id, vectors.c.data), owner, encoder, revision)
    found = connection.execute(query.offset(skip)).all()
    if not found:
        return [], torch.zeros(0, 0)
    cipher = ciphers.reading(connection, owner)
    flat = to_vector(b"".join(cipher.open_vector(row.cube_id, encoder, row.data) for row in found))
    return [row.cube_id for row in found], flat.reshape(len(found), -1)


def _live_vectors(
    query: Select[tuple[str]] | Select[tuple[str, bytes]], owner: str, encoder: str, revision: int
) -> Select[tuple[str]] | Select[tuple[str, bytes]]:
    same_cube = (memberships.c.owner == vectors.c.owner) & (memberships.c.cube_id == vectors.c.cube_id)
    joined = query.select_from(vectors.join(memberships, same_cube))
    mine = (vectors.c.owner == owner) & (vectors.c.encoder == encoder)
    return joined.where(mine, live_at(memberships, owner, revision)).order_by(vectors.c.seq)


def without_vector(connection: Connection, owner: str, encoder: str) -> list[MemCube]:
    """Plaintext cubes, live or not, that have no vector of this encoder, oldest first."""
    embedded = select(vectors.c.cube_id).where(vectors.c.owner == owner, vectors.c.encoder == encoder)
    query = select_cubes().where(
        cubes.c.owner == owner, cubes.c.kind == "plaintext", cubes.c.id.not_in(embedded)
    )
    cipher = ciphers.reading(connection, owner)
    return [to_cube(row, cipher) for row in connection.execute(query.order_by(cubes.c.seq))]
