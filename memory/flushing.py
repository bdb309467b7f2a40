"""Working through one owner's queue: batch by batch, each task once, whatever fails."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from persona_sdk.memory import pending
from persona_sdk.memory.cube import TextEncoder
from persona_sdk.memory.enricher import Enricher
from persona_sdk.memory.extraction import Extractor
from persona_sdk.memory.flush_errors import FlushErrors
from persona_sdk.memory.intake import Intake
from persona_sdk.memory.pending import Waiting
from persona_sdk.memory.reopening import Reopener
from persona_sdk.memory.reports import Failure, FlushReport, WriterConfig
from persona_sdk.memory.store import MemoryStore

logger = logging.getLogger("persona_sdk.memory")

OnUse = Callable[[str, Sequence[str]], None]  # owner, ids of the cubes that turns repeated


class Flusher:
    """Does what waits and knows why something failed. `MemoryWriter` is what callers use."""

    def __init__(
        self,
        store: MemoryStore,
        embedder: TextEncoder,
        extractor: Extractor,
        config: WriterConfig,
        intake: Intake,
        on_use: OnUse | None,
    ) -> None:
        self._store = store
        self._config = config
        self._intake = intake
        self._enricher = Enricher(store, embedder, extractor, config)
        self._reopener = Reopener(store, embedder)
        self._on_use = on_use
        self.errors = FlushErrors()
        store.on_forget(self.errors.drop)

    def flush(self, owner: str) -> FlushReport:
        """Try every waiting task of the owner once, also those that come meanwhile."""
        report, tried = self._reopened(owner), set[tuple[str, str]]()
        while tasks := [t for t in self._waiting(owner) if (t.cube_id, t.task) not in tried]:
            tried |= {(task.cube_id, task.task) for task in tasks}
            tasks = [task for task in tasks if task.attempts < self._config.attempts]
            for start in range(0, len(tasks), self._config.batch):
                report += self._batch(owner, tasks[start : start + self._config.batch])
        self.errors.note(report.failures)
        waiting = self._waiting(owner)  # read after, so that no error of what is forgotten meanwhile stays
        self.errors.keep(owner, waiting)
        return replace(report, waiting=len(waiting))

    def failures(self, owner: str) -> list[Failure]:
        """The owner's tasks that have failed at least once and were not done since."""
        return [
            Failure(owner, t.cube_id, t.task, t.attempts, self.errors.of(owner, t))
            for t in self._waiting(owner)
            if t.attempts
        ]

    def _reopened(self, owner: str) -> FlushReport:
        try:
            return self._reopener.reopen(owner)
        except Exception as error:  # somebody else's commit, or an embedder: the queue does not wait for it
            logger.warning("statements are reopened by a later flush: %s", type(error).__name__)
            return FlushReport()

    def _waiting(self, owner: str) -> list[Waiting]:
        with self._store.reading() as connection:
            return pending.waiting(connection, owner)

    def _batch(self, owner: str, tasks: Sequence[Waiting]) -> FlushReport:
        _, places = self._intake.places(owner)
        report = self._enricher.embed(owner, [task for task in tasks if task.task == "embed"])
        report += self._enricher.enrich(owner, [task for task in tasks if task.task == "enrich"], places)
        if report.repeated and self._on_use is not None:
            try:
                self._on_use(owner, report.repeated)
            except Exception:  # somebody else's code; what it is told of is committed
                logger.exception("on_use failed")
        return report
