"""Working out what turns say: a batch of one owner's waiting turns, in one commit.

Extraction comes first and is not repeated, however slow it is (`drawing`). Then the statements are settled
against what is stored (`settling`), and written if nobody else has committed since; otherwise they are
settled again.
"""

import logging
from collections.abc import Mapping, Sequence

from persona_sdk.errors import NotFoundError, RevisionConflictError
from persona_sdk.memory import pending, revisions, rows, turns
from persona_sdk.memory.correction_grammar import Correction, correction_in
from persona_sdk.memory.corrections import Corrections
from persona_sdk.memory.cube import MemCube, TextEncoder
from persona_sdk.memory.drawing import Drawer
from persona_sdk.memory.enrichment import Change
from persona_sdk.memory.extraction import Extractor
from persona_sdk.memory.pending import Waiting
from persona_sdk.memory.reports import Failure, FlushReport, WriterConfig
from persona_sdk.memory.settling import settled
from persona_sdk.memory.slots import Held
from persona_sdk.memory.store import MemoryStore

logger = logging.getLogger("persona_sdk.memory")

RETRIES = 16  # when somebody else commits meanwhile


class Enricher:
    """Does the tasks of the queue. `MemoryWriter` is what callers use."""

    def __init__(
        self, store: MemoryStore, embedder: TextEncoder, extractor: Extractor, config: WriterConfig
    ) -> None:
        self._store = store
        self._embedder = embedder
        self._config = config
        self._drawer = Drawer(store, extractor, config)
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

    def enrich(self, owner: str, tasks: Sequence[Waiting], places: Mapping[str, turns.Place]) -> FlushReport:
        """Do a batch in one commit; what fails is counted and does not hold up the rest."""
        if not tasks:
            return FlushReport()
        cubes = self._store.lookup(owner, [task.cube_id for task in tasks])
        drawn = self._drawer.draw(owner, list(cubes.values()), places)
        done = [task for task in tasks if task.cube_id not in drawn.failed]
        report = self._failed(owner, tasks, drawn.failed)
        report += FlushReport(below_threshold=drawn.below, problems=tuple(drawn.problems))
        return report + self._committed(owner, done, cubes, drawn.held)

    def _committed(
        self, owner: str, tasks: Sequence[Waiting], cubes: Mapping[str, MemCube], held: Sequence[Held]
    ) -> FlushReport:
        try:
            return self._commit(owner, list(tasks), cubes, held)
        except Exception as error:
            if len(tasks) <= 1:
                return self._failed(owner, tasks, {task.cube_id: error for task in tasks})
        report = FlushReport()
        for task in tasks:
            mine = [one for one in held if one.header.sources[-1].cube_id == task.cube_id]
            report += self._committed(owner, [task], cubes, mine)
        return report

    def _commit(
        self, owner: str, tasks: list[Waiting], cubes: Mapping[str, MemCube], held: Sequence[Held]
    ) -> FlushReport:
        named = sorted({source.cube_id for one in held for source in one.header.sources})
        for _ in range(RETRIES):
            with self._store.reading() as connection:
                head = revisions.head(connection, owner)
                waiting = pending.waiting(connection, owner, among=[task.cube_id for task in tasks])
                live = rows.live_among(connection, owner, named)
            there = {(task.cube_id, task.task) for task in waiting}
            tasks = [task for task in tasks if (task.cube_id, task.task) in there]
            if not tasks:
                return FlushReport()  # done by somebody else, forgotten or rolled back
            standing = [one for one in held if all(source.cube_id in live for source in one.header.sources)]
            try:
                change = settled(self._store, self._embedder, self._config.duplicates, owner, standing)
                if self._config.corrections:
                    self._add_rules(owner, [cubes[task.cube_id] for task in tasks], change)
                added = self._write(owner, change, head, tasks)
            except (RevisionConflictError, NotFoundError):
                continue
            return FlushReport.of(change, added, turns=len(tasks))
        raise RevisionConflictError("The owner is written to all the time.", hint="Flush again.")

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
            kind=None,
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
