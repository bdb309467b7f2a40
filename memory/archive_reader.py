"""Reads a ``.memcube`` file that may be damaged or hostile; nothing it says is believed unchecked.

Refused: members that are unknown, doubled, renamed, encrypted, links, compressed where they should be
stored, or more than text is; larger than declared or allowed; hashes and sizes that differ from the manifest;
a signature that is wrong; records that do not parse; a history that cannot be replayed; blobs, vectors,
snapshots and cubes that do not refer to each other.
"""

import hashlib
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from torch import Tensor

from persona_sdk.config import FrozenConfig, validate_id
from persona_sdk.errors import ArchiveError, CorruptBlobError, InvalidInputError
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
    RevisionRecord,
    SnapshotRecord,
    Span,
)
from persona_sdk.memory.archive_passphrase import is_sealed, unseal
from persona_sdk.memory.cube import CubeDraft, check_vector
from persona_sdk.memory.signing import Signature
from persona_sdk.memory.vault import SUFFIX, decode, encode, parse
from persona_sdk.tensors import Digest

MAX_JSON = 256 << 20
MAX_TOTAL = 16 << 30
MAX_RATIO, MIN_BOMB = 200, 1 << 20  # text does not shrink more than this, unless it is short

_BLOB_MEMBER = re.compile(rf"{BLOBS}[0-9a-f]{{64}}{re.escape(SUFFIX)}")
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
    KeyError,
    OSError,
)
_RecordT = TypeVar("_RecordT", bound=FrozenConfig)


@dataclass
class Contents:
    """A checked archive. Blobs stay in the file and are checked again when they are read."""

    manifest: Manifest
    cubes: list[CubeRecord]
    buried: dict[str, BuriedRecord]
    revisions: list[RevisionRecord]
    snapshots: list[SnapshotRecord]
    vectors: dict[str, Tensor]
    archive: zipfile.ZipFile
    signed: bytes  # the manifest as it is in the file
    signature: Signature | None
    spans: list[Span] = field(default_factory=list)
    group_spans: list[Span] = field(default_factory=list)

    def blob(self, name: Digest) -> tuple[Digest, bytes]:
        """A blob in this store's own encoding, verified."""
        with damaged():
            bundle = decode(self.archive.read(f"{BLOBS}{name}{SUFFIX}"), name)
            return encode(bundle)

    def blob_names(self) -> list[Digest]:
        """Digests of all payloads, each once."""
        return list(dict.fromkeys(cube.blob for cube in self.cubes if cube.blob is not None))


def refuse(condition: bool, message: str) -> None:
    """Raise `ArchiveError` when `condition` holds."""
    if condition:
        raise ArchiveError(f"{message}.", hint="Nothing was written. Take the archive from its source again.")


@contextmanager
def damaged() -> Iterator[None]:
    """Turn whatever reading hostile bytes raises into `ArchiveError`, without quoting the bytes."""
    try:
        yield
    except ArchiveError:
        raise
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        refuse(True, f"A record of the archive is wrong at {where or 'its top'!r:.80}")
    except (CorruptBlobError, InvalidInputError) as error:
        raise ArchiveError(
            f"The archive holds bad content: {error.message}", hint="Nothing was written."
        ) from error
    except (*_DAMAGE, struct.error) as error:
        raise ArchiveError(
            f"The archive cannot be read ({type(error).__name__}).", hint="Nothing was written."
        ) from error


@contextmanager
def opened(path: Path, passphrase: str | None = None) -> Iterator[Contents]:
    """Open and check an archive; whose signature it has is the caller's to find out.

    Raises:
        ArchiveError: it is damaged or unsafe, or under another passphrase.
    """
    with damaged():
        plain = BytesIO(unseal(path, passphrase)) if is_sealed(path) else None
        size = path.stat().st_size if plain is None else len(plain.getbuffer())
        archive = zipfile.ZipFile(path if plain is None else plain)
    with archive:
        with damaged():
            contents = _checked(archive, size)
        yield contents


def _checked(archive: zipfile.ZipFile, size: int) -> Contents:
    infos = {info.filename: info for info in archive.infolist()}
    refuse(len(infos) != len(archive.infolist()), "The archive holds a member twice")
    refuse(sum(info.compress_size for info in infos.values()) > size, "Members of the archive overlap")
    refuse(sum(info.file_size for info in infos.values()) > MAX_TOTAL, "The archive is too large")
    for info in infos.values():
        _check_member(info)
    refuse(MANIFEST not in infos, "The archive has no manifest")
    signed = _read(archive, MANIFEST)
    manifest = Manifest.model_validate_json(signed)
    validate_id(manifest.owner)
    listed = set(infos) - {MANIFEST, SIGNATURE}
    refuse(set(manifest.members) != listed, "Manifest and members of the archive differ")
    newer = manifest.format == 1 and bool({SIGNATURE, SNAPSHOTS} & set(infos))
    refuse(newer, "An archive of format 1 has members of format 2")
    for name, member in manifest.members.items():
        refuse(
            _measure(archive, name) != (member.sha256, member.bytes),
            f"Member {name!r} is not what was exported",
        )
    lines = _read(archive, CUBES).split(b"\n")
    buried = _records(BuriedRecord, lines[: manifest.counts.get("forgotten", 0)])
    contents = Contents(
        manifest=manifest,
        cubes=_records(CubeRecord, lines[len(buried) :]),
        buried={record.id: record for record in buried},
        revisions=_records(RevisionRecord, _read(archive, REVISIONS).split(b"\n")),
        snapshots=_records(SnapshotRecord, _read(archive, SNAPSHOTS).split(b"\n"))
        if SNAPSHOTS in infos
        else [],
        vectors=dict(parse(archive.read(VECTORS))) if VECTORS in infos else {},
        archive=archive,
        signed=signed,
        signature=Signature.model_validate_json(_read(archive, SIGNATURE)) if SIGNATURE in infos else None,
    )
    found = {"cubes": len(contents.cubes), "forgotten": len(buried), "revisions": len(contents.revisions)}
    refuse(manifest.counts != found, "The archive's counts are wrong")
    _check_cubes(contents, set(infos))
    _check_vectors(contents)
    _replay(contents)
    return contents


def _check_member(info: zipfile.ZipInfo) -> None:
    name = info.orig_filename
    plain = name in (MANIFEST, CUBES, REVISIONS, SNAPSHOTS, SIGNATURE)
    known = plain or name == VECTORS or _BLOB_MEMBER.fullmatch(name) is not None
    refuse(not known or name != info.filename, f"The archive holds an unknown member {name!r:.60}")
    refuse(stat.S_ISLNK(info.external_attr >> 16), f"Member {name!r} is a link")
    refuse(bool(info.flag_bits & 0x1), f"Member {name!r} is encrypted")
    # Tensors are stored, not compressed: what is declared is there, and cannot swell while it is read.
    allowed = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if plain else (zipfile.ZIP_STORED,)
    refuse(info.compress_type not in allowed, f"Member {name!r} is compressed in a way that is not allowed")
    refuse(not plain and info.file_size != info.compress_size, f"Member {name!r} is not stored as declared")
    refuse(plain and info.file_size > MAX_JSON, f"Member {name!r} is too large")
    bomb = info.file_size > MIN_BOMB and info.file_size > MAX_RATIO * info.compress_size
    refuse(bomb, f"Member {name!r} swells more than text does")


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        data = member.read(MAX_JSON + 1)
    refuse(len(data) > MAX_JSON, f"Member {name!r} is too large")
    return data


def _measure(archive: zipfile.ZipFile, name: str) -> tuple[str, int]:
    sha, size = hashlib.sha256(), 0
    with archive.open(name) as member:
        while part := member.read(1 << 20):
            sha.update(part)
            size += len(part)
    return sha.hexdigest(), size


def _records(kind: type[_RecordT], lines: Iterable[bytes]) -> list[_RecordT]:
    return [kind.model_validate_json(line) for line in lines if line]


def _check_cubes(contents: Contents, members: set[str]) -> None:
    names = [cube.id for cube in contents.cubes]
    known = {*names, *contents.buried}
    refuse(
        len(known) != contents.manifest.counts["cubes"] + contents.manifest.counts["forgotten"],
        "A cube is doubled",
    )
    for cube in contents.cubes:
        if cube.blob is None:
            CubeDraft(kind=cube.kind, text=cube.text, header=cube.header).checked()
        else:
            refuse(cube.kind == "plaintext" or cube.text is not None, "A cube has text and tensors")
    blobs = contents.blob_names()
    expected = {MANIFEST, CUBES, REVISIONS, *(f"{BLOBS}{name}{SUFFIX}" for name in blobs)}
    refuse(
        members - {VECTORS, SNAPSHOTS, SIGNATURE} != expected, "Cubes and blobs of the archive do not match"
    )
    for name in blobs:
        contents.blob(name)


def _check_vectors(contents: Contents) -> None:
    used: dict[str, list[int]] = {}
    for cube in contents.cubes:
        for encoder, row in cube.vectors.items():
            used.setdefault(encoder, []).append(row)
    refuse(
        {f"{BY_ENCODER}{encoder}" for encoder in used} != set(contents.vectors),
        "Cubes and vectors do not match",
    )
    for encoder, taken in used.items():
        matrix = contents.vectors[f"{BY_ENCODER}{encoder}"]
        wrong = matrix.ndim != 2 or sorted(taken) != list(range(len(matrix)))
        refuse(wrong, "The rows of a vector matrix do not match the cubes")
        check_vector(matrix.flatten(), encoder)


def _replay(contents: Contents) -> None:
    """Turn revisions into intervals, refusing a history that no sequence of commits could have made."""
    refuse(not contents.revisions, "The archive has no revision")
    first: dict[str, int] = {}
    live: dict[str, Span] = {}
    member_of: dict[str, Span] = {}
    known = {cube.id for cube in contents.cubes} | set(contents.buried)
    for number, record in enumerate(contents.revisions, start=1):
        impossible = record.number != number or not 0 <= (record.restores or 0) < number
        refuse(impossible, "The archive's revisions are out of order")
        contents.spans += _step(live, record.added, record.retired, number)
        contents.group_spans += _step(member_of, record.joined, record.left, number)
        refuse(not set(record.added) <= known, "A revision adds a cube that is not there")
        for cube_id in record.added:
            first.setdefault(cube_id, number)
        for group in record.joined:
            validate_id(group, "group id")
    refuse(
        any(first.get(cube.id) != cube.revision for cube in contents.cubes),
        "A cube and its revision do not match",
    )
    refuse(any(name in live or name not in first for name in contents.buried), "A forgotten cube is live")
    names = [snapshot.name for snapshot in contents.snapshots]
    refuse(len(set(names)) != len(names), "A snapshot is doubled")
    beyond = any(snapshot.revision > len(contents.revisions) for snapshot in contents.snapshots)
    refuse(beyond, "A snapshot names a revision that is not there")


def _step(live: dict[str, Span], opened: Iterable[str], closed: Iterable[str], number: int) -> list[Span]:
    for name in closed:
        refuse(name not in live, "A revision retires what is not live")
        live.pop(name).end = number
    fresh = []
    for name in opened:
        refuse(name in live, "A revision adds what is live already")
        live[name] = Span(name, number)
        fresh.append(live[name])
    return fresh
