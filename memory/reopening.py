"""Ends that nothing accounts for any more: a statement is open again when what ended it was forgotten.

    before           "I live in Paris"  [ever, May 2024)      "I moved to Lyon in May 2024"  [May 2024, -)
    turn forgotten   "I live in Paris"  [ever, May 2024)      -
    next flush       "I live in Paris"  [ever, -)             a new version, or to the next that is left

What counts is what is still there, live or not: who was archived or rolled back still ended it. An end that
was said ("until 2019") or given by the application stays. The version before keeps the end in the history,
until the statement itself is forgotten.
"""

import threading

from sqlalchemy import Connection, func, select

from persona_sdk.memory import rows
from persona_sdk.memory.cube import CubeDraft, MemCube, TextEncoder
from persona_sdk.memory.embedding import embedded
from persona_sdk.memory.reports import FlushReport
from persona_sdk.memory.schema import cubes, from_column, tombstones
from persona_sdk.memory.slots import Held
from persona_sdk.memory.store import MemoryStore

Erased = tuple[int | None, int]  # newest tombstone and their number


class Reopener:
    """Looks through an owner's statements whenever something of it was erased since the last time."""

    def __init__(self, store: MemoryStore, embedder: TextEncoder) -> None:
        self._store = store
        self._embedder = embedder
        self._looked: dict[str, Erased] = {}
        self._lock = threading.Lock()

    def reopen(self, owner: str) -> FlushReport:
        """Commit new versions of the statements whose end is gone.

        Raises:
            RevisionConflictError: somebody else has committed; the next call tries again.
        """
        head = self._store.head(owner)
        with self._store.reading() as connection:
            erased = _erased(connection, owner)
            with self._lock:
                if erased == self._looked.get(owner, (None, 0)):
                    return FlushReport()
            found = unaccounted(connection, owner)
        added: tuple[str, ...] = ()
        retire = [name for held in found for name in held.header.parents]
        if found:
            drafts = [CubeDraft(text=held.text, header=held.header) for held in found]
            drafts = embedded(drafts, self._embedder)
            added = self._store.commit(
                owner, kind=None, add=drafts, retire=retire, message="reopen", parent=head
            ).added
        with self._lock:
            self._looked[owner] = erased
        return FlushReport(added=added, retired=tuple(retire))


def unaccounted(connection: Connection, owner: str) -> list[Held]:
    """The live statements that end where nothing begins any more, as they are to be from now on."""
    columns = (cubes.c.id, cubes.c.slot, cubes.c.valid_from, cubes.c.valid_to)
    found = connection.execute(
        select(*columns).where(cubes.c.owner == owner, cubes.c.slot.is_not(None)).order_by(cubes.c.seq)
    ).all()
    begun = {(row.slot, row.valid_from) for row in found}
    ended = [row.id for row in found if row.valid_to is not None and (row.slot, row.valid_to) not in begun]
    if not ended:
        return []
    live = rows.live_among(connection, owner, [row.id for row in found])
    given = [
        cube
        for cube in rows.lookup(connection, owner, [name for name in ended if name in live]).values()
        if _given_by_a_rival(cube)
    ]
    starts = [(row.slot, from_column(row.valid_from)) for row in found if row.id in live and row.valid_from]
    reopened = []
    for cube in given:
        held = Held.of(cube)
        later = [start for slot, start in starts if slot == held.header.slot and start > held.start]
        reopened.append(held.with_header(valid_to=min(later, default=None), parents=(cube.id,)))
    return reopened


def _given_by_a_rival(cube: MemCube) -> bool:
    """Whether the writer wrote it and its end was not said."""
    said = bool(cube.header.attributes.get("ends"))
    return "evidence" in cube.header.attributes and not said and cube.state != "frozen"


def _erased(connection: Connection, owner: str) -> Erased:
    query = select(func.max(tombstones.c.seq), func.count()).where(tombstones.c.owner == owner)
    newest, number = connection.execute(query).one()
    return newest, number
