"""Writing without a language model: turns are stored at once, what they say is worked out afterwards.

    observe    every turn verbatim, with its vector, and a task in the queue: one transaction
    flush      for each owner, batch by batch: extract, gate, settle contradictions, fold duplicates, and take the
               tasks out of the queue: one transaction a batch

What was observed is found by the next search. A crash between the two leaves the task in the queue; one that fails
is tried by later flushes, three times in all, and then reported by `MemoryWriter.failures`. The turn is there
whatever happens to its enrichment. Statements name their turns as sources, so forgetting a turn erases them.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self, TypeAlias

from jaxtyping import Float
from pydantic import Field
from sqlalchemy import Connection
from torch import Tensor

from persona_sdk.config import FrozenConfig, validate_id
from persona_sdk.errors import InvalidInputError, NotFoundError, PersonaError, RevisionConflictError
from persona_sdk.memory import pending, slots, turns
from persona_sdk.memory.corrections import Corrections, distil
from persona_sdk.memory.cube import CubeDraft, MemCube, Source, TextEncoder, Trust, utc_now
from persona_sdk.memory.duplicates import DuplicateConfig
from persona_sdk.memory.enrichment import Change, Ledger, held_of
from persona_sdk.memory.extraction import Extraction, Extractor, RuleExtractor
from persona_sdk.memory.pending import Waiting
from persona_sdk.memory.salience import SalienceConfig, echoes, salient
from persona_sdk.memory.screening import QUARANTINED, Screen
from persona_sdk.memory.slots import UNCONFIRMED, Held
from persona_sdk.memory.statement import Statement
from persona_sdk.memory.store import MemoryStore

logger = logging.getLogger("persona_sdk.memory")

RETRIES = 8  # of a batch, when somebody else commits meanwhile
SESSIONS = 256  # owners whose message numbers are kept in memory


class WriterConfig(FrozenConfig):
    """How turns become statements."""

    salience: SalienceConfig = SalienceConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    screen: Screen = Screen()
    batch: int = Field(32, ge=1, description="turns of one owner in one commit")
    attempts: int = Field(3, ge=1, description="after so many failures a task is left alone")
    corrections: bool = Field(True, description="also distil corrections to rules")


@dataclass(frozen=True)
class Observed:
    """What `MemoryWriter.observe` stored. ``problem`` says why the turns have no vector yet, "" if they have."""

    turns: tuple[MemCube, ...]
    queued: int
    quarantined: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Failure:
    """A task that failed, and how often. ``error`` is known to the process that tried, else ""."""

    owner: str
    cube_id: str
    task: str
    attempts: int
    error: str = ""


@dataclass(frozen=True)
class FlushReport:
    """What a flush did. ``ok`` is False if anything failed; ``waiting`` counts what is left in the queue."""

    turns: int = 0
    added: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    unconfirmed: int = 0
    below_threshold: int = 0
    problems: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    waiting: int = 0

    @property
    def ok(self) -> bool:
        """Whether every task was done."""
        return not self.failures

    def __add__(self, other: "FlushReport") -> "FlushReport":
        """Both together."""
        return FlushReport(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


Read: TypeAlias = tuple[MemCube, Extraction]


class MemoryWriter:
    """Takes in conversations of any owner of one store; thread-safe. A context manager, for its worker.

    Args:
        store: where everything goes.
        embedder: embeds turns and statements.
        extractor: draws statements from turns; rules, if none is given.
        config: thresholds.
        on_use: told the owner and the cubes that a turn repeated, after the commit.
    """

    def __init__(
        self,
        store: MemoryStore,
        embedder: TextEncoder,
        *,
        extractor: Extractor | None = None,
        config: WriterConfig | None = None,
        on_use: Callable[[str, Sequence[str]], None] | None = None,
    ) -> None:
        self.config = config or WriterConfig()
        self._store = store
        self._embedder = embedder
        self._extractor = extractor or RuleExtractor()
        self._corrections = Corrections(store, embedder, screen=self.config.screen)
        self._on_use = on_use
        self._errors: dict[tuple[str, str, str], str] = {}
        self._sessions: OrderedDict[str, tuple[str, dict[str, turns.Session]]] = OrderedDict()
        self._lock = threading.RLock()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._worker: threading.Thread | None = None

    # Taking in ----------------------------------------------------------------------------------------

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
            InvalidInputError: a message cannot be stored, or its number holds another one; nothing was stored.
            StoreError: the store cannot be written; nothing was stored.
        """
        validate_id(owner)
        parsed = turns.parse(messages)
        prompts = [system, *(message.content for message in parsed if message.role == "system")]
        now = utc_now()
        for _ in range(RETRIES):
            head, known = self._known(owner)
            there = known.get(session, turns.Session())
            first = there.next if start is None else start
            new, result = [], dict[int, str]()
            spoken = [message for message in parsed if message.role != "system"]
            for number, message in enumerate(spoken, first):
                if number in there.found:
                    result[number] = self._same(there, number, message, session)
                elif message.content.strip():
                    new.append((number, message))
            drafts = [self._draft(m, session, n, now, prompts) for n, m in new]
            drafts, problem = self._embedded(drafts)
            try:
                ids = self._store_turns(owner, kind, head, drafts) if drafts else ()
            except RevisionConflictError:
                continue
            result |= {number: cube_id for (number, _), cube_id in zip(new, ids, strict=True)}
            found = self._store.lookup(owner, [result[number] for number in sorted(result)])
            self._wake.set()
            marked = sum(QUARANTINED in draft.header.tags for draft in drafts)
            return Observed(tuple(found.values()), sum(map(_to_enrich, drafts)), marked, problem)
        raise RevisionConflictError(f"{owner!r} is written to all the time.", hint="Observe again.")

    def _draft(
        self, message: turns.Message, session: str, number: int, now: datetime, prompts: Sequence[str]
    ) -> CubeDraft:
        tags = (QUARANTINED,) if self.config.screen.suspicious(message.content) else ()
        spans = echoes(message.content, filter(None, prompts)) if message.role == "user" else []
        return turns.draft(message, session=session, number=number, at=now, tags=tags, echoes=spans)

    def _store_turns(self, owner: str, kind: str, head: int, drafts: Sequence[CubeDraft]) -> tuple[str, ...]:
        def queue(connection: Connection, ids: Sequence[str]) -> None:
            bare = [name for name, draft in zip(ids, drafts, strict=True) if draft.vector is None]
            asked = [name for name, draft in zip(ids, drafts, strict=True) if _to_enrich(draft)]
            pending.enqueue(connection, owner, bare, "embed")
            pending.enqueue(connection, owner, asked, "enrich")

        return self._store.commit(owner, kind=kind, add=drafts, message="observe", parent=head, also=queue).added

    def _known(self, owner: str) -> tuple[int, dict[str, turns.Session]]:
        """The newest revision and the stored messages by session, read anew when the owner has changed."""
        head, stamp = self._store.mark(owner)
        with self._lock:
            cached = self._sessions.get(owner)
            if cached is None or cached[0] != stamp:
                cached = (stamp, turns.sessions(self._store.all_cubes(owner)))
            self._sessions[owner] = cached
            self._sessions.move_to_end(owner)
            while len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)
        return head, cached[1]

    @staticmethod
    def _same(there: turns.Session, number: int, message: turns.Message, session: str) -> str:
        cube_id, digest = there.found[number]
        if digest != turns.digest(message.role, message.content):
            raise InvalidInputError(
                f"Message {number} of session {session!r:.60} is stored with another content.",
                hint="Give edited messages a session of their own; nothing was stored.",
            )
        return cube_id

    def _embedded(self, drafts: list[CubeDraft]) -> tuple[list[CubeDraft], str]:
        """The drafts with vectors, or as they are and what went wrong."""
        try:
            vectors = self._embedder.encode([draft.text or "" for draft in drafts]) if drafts else ()
        except Exception as error:  # whatever an embedder raises: the raw turn is worth more
            logger.warning("turns are stored without vectors: %s", type(error).__name__)
            return drafts, f"{type(error).__name__}: {error}"
        name = self._embedder.fingerprint
        pairs = zip(drafts, vectors, strict=True)
        return [replace(draft, vector=vector, encoder=name) for draft, vector in pairs], ""

    # Working out --------------------------------------------------------------------------------------

    def flush(self, owner: str | None = None) -> FlushReport:
        """Try every waiting task once, in order, and say what came of it. After it nothing lags behind.

        Args:
            owner: whose tasks; None does everybody's.

        Raises:
            NotFoundError: there is no such persona.
        """
        if owner is not None and not self._store.head(validate_id(owner)):
            raise NotFoundError(f"There is no persona {owner!r}.", hint="A persona begins with its first turn.")
        with self._lock:
            with self._store.reading() as connection:
                found = pending.owners(connection, attempts=self.config.attempts)
            report = FlushReport()
            for name in found if owner is None else [owner]:
                report += self._flush_owner(name)
            return report

    def _flush_owner(self, owner: str) -> FlushReport:
        report, after = FlushReport(), 0
        while True:
            with self._store.reading() as connection:
                behind = pending.waiting(connection, owner, after=after, limit=self.config.batch)
                left = pending.count(connection, owner)
            if not behind:
                return replace(report, waiting=left)
            after = behind[-1].seq
            tasks = [task for task in behind if task.attempts < self.config.attempts]
            report += self._embed(owner, [task for task in tasks if task.task == "embed"])
            report += self._enrich(owner, [task for task in tasks if task.task == "enrich"])

    def _embed(self, owner: str, tasks: list[Waiting]) -> FlushReport:
        if not tasks:
            return FlushReport()
        found = self._store.lookup(owner, [task.cube_id for task in tasks])
        try:
            vectors = self._embedder.encode([cube.text or "" for cube in found.values()])
            given = dict(zip(found, vectors, strict=True))
            self._store.add_vectors(owner, self._embedder.fingerprint, given)
        except Exception as error:
            return self._failed(owner, tasks, error)
        with self._store.writing() as connection:
            pending.finish(connection, owner, [task for task in tasks if task.cube_id in found])
        return FlushReport()

    def _enrich(self, owner: str, tasks: list[Waiting]) -> FlushReport:
        """Do a batch in one commit; if it fails, each of its turns alone, so that one cannot hold up the others."""
        if not tasks:
            return FlushReport()
        for _ in range(RETRIES):
            with self._store.reading() as connection:
                there = {task.seq for task in pending.waiting(connection, owner, after=tasks[0].seq - 1)}
            tasks = [task for task in tasks if task.seq in there]
            if not tasks:
                return FlushReport()
            try:
                return self._commit_batch(owner, tasks)
            except (RevisionConflictError, NotFoundError):
                continue  # somebody else wrote, or a turn was forgotten meanwhile
            except Exception as error:
                if len(tasks) == 1:
                    return self._failed(owner, tasks, error)
                alone = [self._enrich(owner, [task]) for task in tasks]
                return sum(alone[1:], alone[0])
        return self._failed(owner, tasks, RevisionConflictError("The owner is written to all the time."))

    def _commit_batch(self, owner: str, tasks: list[Waiting]) -> FlushReport:
        head, known = self._known(owner)
        cubes = self._store.lookup(owner, [task.cube_id for task in tasks])
        excerpts = self._excerpts(owner, list(cubes.values()), known)
        held: list[Held] = []
        below, problems = 0, []
        for excerpt in excerpts:
            given = [turns.as_turn(cube, new=cube.id in cubes) for cube in excerpt]
            extraction = self._extractor.extract(given)
            problems += [extraction.problem] if extraction.problem else []
            for found in extraction.statements:
                if self._passes(found):
                    sources = [excerpt[place] for place in found.turns]
                    held.append(held_of(found, sources, trust="user", extractor=getattr(self._extractor, "name", "")))
                else:
                    below += 1
        change = self._settled(owner, held)
        if self.config.corrections:
            self._add_rules(owner, list(cubes.values()), change)
        revision = self._write(owner, change, head, tasks)
        if change.repeated and self._on_use is not None:
            self._on_use(owner, change.repeated)
        for task in tasks:
            self._errors.pop((owner, task.cube_id, task.task), None)
        return FlushReport(
            turns=len(tasks), added=revision, retired=tuple(change.retire), repeated=tuple(change.repeated),
            unconfirmed=change.unconfirmed, below_threshold=below, problems=tuple(problems),
        )  # fmt: skip

    def _passes(self, found: Statement) -> bool:
        return salient(found, self.config.salience) and not self.config.screen.suspicious(found.text)

    def _excerpts(
        self, owner: str, asked: Sequence[MemCube], known: dict[str, turns.Session]
    ) -> list[list[MemCube]]:
        """The turns to read, by session, each with the turn before it."""
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

    def _settled(self, owner: str, held: Sequence[Held]) -> Change:
        """What statements do to those that are stored."""
        if not held:
            return Change()
        encoder = self._embedder.fingerprint
        fresh = self._embedder.encode([one.text for one in held])
        vectors: dict[str, Float[Tensor, "d"]] = {one.text: row for one, row in zip(held, fresh, strict=True)}
        ids, matrix = self._store.vectors(owner, encoder)
        near: list[str] = []
        if ids:
            reach = (matrix @ fresh.T).amax(dim=1) >= min(self.config.duplicates.link, 0.999)
            near = [name for name, close in zip(ids, reach.tolist(), strict=True) if close]
        names = sorted({one.header.slot for one in held if one.header.slot})
        with self._store.reading() as connection:
            rivals = {cube.id: cube for cube in slots.stated(connection, owner, names)}
        stored = rivals | {name: cube for name, cube in self._store.lookup(owner, near).items()}
        row = {name: place for place, name in enumerate(ids)}
        vectors |= {cube.text: matrix[row[name]] for name, cube in stored.items() if cube.text and name in row}
        ledger = Ledger(list(stored.values()), vectors, self.config.duplicates)
        for one in held:
            ledger.take(one)
        change = ledger.change()
        texts = [draft.text or "" for draft in change.add]
        missing = [text for text in dict.fromkeys(texts) if text not in vectors]
        vectors |= dict(zip(missing, self._embedder.encode(missing), strict=True)) if missing else {}
        change.add = [replace(d, vector=vectors[d.text or ""], encoder=encoder) for d in change.add]
        return change

    def _add_rules(self, owner: str, asked: Sequence[MemCube], change: Change) -> None:
        """Corrections among the turns, one after the other: a rule made here may be confirmed by the next batch."""
        rules, seen = self._corrections.rules(owner), set[str]()
        for cube in asked:
            found = distil(cube.text or "")
            if found is None or found.scope == "turn" or found.trigger in seen:
                continue
            seen.add(found.trigger)
            made = self._corrections.change(rules, found, cube)
            if not set(made.retire) & set(change.retire):
                change.add += made.add
                change.retire += made.retire

    def _write(self, owner: str, change: Change, head: int, tasks: list[Waiting]) -> tuple[str, ...]:
        if not change.add and not change.retire:
            with self._store.writing() as connection:
                pending.finish(connection, owner, tasks)
            return ()
        kind = self._store.kind_of(owner) or "user"
        return self._store.commit(
            owner, kind=kind, add=change.add, retire=change.retire, message="enrich", parent=head,
            also=lambda connection, _: pending.finish(connection, owner, tasks),
        ).added  # fmt: skip

    def _failed(self, owner: str, tasks: Sequence[Waiting], error: Exception) -> FlushReport:
        with self._store.writing() as connection:
            pending.fail(connection, owner, tasks)
        text = f"{type(error).__name__}: {error}"[:300]
        logger.warning("%d tasks of a persona failed: %s", len(tasks), type(error).__name__)
        for task in tasks:
            self._errors[owner, task.cube_id, task.task] = text
        return FlushReport(
            failures=tuple(Failure(owner, t.cube_id, t.task, t.attempts + 1, text) for t in tasks)
        )

    def failures(self, owner: str) -> list[Failure]:
        """The owner's tasks that have failed at least once and were not done since."""
        with self._store.reading() as connection:
            found = pending.waiting(connection, validate_id(owner))
        return [
            Failure(owner, t.cube_id, t.task, t.attempts, self._errors.get((owner, t.cube_id, t.task), ""))
            for t in found
            if t.attempts
        ]

    def retry(self, owner: str) -> int:
        """Give the owner's failed tasks new attempts; how many there were."""
        with self._store.writing() as connection:
            found = pending.reset(connection, validate_id(owner))
        self._wake.set()
        return found
