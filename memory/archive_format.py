"""The members of a ``.memcube`` file and the records in them: what is written and what is believed."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.memory.cube import CubeHeader, Kind, UtcTime

MANIFEST, CUBES, REVISIONS, VECTORS = "manifest.json", "cubes.jsonl", "revisions.jsonl", "vectors.safetensors"
BLOBS = "blobs/"
BY_ENCODER = "vectors/"

_CubeId: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\z")]
_Hash: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


class Member(FrozenConfig):
    """Hash and size of one member."""

    sha256: _Hash
    bytes: int = Field(ge=0)


class Manifest(FrozenConfig):
    """What an archive holds."""

    format: Literal[1] = 1
    owner: str
    kind: Literal["user", "group"]
    created_at: UtcTime
    counts: dict[str, Annotated[int, Field(ge=0)]]
    members: dict[str, Member]


class CubeRecord(FrozenConfig):
    """One cube; ``vectors`` maps an encoder to a row of its matrix."""

    id: _CubeId
    kind: Kind
    text: str | None = None
    blob: _Hash | None = None
    header: CubeHeader
    revision: int
    vectors: dict[str, int] = Field(default_factory=dict)


class BuriedRecord(FrozenConfig):
    """A cube that was forgotten."""

    id: _CubeId
    forgotten_at: UtcTime


class RevisionRecord(FrozenConfig):
    """One revision and the intervals it opens and closes."""

    number: int
    message: str
    created_at: UtcTime
    restores: int | None = None
    added: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass
class Span:
    """An interval of revisions in which a cube, or a group, is live."""

    name: str
    start: int
    end: int | None = None
