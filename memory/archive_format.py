"""The members of a ``.memcube`` file and the records in them: what is written and what is believed."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.memory.cube import CubeHeader, Kind, State, UtcTime

SNAPSHOTS, SIGNATURE = "snapshots.jsonl", "signature.json"
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
    """What an archive holds. Format 1 had no states, uses, snapshots and signature."""

    format: Literal[1, 2] = 2
    owner: str
    kind: Literal["user", "group"]
    created_at: UtcTime
    counts: dict[str, Annotated[int, Field(ge=0)]]
    members: dict[str, Member]


class StateRecord(FrozenConfig):
    """The state of life of a cube that has left the first one."""

    before: State
    state: State
    since: UtcTime
    reason: str = ""
    legal_basis: str | None = None


class UseRecord(FrozenConfig):
    """How often and when a cube was used."""

    hits: int = Field(ge=0, lt=1 << 53)
    strength: float = Field(ge=0)
    last_used: UtcTime


class CubeRecord(FrozenConfig):
    """One cube; ``vectors`` maps an encoder to a row of its matrix."""

    id: _CubeId
    kind: Kind
    text: str | None = None
    blob: _Hash | None = None
    header: CubeHeader
    revision: int
    vectors: dict[str, int] = Field(default_factory=dict)
    state: StateRecord | None = None
    use: UseRecord | None = None


class BuriedRecord(FrozenConfig):
    """A cube that was forgotten."""

    id: _CubeId
    forgotten_at: UtcTime
    reason: str = Field("forgotten", pattern=r"^[a-z_]{1,32}\z")


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


class SnapshotRecord(FrozenConfig):
    """A name for a revision."""

    name: str = Field(min_length=1, max_length=256)
    revision: int = Field(ge=0)
    at: UtcTime


class ArchiveSummary(FrozenConfig):
    """What an archive says of itself, after all of it was checked, and whose signature it has.

    ``known``: this store's or a trusted key's. ``unknown``: nobody's, or one that cannot be checked or is
    not trusted here. One that is wrong does not get this far.
    """

    format: int
    owner: str
    kind: Literal["user", "group"]
    created_at: UtcTime
    counts: dict[str, int]
    signature: Literal["known", "unknown"]
    key_id: str | None


@dataclass
class Span:
    """An interval of revisions in which a cube, or a group, is live."""

    name: str
    start: int
    end: int | None = None
