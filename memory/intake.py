"""Taking in conversations: turns verbatim, searchable at once, queued for enrichment, in one transaction."""

import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection
from torch import Tensor

from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError, RevisionConflictError
from persona_sdk.memory import pending, turns
from persona_sdk.memory.cube import CubeDraft, TextEncoder, utc_now
from persona_sdk.memory.embedding import embedded
from persona_sdk.memory.followed import Followed
from persona_sdk.memory.reports import Observed
from persona_sdk.memory.salience import echoes
from persona_sdk.memory.screening import QUARANTINED, Screen
from persona_sdk.memory.store import MemoryStore

logger = logging.getLogger("persona_sdk.memory")

RETRIES = 16  # when somebody else commits meanwhile


class Intake:
    """Stores messages of any owner; thread-safe. `MemoryWriter` is what callers use."""

    def __init__(self, store: MemoryStore, embedder: TextEncoder, screen: Screen) -> None:
        self._store = store
        self._embedder = embedder
        self._screen = screen
        self._places = Followed(store, turns.place_of)
        self._lock = threading.RLock()

    def observe(
        self, owner: str, messages: turns.Messages, session: str, start: int | None, system: str, kind: str
    ) -> Observed:
        """See `MemoryWriter.observe`."""
        validate_id(owner)
        parsed = turns.parse(messages)
        prompts = [system, *(message.content for message in parsed if message.role == "system")]
        spoken = [message for message in parsed if message.role != "system"]
        now = utc_now()
        vectors: dict[str, Tensor] = {}  # by text, kept over the retries
        with (
            self._lock
        ):  # threads of this process wait for each other; other processes are met by the retries
            for _ in range(RETRIES):
                head, places = self.places(owner)
                there = turns.session_of(places, session)
                first = there.next if start is None else start
                numbered = [
                    (n, message) for n, message in enumerate(spoken, first) if message.content.strip()
                ]
                result = {n: self._same(there, n, m, session) for n, m in numbered if n in there.found}
                new = [(n, message) for n, message in numbered if n not in there.found]
                drafts = [self._draft(message, session, n, now, prompts) for n, message in new]
                drafts, problem = self._embedded(drafts, vectors)
                try:
                    ids = self._store_turns(owner, kind, head, drafts) if drafts else ()
                except RevisionConflictError:
                    continue
                result |= {n: cube_id for (n, _), cube_id in zip(new, ids, strict=True)}
                found = self._store.lookup(owner, [result[n] for n in sorted(result)])
                marked = sum(QUARANTINED in draft.header.tags for draft in drafts)
                return Observed(tuple(found.values()), sum(map(_to_enrich, drafts)), marked, problem)
        raise RevisionConflictError(f"{owner!r} is written to all the time.", hint="Observe again.")

    def _draft(
        self, message: turns.Message, session: str, number: int, now: datetime, prompts: Sequence[str]
    ) -> CubeDraft:
        tags = (QUARANTINED,) if self._screen.suspicious(message.content) else ()
        spans = echoes(message.content, filter(None, prompts)) if message.role == "user" else []
        return turns.draft(message, session=session, number=number, at=now, tags=tags, echoes=spans)

    def _store_turns(self, owner: str, kind: str, head: int, drafts: Sequence[CubeDraft]) -> tuple[str, ...]:
        def queue(connection: Connection, ids: Sequence[str]) -> None:
            bare = [name for name, draft in zip(ids, drafts, strict=True) if draft.vector is None]
            asked = [name for name, draft in zip(ids, drafts, strict=True) if _to_enrich(draft)]
            pending.enqueue(connection, owner, bare, "embed")
            pending.enqueue(connection, owner, asked, "enrich")

        return self._store.commit(
            owner, kind=kind, add=drafts, message="observe", parent=head, also=queue
        ).added

    def places(self, owner: str) -> tuple[int, Mapping[str, turns.Place]]:
        """The newest revision, and where the owner's turns stand, also retired ones, by cube id."""
        return self._places.get(owner)

    @staticmethod
    def _same(there: turns.Session, number: int, message: turns.Message, session: str) -> str:
        cube_id, digest = there.found[number]
        if digest != turns.digest(message.role, message.content):
            raise InvalidInputError(
                f"Message {number} of session {session!r:.60} is stored with another content.",
                hint="Give edited messages a session of their own; nothing was stored.",
            )
        return cube_id

    def _embedded(self, drafts: list[CubeDraft], known: dict[str, Tensor]) -> tuple[list[CubeDraft], str]:
        """The drafts with vectors, or as they are and what went wrong."""
        try:
            return embedded(drafts, self._embedder, known), ""
        except Exception as error:  # whatever an embedder raises: the raw turn is worth more
            logger.warning("turns are stored without vectors: %s", type(error).__name__)
            return drafts, f"{type(error).__name__}: {error}"


def _to_enrich(draft: CubeDraft) -> bool:
    return draft.header.attributes.get("role") == "user" and QUARANTINED not in draft.header.tags
