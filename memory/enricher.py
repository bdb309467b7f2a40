"""Working out what turns say: a batch of one owner's waiting turns, in one commit.

Extraction comes first and is not repeated, however slow it is. Then the statements are settled against what
is stored, and written if nobody else has committed since; otherwise they are settled again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import NotFoundError, RevisionConflictError
from persona_sdk.memory import pending, slots, turns
from persona_sdk.memory.correction_grammar import Correction, correction_in
from persona_sdk.memory.corrections import Corrections
from persona_sdk.memory.cube import MemCube, TextEncoder
from persona_sdk.memory.enrichment import Change, Ledger, held_of
from persona_sdk.memory.extraction import Extractor
from persona_sdk.memory.pending import Waiting
from persona_sdk.memory.reports import Failure, FlushReport, WriterConfig
from persona_sdk.memory.salience import salient
from persona_sdk.memory.screening import QUARANTINED
from persona_sdk.memory.slots import Held
from persona_sdk.memory.statement import Statement
from persona_sdk.memory.store import MemoryStore

logger = logging.getLogger("persona_sdk.memory")

RETRIES = 16  # when somebody else commits meanwhile


@dataclass
class _Drawn:
    """What was drawn from a batch, before it is settled."""

    held: list[Held] = field(default_factory=list)
    below: int = 0
    problems: list[str] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)  # by cube id


class Enricher:
    """Does the tasks of the queue. `MemoryWriter` is what callers use."""

    def __init__(
        self, store: MemoryStore, embedder: TextEncoder, extractor: Extractor, config: WriterConfig
    ) -> None:
        self._store = store
        self._embedder = embedder
        self._extractor = extractor
        self._config = config
        self._corrections = Corrections(store, embedder, screen=config.screen)

    def embed(self, owner: str, tasks: Sequence[Waiting]) -> FlushReport:
        """Give vectors to turns that were stored without."""
        if not tasks:
            return FlushReport()
        found = self._store.lookup(owner, [task.cube_id for task in tasks])
        try:
            vectors = self._embedder.encode([cube.text or "" for cube in found.values()])
            self._store.add_vectors(owner, self._embedder.fingerprint, dict(zip(found, vectors, strict=True)))
            with self._store.writing(owner) as connection:
                pending.finish(connection, owner, [task for task in tasks if task.cube_id in found])
        except RevisionConflictError:
            return FlushReport()  # done by somebody else
        except Exception as error:
            return self._failed(owner, tasks, dict.fromkeys((task.cube_id for task in tasks), error))
        return FlushReport()

    def enrich(self, owner: str, tasks: Sequence[Waiting], known: Mapping[str, turns.Session]) -> FlushReport:
        """Do a batch in one commit; what fails is counted and does not hold up the rest."""
        if not tasks:
            return FlushReport()
        cubes = self._store.lookup(owner, [task.cube_id for task in tasks])
        drawn = self._draw(owner, list(cubes.values()), known)
        done = [task for task in tasks if task.cube_id not in drawn.failed]
        report = self._failed(owner, tasks, drawn.failed)
        report += FlushReport(below_threshold=drawn.below, problems=tuple(drawn.problems))
        return report + self._committed(owner, done, drawn.held)

    # Drawing ------------------------------------------------------------------------------------------

    def _draw(self, owner: str, asked: Sequence[MemCube], known: Mapping[str, turns.Session]) -> _Drawn:
        drawn = _Drawn()
        new = {cube.id for cube in asked}
        for excerpt in self._excerpts(owner, asked, known):
            try:
                self._read(excerpt, new, drawn)
            except Exception as error:  # an extractor may be anybody's code
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
        self, owner: str, asked: Sequence[MemCube], known: Mapping[str, turns.Session]
    ) -> list[list[MemCube]]:
        """The turns to read, by session, each with the turn before it; what is quarantined is no context."""
        wanted: dict[str, dict[int, str]] = {}
        for cube in asked:
            session, number = cube.header.origin.session, cube.header.attributes.get("number")
            if isinstance(number, int):
                numbers = wanted.setdefault(session, {})
                before = known.get(session, turns.Session()).found.get(number - 1)
                numbers |= {number - 1: before[0]} if before else {}
                numbers[number] = cube.id
        ids = [[numbers[number] for number in sorted(numbers)] for numbers in wanted.values()]
        found = self._store.lookup(owner, [name for part in ids for name in part])
        return [
            [found[i] for i in part if i in found and QUARANTINED not in found[i].header.tags] for part in ids
        ]

    def _read(self, excerpt: Sequence[MemCube], new: set[str], drawn: _Drawn) -> None:
        extraction = self._extractor.extract([turns.as_turn(cube, new=cube.id in new) for cube in excerpt])
        name = getattr(self._extractor, "name", "")
        passed = [found for found in extraction.statements if self._passes(found)]
        held = [held_of(s, [excerpt[i] for i in s.turns], trust="user", extractor=name) for s in passed]
        drawn.held += held
        drawn.below += len(extraction.statements) - len(passed)
        drawn.problems += [extraction.problem] if extraction.problem else []

    def _passes(self, found: Statement) -> bool:
        return salient(found, self._config.salience) and not self._config.screen.suspicious(found.text)

    # Writing ------------------------------------------------------------------------------------------

    def _committed(self, owner: str, tasks: Sequence[Waiting], held: Sequence[Held]) -> FlushReport:
        try:
            return self._commit(owner, list(tasks), held)
        except Exception as error:
            if len(tasks) <= 1:
                return self._failed(owner, tasks, {task.cube_id: error for task in tasks})
        report = FlushReport()
        for task in tasks:
            mine = [one for one in held if one.header.sources[-1].cube_id == task.cube_id]
            report += self._committed(owner, [task], mine)
        return report

    def _commit(self, owner: str, tasks: list[Waiting], held: Sequence[Held]) -> FlushReport:
        for _ in range(RETRIES):
            head = self._store.head(owner)
            with self._store.reading() as connection:
                there = {(task.cube_id, task.task) for task in pending.waiting(connection, owner)}
            tasks = [task for task in tasks if (task.cube_id, task.task) in there]
            if not tasks:
                return FlushReport()  # done by somebody else, or forgotten
            asked = self._store.lookup(owner, [task.cube_id for task in tasks])
            named = {source.cube_id for one in held for source in one.header.sources}
            there_still = self._store.lookup(owner, sorted(named))
            standing = [
                one for one in held if all(source.cube_id in there_still for source in one.header.sources)
            ]
            try:
                change = self.settled(owner, standing)
                if self._config.corrections:
                    self._add_rules(owner, list(asked.values()), change)
                added = self._write(owner, change, head, tasks)
            except (RevisionConflictError, NotFoundError):
                continue
            return FlushReport(
                turns=len(tasks),
                added=added,
                retired=tuple(change.retire),
                repeated=tuple(change.repeated),
                unconfirmed=change.unconfirmed,
            )
        raise RevisionConflictError("The owner is written to all the time.", hint="Flush again.")

    def settled(self, owner: str, held: Sequence[Held]) -> Change:
        """What statements do to those that are stored. Nothing is written."""
        if not held:
            return Change()
        encoder = self._embedder.fingerprint
        fresh = self._embedder.encode([one.text for one in held])
        ids, matrix = self._store.vectors(owner, encoder)
        near: list[str] = []
        if ids:
            close = (matrix @ fresh.T).amax(dim=1) >= min(self._config.duplicates.link, 0.999)
            near = [name for name, reached in zip(ids, close.tolist(), strict=True) if reached]
        names = sorted({one.header.slot for one in held if one.header.slot})
        with self._store.reading() as connection:
            stored = {cube.id: cube for cube in slots.stated(connection, owner, names)}
        stored |= self._store.lookup(owner, near)
        row = {name: place for place, name in enumerate(ids)}
        vectors: dict[str, Float[Tensor, "d"]] = {
            cube.text: matrix[row[name]] for name, cube in stored.items() if cube.text and name in row
        }
        vectors |= {one.text: vector for one, vector in zip(held, fresh, strict=True)}
        ledger = Ledger(list(stored.values()), vectors, self._config.duplicates)
        for one in held:
            ledger.take(one)
        change = ledger.change()
        missing = [t for t in dict.fromkeys(draft.text or "" for draft in change.add) if t not in vectors]
        vectors |= dict(zip(missing, self._embedder.encode(missing), strict=True)) if missing else {}
        change.add = [replace(d, vector=vectors[d.text or ""], encoder=encoder) for d in change.add]
        return change

    def _add_rules(self, owner: str, asked: Sequence[MemCube], change: Change) -> None:
        """The corrections among the turns; of one trigger the last one counts, as often as it was made."""
        made: dict[str, tuple[Correction, list[MemCube]]] = {}
        for cube in asked:
            found = correction_in(cube.text or "")
            if found is not None and found.scope != "turn":
                before = made.get(found.trigger)
                same = before[1] if before and before[0].rule == found.rule else []
                made[found.trigger] = (found, [*same, cube])
        rules = self._corrections.rules(owner) if made else []
        for correction, cubes in made.values():
            more = self._corrections.change(rules, correction, cubes)
            if not set(more.retire) & set(change.retire):
                change.add += more.add
                change.retire += more.retire

    def _write(self, owner: str, change: Change, head: int, tasks: list[Waiting]) -> tuple[str, ...]:
        if not change.add and not change.retire:
            with self._store.writing(owner) as connection:
                pending.finish(connection, owner, tasks)
            return ()
        revision = self._store.commit(
            owner,
            kind=self._store.kind_of(owner) or "user",
            add=change.add,
            retire=change.retire,
            message="enrich",
            parent=head,
            also=lambda connection, _: pending.finish(connection, owner, tasks),
        )
        return revision.added

    def _failed(self, owner: str, tasks: Sequence[Waiting], errors: Mapping[str, Exception]) -> FlushReport:
        failed = [task for task in tasks if task.cube_id in errors]
        if not failed:
            return FlushReport()
        with self._store.writing(owner) as connection:
            pending.fail(connection, owner, failed)
        found = []
        for task in failed:
            error = errors[task.cube_id]
            logger.warning("a task of the memory queue failed: %s", type(error).__name__)
            text = f"{type(error).__name__}: {error}"[:300]
            found.append(Failure(owner, task.cube_id, task.task, task.attempts + 1, text))
        return FlushReport(failures=tuple(found))
