"""Statements that no turn says: those of tools, and those that somebody confirms."""

from collections.abc import Sequence
from dataclasses import replace

from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import rows
from persona_sdk.memory.cube import MemCube, TextEncoder, Trust
from persona_sdk.memory.enrichment import held_of
from persona_sdk.memory.reports import FlushReport, WriterConfig
from persona_sdk.memory.settling import settled
from persona_sdk.memory.slots import UNCONFIRMED, Held
from persona_sdk.memory.statement import Statement
from persona_sdk.memory.store import MemoryStore


class Recorder:
    """Commits such statements under the same rules as those of turns. `MemoryWriter` is what callers use."""

    def __init__(self, store: MemoryStore, embedder: TextEncoder, config: WriterConfig) -> None:
        self._store = store
        self._embedder = embedder
        self._config = config

    def record(
        self, owner: str, statements: Sequence[Statement], *, trust: Trust, sources: Sequence[MemCube]
    ) -> FlushReport:
        """See `MemoryWriter.record`."""
        denied = [found for found in statements if self._config.screen.suspicious(found.text)]
        held = [held_of(found, sources, trust=trust) for found in statements if found not in denied]
        return replace(self._commit(owner, held), problems=("quarantined",) * len(denied))

    def confirm(self, owner: str, cube_id: str) -> FlushReport:
        """See `MemoryWriter.confirm`."""
        with self._store.reading() as connection:
            found = rows.live(connection, owner, [cube_id]).get(cube_id)
        if found is None:
            raise NotFoundError(
                f"No live cube {cube_id!r:.60} belongs to {owner!r}.", hint="Nothing was changed."
            )
        held = Held.of(found)
        if UNCONFIRMED not in held.header.tags:
            raise InvalidInputError(
                f"The cube {cube_id!r:.60} is not unconfirmed.", hint="Nothing was changed."
            )
        attributes = {name: value for name, value in held.header.attributes.items() if name != "slot"}
        tags = tuple(tag for tag in held.header.tags if tag != UNCONFIRMED)
        slot = held.get("slot")
        return self._commit(
            owner, [held.with_header(tags=tags, trust="confirmed", slot=slot, attributes=attributes)]
        )

    def _commit(self, owner: str, held: Sequence[Held]) -> FlushReport:
        head = self._store.head(owner)
        change = settled(self._store, self._embedder, self._config.duplicates, owner, held)
        added: tuple[str, ...] = ()
        if change.add or change.retire:
            added = self._store.commit(
                owner, kind=None, add=change.add, retire=change.retire, message="record", parent=head
            ).added
        return FlushReport.of(change, added)
