"""Reading turns: from a batch of one owner's new turns to candidate statements, before anything is settled.

Turns are read by conversation, each with the turn before it. Without a session only messages that were given
together are one conversation: a "Yes!" of today does not answer what was asked weeks ago. What is quarantined
or not live, as after a rollback, is neither read nor context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from persona_sdk.memory import rows, turns
from persona_sdk.memory.cube import MemCube
from persona_sdk.memory.enrichment import held_of
from persona_sdk.memory.extraction import Extractor
from persona_sdk.memory.reports import WriterConfig
from persona_sdk.memory.salience import salient
from persona_sdk.memory.screening import QUARANTINED
from persona_sdk.memory.slots import Held
from persona_sdk.memory.statement import Statement
from persona_sdk.memory.store import MemoryStore


@dataclass
class Drawn:
    """What was drawn from a batch. ``below`` counts what was not salient; ``failed`` is by cube id."""

    held: list[Held] = field(default_factory=list)
    below: int = 0
    problems: list[str] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)


class Drawer:
    """Draws statements from turns with an extractor, which may be anybody's code."""

    def __init__(self, store: MemoryStore, extractor: Extractor, config: WriterConfig) -> None:
        self._store = store
        self._extractor = extractor
        self._config = config

    def draw(self, owner: str, asked: Sequence[MemCube], places: Mapping[str, turns.Place]) -> Drawn:
        """Read the turns `asked`; `places` are those of all turns, by cube id. One that fails is left out."""
        drawn = Drawn()
        new = {cube.id for cube in asked}
        for excerpt in self._excerpts(owner, asked, places):
            try:
                self._read(excerpt, new, drawn)
            except Exception as error:
                alone = [place for place, cube in enumerate(excerpt) if cube.id in new]
                for place in alone:
                    try:
                        if len(alone) == 1:
                            raise error
                        self._read(excerpt[max(place - 1, 0) : place + 1], {excerpt[place].id}, drawn)
                    except Exception as fault:
                        drawn.failed[excerpt[place].id] = fault
        return drawn

    def _excerpts(
        self, owner: str, asked: Sequence[MemCube], places: Mapping[str, turns.Place]
    ) -> list[list[MemCube]]:
        """The turns to read, by conversation, in order."""
        ids = {(place.session, place.number): name for name, place in places.items()}
        wanted: dict[tuple[str, int], dict[int, str]] = {}
        for cube in asked:
            if (place := turns.place_of(cube)) is None:
                continue
            numbers = wanted.setdefault(_conversation(cube), {})
            if before := ids.get((place.session, place.number - 1)):
                numbers[place.number - 1] = before
            numbers[place.number] = cube.id
        named = [name for numbers in wanted.values() for name in numbers.values()]
        found = {cube.id: cube for cube in asked}
        with self._store.reading() as connection:
            live = rows.live_among(connection, owner, named)
            found |= rows.lookup(connection, owner, sorted(live - set(found)))
        readable = {
            name: cube for name, cube in found.items() if name in live and QUARANTINED not in cube.header.tags
        }
        return [
            [
                readable[name]
                for _, name in sorted(numbers.items())
                if name in readable and _conversation(readable[name]) == conversation
            ]
            for conversation, numbers in wanted.items()
        ]

    def _read(self, excerpt: Sequence[MemCube], new: set[str], drawn: Drawn) -> None:
        extraction = self._extractor.extract([turns.as_turn(cube, new=cube.id in new) for cube in excerpt])
        name = getattr(self._extractor, "name", "")
        passed = [found for found in extraction.statements if self._passes(found)]
        held = [held_of(s, [excerpt[i] for i in s.turns], trust="user", extractor=name) for s in passed]
        drawn.held += held
        drawn.below += len(extraction.statements) - len(passed)
        drawn.problems += [extraction.problem] if extraction.problem else []

    def _passes(self, found: Statement) -> bool:
        return salient(found, self._config.salience) and not self._config.screen.suspicious(found.text)


def _conversation(turn: MemCube) -> tuple[str, int]:
    """What two turns of one conversation share: the session, or without one the commit that stored them."""
    session = turn.header.origin.session
    return session, 0 if session else turn.revision
