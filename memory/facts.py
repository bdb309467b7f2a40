"""What the scheduler knows of a cube: numbers and marks, no text and no tensor.

`facts_of` reads the live cubes of one owner and how they were used. A statement that was committed again in
the same words is the same statement: its uses and its age are those of all its versions. Reads write nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory import revisions, rows, uses
from persona_sdk.memory.cube import Kind, MemCube, Sensitivity, State, Trust
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.screening import QUARANTINED
from persona_sdk.memory.slots import UNCONFIRMED
from persona_sdk.memory.uses import HALF_LIFE_DAYS

PREFIX = "prefix_kv"  # semantic type of an activation cube: keys and values of a persona's stable prefix
PROMOTION = "promotion"  # ... of one without tensors: its sources are the texts that stand in that prefix
REJECTION = "rejection"  # of a parametric cube without tensors: its sources are texts weights did not learn
ADAPTER = "adapter"
DOUBTFUL = frozenset({QUARANTINED, UNCONFIRMED})  # tags of what is kept, found, and in no prompt
_CHARACTERS = 4  # of a token of English, where nobody can count


@dataclass(frozen=True, kw_only=True)
class CubeFacts:
    """One live cube of one owner.

    ``sources`` are the owner's own cubes it was computed from, and ``complete`` says whether they are all
    live with the content they had. ``derived`` cubes were made from others by the scheduler, so they can be
    made again. ``strength`` is the decayed count of uses at ``last_used``, as in `persona_sdk.memory.uses`;
    from then on it decays with ``half_life_days``, None: not at all. ``stable_since`` is when the statement
    was first made in these words.
    """

    id: str
    kind: Kind
    created_at: datetime
    stable_since: datetime
    semantic_type: str = "fact"
    state: State = "generated"
    tokens: int = 0
    bytes: int = 0
    hits: int = 0
    strength: float = 0.0
    last_used: datetime | None = None
    half_life_days: float | None = HALF_LIFE_DAYS
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    expires_at: datetime | None = None
    tags: tuple[str, ...] = ()
    pinned: bool = False
    trust: Trust = "user"
    sensitivity: Sensitivity = "normal"
    priority: int = 0
    sources: tuple[str, ...] = ()
    complete: bool = True
    derived: bool = False

    @property
    def touched(self) -> datetime:
        """When it was last used; if never, when it was made."""
        return self.created_at if self.last_used is None else max(self.created_at, self.last_used)


def estimate_tokens(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand."""
    return -(-len(text) // _CHARACTERS)


def facts_of(
    store: StoreReader, owner: str, *, count: Callable[[str], int] = estimate_tokens
) -> tuple[CubeFacts, ...]:
    """The facts of an owner's live cubes, from one state of the store, in the order of their ids.

    Args:
        store: where the owner lives.
        owner: whose cubes.
        count: tokens of a text.
    """
    with store.reading() as connection:
        live = rows.read_cubes(connection, owner, revision=revisions.head(connection, owner))
        older = _earlier_versions(connection, owner, live)
        used = uses.read(connection, [*live, *older.values()])
        cipher = ciphers.reading(connection, owner)
    by_id = {cube.id: cube for cube in live}
    tokens = {cube.id: count(cube.text) for cube in live if cube.text}

    def size(cube: MemCube) -> int:
        if cube.blob is None:
            return len((cube.text or "").encode())
        file = store.vault.path(cipher.file_name(cube.blob))
        return file.stat().st_size if file.exists() else 0

    found = []
    for cube in live:
        header, own = cube.header, [s for s in cube.header.sources if s.owner == owner]
        same = [cube, *_same_words(cube, older)]
        mine = [used[version.id] for version in same if version.id in used]
        newest = max((use.last_used for use in mine), default=None)
        found.append(
            CubeFacts(
                id=cube.id,
                kind=cube.kind,
                semantic_type=header.semantic_type,
                state=cube.state,
                tokens=sum(tokens.get(i, 0) for i in ([cube.id] if cube.text else (s.cube_id for s in own))),
                bytes=size(cube),
                hits=sum(use.hits for use in mine),
                strength=sum(use.at(newest) for use in mine) if newest else 0.0,
                last_used=newest,
                half_life_days=uses.half_life_of(cube),
                created_at=header.created_at,
                stable_since=min(version.header.created_at for version in same),
                valid_from=header.valid_from,
                valid_to=header.valid_to,
                expires_at=header.expires_at,
                tags=header.tags,
                pinned=header.pinned and not DOUBTFUL & set(header.tags),
                trust=header.trust,
                sensitivity=header.sensitivity,
                priority=header.priority,
                sources=tuple(sorted(s.cube_id for s in own)),
                complete=all(s.cube_id in by_id and by_id[s.cube_id].sha256 == s.sha256 for s in own),
                derived=_is_derived(cube),
            )
        )
    return tuple(sorted(found, key=lambda facts: facts.id))


def _is_derived(cube: MemCube) -> bool:
    header = cube.header
    if header.trust != "system":  # an archive may claim anything
        return False
    if cube.kind == "activation":
        return header.semantic_type in (PREFIX, PROMOTION)
    return cube.kind == "parametric" and header.origin.kind == "derived"


def _earlier_versions(connection: Connection, owner: str, live: Iterable[MemCube]) -> dict[str, MemCube]:
    """All versions before these cubes, by id."""
    found: dict[str, MemCube] = {}
    wanted = {parent for cube in live for parent in cube.header.parents}
    while wanted:
        cubes = rows.lookup(connection, owner, sorted(wanted))
        found |= cubes
        wanted = {parent for cube in cubes.values() for parent in cube.header.parents} - set(found)
    return found


def _same_words(cube: MemCube, older: Mapping[str, MemCube]) -> list[MemCube]:
    """The versions before `cube` that say the same, up to the first that says something else."""
    found: dict[str, MemCube] = {}
    line: list[Any] = [*cube.header.parents]
    while line:
        version = older.get(line.pop())
        if version is None or version.id in found or version.text is None or cube.text is None:
            continue
        if version.text.split() == cube.text.split():
            found[version.id] = version
            line += version.header.parents
    return list(found.values())
