"""Writing without a language model: turns are stored at once, what they say is worked out afterwards.

    observe    every turn verbatim, with its vector, and a task in the queue: one transaction
    flush      for each owner, batch by batch: extract, gate, settle contradictions, fold duplicates, and
               take the tasks out of the queue: one transaction a batch

What was observed is found by the next search. A crash between the two leaves the task in the queue; one
that fails is tried by later flushes, three times in all, and then reported by `MemoryWriter.failures`. The
turn is there whatever happens to its enrichment. Statements name their turns as sources, so forgetting a
turn erases them; what they had ended is open again after the owner's next flush (`reopening`).

Only live turns are enriched. The tasks of a turn that was rolled back rest in the queue, not counted as
waiting, and are done if a later rollback brings the turn back.
"""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from persona_sdk.config import validate_id
from persona_sdk.errors import NotFoundError
from persona_sdk.memory import pending, turns
from persona_sdk.memory.cube import MemCube, TextEncoder, Trust
from persona_sdk.memory.extraction import Extractor, RuleExtractor
from persona_sdk.memory.flush_worker import FlushWorker
from persona_sdk.memory.flushing import Flusher, OnUse
from persona_sdk.memory.intake import Intake
from persona_sdk.memory.recording import Recorder
from persona_sdk.memory.reports import Failure, FlushReport, Observed, WriterConfig
from persona_sdk.memory.statement import Statement
from persona_sdk.memory.store import MemoryStore


class MemoryWriter:
    """Takes in conversations of any owner of one store; thread-safe. A context manager, for its worker.

    Args:
        store: where everything goes.
        embedder: embeds turns and statements.
        extractor: draws statements from turns; rules, if none is given.
        config: thresholds.
        on_use: told the owner and the ids of the cubes that turns repeated, after the commit.
    """

    def __init__(
        self,
        store: MemoryStore,
        embedder: TextEncoder,
        *,
        extractor: Extractor | None = None,
        config: WriterConfig | None = None,
        on_use: OnUse | None = None,
    ) -> None:
        self.config = config or WriterConfig()
        self._store = store
        self._intake = Intake(store, embedder, self.config.screen)
        chosen = extractor or RuleExtractor()
        self._flusher = Flusher(store, embedder, chosen, self.config, self._intake, on_use)
        self._recorder = Recorder(store, embedder, self.config)
        self._flushing = threading.RLock()
        self._worker = FlushWorker(self.flush)

    def observe(
        self,
        owner: str,
        messages: turns.Messages,
        *,
        session: str = "",
        start: int | None = None,
        system: str = "",
        kind: str = "user",
    ) -> Observed:
        """Store messages verbatim and queue their enrichment. They are found by the next search.

        System messages are not stored; what repeats one, or `system`, is not taken for the user's own words.

        Args:
            owner: whose memory it is; a new id begins a persona.
            messages: a string, or messages with ``role``, ``content`` and, if known, ``at``.
            session: the conversation they belong to.
            start: number of the first message in it, so that a message given twice is stored once. None
                appends.
            system: the system prompt the conversation runs under.
            kind: of a new persona, ``"user"`` or ``"group"``.

        Raises:
            InvalidInputError: a message cannot be stored, or its number holds another one; nothing was
            stored.
            StoreError: the store cannot be written; nothing was stored.
        """
        observed = self._intake.observe(owner, messages, session, start, system, kind)
        self._worker.wake()
        return observed

    def flush(self, owner: str | None = None) -> FlushReport:
        """Try every waiting task once, in order, and say what came of it. Nothing lags behind after it.

        Args:
            owner: whose tasks; None does everybody's.

        Raises:
            NotFoundError: there is no such persona.
        """
        if owner is not None:
            self._require(owner)
        with self._flushing:
            report = FlushReport()
            for name in self._owners() if owner is None else [owner]:
                report += self._flusher.flush(name)
            return report

    def _owners(self) -> list[str]:
        with self._store.reading() as connection:
            return pending.owners(connection, attempts=self.config.attempts)

    def _require(self, owner: str) -> None:
        if self._store.kind_of(validate_id(owner)) is None:
            raise NotFoundError(
                f"There is no persona {owner!r}.", hint="A persona begins with its first turn."
            )

    def failures(self, owner: str) -> list[Failure]:
        """The owner's tasks that have failed at least once and were not done since.

        ``error`` is known to the writer that tried.

        Raises:
            NotFoundError: there is no such persona.
        """
        self._require(owner)
        return self._flusher.failures(owner)

    def retry(self, owner: str) -> int:
        """Give the owner's failed tasks new attempts; how many there were.

        Raises:
            NotFoundError: there is no such persona.
        """
        self._require(owner)
        with self._store.writing(owner) as connection:
            found = pending.reset(connection, owner)
        self._worker.wake()
        return found

    # Statements from elsewhere ------------------------------------------------------------------------

    def record(
        self, owner: str, statements: Sequence[Statement], *, trust: Trust, sources: Sequence[MemCube] = ()
    ) -> FlushReport:
        """Store statements that come from elsewhere, as from a tool, under the same rules as those of turns.

        Those that read like an instruction to the model are left out and reported as problems.

        Raises:
            NotFoundError: there is no such persona, or a source is gone; nothing was stored.
        """
        self._require(owner)
        return self._recorder.record(owner, statements, trust=trust, sources=sources)

    def confirm(self, owner: str, cube_id: str) -> FlushReport:
        """Take an unconfirmed statement for true: it takes its slot with trust "confirmed".

        Raises:
            NotFoundError: the owner has no such live cube.
            InvalidInputError: it is not unconfirmed.
        """
        self._require(owner)
        return self._recorder.confirm(owner, cube_id)

    # The worker ---------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Flush in a thread of its own, now and whenever something was observed, until `close`."""
        self._worker.start()
        return self

    def close(self) -> None:
        """Stop the worker after the flush it is in. What still waits stays in the queue."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
