"""Everything a persona does with its memory, as one principal: `Persona.memory`.

    write    remember, learn, flush       life     archive, activate, freeze, unfreeze
    read     search, cubes                time     snapshot, snapshots, as_of, rollback
    erase    forget, forget_everything    others   share, unshare, shared, audit, verify_audit

What goes through the `BoundStore` is refused where it is not the persona's own, its groups' or granted to it,
in the words that are used when there is no such thing. Learning and rolling back are the application's own
acts, in the persona's name. Reads change nothing; every write is one commit or one event.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from persona_sdk.compose import PINNED
from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import (
    CubeDraft,
    CubeHeader,
    MemCube,
    Passage,
    Receipt,
    RetrievalOptions,
    Revision,
    turns,
)
from persona_sdk.memory.audit import Fault
from persona_sdk.memory.bound import BoundStore
from persona_sdk.memory.cube import PersonaKind, State
from persona_sdk.memory.embedding import embedded
from persona_sdk.memory.events import Event, Head, acting_as
from persona_sdk.memory.governance import Granted, Principal, PrincipalKind
from persona_sdk.memory.reports import FlushReport, Observed
from persona_sdk.memory.snapshots import MemoryView, Snapshot, When
from persona_sdk.memory.turns import TURN
from persona_sdk.prompting import Messages, parse_messages
from persona_sdk.reply import Reply

if TYPE_CHECKING:
    from persona_sdk.model import PersonaModel

MAX_TEXT = 20_000


class PersonaMemory:
    """The memory of one user or one group. Get it from `Persona.memory`.

    Attributes:
        store: the store as this persona sees it.
    """

    def __init__(self, model: "PersonaModel", owner: str, kind: PersonaKind) -> None:
        self.owner, self.kind = owner, kind
        self.store = BoundStore(model.store, Principal(owner, kind))
        self._model = model
        self._system = model.memory

    # Writing ------------------------------------------------------------------------------------------

    def remember(
        self,
        texts: Sequence[str],
        *,
        title: str = "",
        tags: Sequence[str] = (),
        semantic_type: str = "fact",
        searchable: bool = True,
        pinned: bool = False,
        expires_at: datetime | None = None,
        valid_from: datetime | None = None,
        valid_to: datetime | None = None,
        sensitivity: str = "normal",
    ) -> list[MemCube]:
        """Store texts in one revision: all of them, or none.

        Args:
            texts: the memories.
            title: a name for all of them.
            tags: labels of your own.
            semantic_type: fact, preference, event, writing, ...
            searchable: False keeps them out of recall and out of prompts, as for training texts.
            pinned: True puts them into every prompt, first and whatever is asked, also unsearchable ones.
            expires_at: when they are to be erased; see `MemoryStore.expire`.
            valid_from: since when it is so in the world; None: for ever.
            valid_to: until before when; what is over is not recalled unless a time is asked for.
            sensitivity: normal, personal, or special, which membership in a group does not share.

        Raises:
            InvalidInputError: a text is blank or longer than `MAX_TEXT` characters, or an option is wrong.
            StoreFullError: no room; nothing was stored.
        """
        if isinstance(texts, str):
            raise InvalidInputError("Expected a list of texts.", hint="For one text use Persona.remember.")
        for index, text in enumerate(texts):
            _check(index, text)
        if not texts:
            return []
        header = CubeHeader.parse(
            {
                "title": title,
                "semantic_type": semantic_type,
                "tags": tuple(tags),
                "trust": "user",
                "attributes": PINNED if pinned else {},
                "expires_at": expires_at,
                "valid_from": valid_from,
                "valid_to": valid_to,
                "sensitivity": sensitivity,
            }
        )
        drafts = [CubeDraft(text=text, header=header) for text in texts]
        if searchable:
            drafts = embedded(drafts, self._model.embedder)
        noun = semantic_type if len(drafts) == 1 else f"{len(drafts)} x {semantic_type}"
        revision = self.store.commit(self.owner, message=f"remember {noun}", add=drafts)
        found = self.store.lookup(self.owner, revision.added)
        return [found[cube_id] for cube_id in revision.added]

    def learn(self, messages: turns.Messages, *, session: str = "", system: str = "") -> Observed:
        """Store turns verbatim, to be found at once; what they say waits for `flush` or the writer's thread.

        Args:
            messages: a string, or ``{"role", "content"}`` turns, with ``at`` if it was not now.
            session: an id of the conversation.
            system: the system prompt it ran under, whose words are nobody's facts.
        """
        with acting_as(self.store.principal.name):
            return self._system.learn(self.owner, self.kind, messages, session=session, system=system)

    def confirm(self, cube_id: str) -> FlushReport:
        """Take an unconfirmed statement for true; it takes the place of what it contradicts."""
        with acting_as(self.store.principal.name):
            return self._system.writer.confirm(self.owner, cube_id)

    def flush(self) -> FlushReport:
        """Work out what the waiting turns say: statements, contradictions, duplicates, rules."""
        with acting_as(self.store.principal.name):
            return self._system.flush(self.owner)

    def learn_from(self, messages: Messages, reply: Reply) -> FlushReport:
        """Remember the last turn and its reply, and count the memories that the reply was given."""
        said = [{"role": "user", "content": parse_messages(messages)[-1].content}]
        if reply.text.strip():
            said.append({"role": "assistant", "content": reply.text})
        with acting_as(self.store.principal.name):
            self._system.learn(self.owner, self.kind, said)
            used: dict[str, list[str]] = {}
            for passage in reply.citations:
                if passage.why is not None:  # it was looked for, and is not just in every prompt
                    used.setdefault(passage.owner, []).append(passage.id)
            for owner, cube_ids in used.items():
                with suppress(NotFoundError):  # forgotten while the reply was written
                    self._system.record_uses(owner, cube_ids)
            return self._system.flush(self.owner)

    # Reading ------------------------------------------------------------------------------------------

    def search(self, query: str, k: int = 5, **options: Any) -> list[Passage]:
        """The `k` best memories for a query: its own, its groups' and what others shared with it.

        Args:
            query: what to look for; dates in it count ("last May").
            k: how many at most.
            **options: other weights than the model's, of `persona_sdk.memory.RetrievalOptions`, as ``at``
                (what was so then) or ``history`` (also what is no longer so).
        """
        wanted = RetrievalOptions.parse({**self._system.options.model_dump(), **options})
        return self.store.recall(self._system.search_with(wanted), query, k)

    def cubes(self, *, valid_at: datetime | None = None, turns: bool = True) -> list[MemCube]:
        """All live text memories, oldest first.

        Args:
            valid_at: only what holds at that time.
            turns: also conversations as they were recorded.
        """
        cubes = self.store.cubes(self.owner, kind="plaintext")
        holding = [cube for cube in cubes if valid_at is None or cube.header.valid(valid_at)]
        return [cube for cube in holding if turns or cube.header.semantic_type != TURN]

    # Erasing ------------------------------------------------------------------------------------------

    def forget(self, query_or_cube_id: str) -> Receipt:
        """Erase one memory by cube id, or every memory that contains a phrase, and all that derives from it.

        A phrase is found as whole words, in any case: "art" is not in "party". Memories that a rollback
        took out of sight are found too.

        Raises:
            FrozenError: one of them is held with a legal basis; nothing was erased.
            NotFoundError: nothing matches; nothing was erased.
        """
        if not isinstance(query_or_cube_id, str) or not query_or_cube_id.strip():
            raise InvalidInputError("There is nothing to look for.", hint="Give a cube id or a phrase.")
        words = re.escape(query_or_cube_id.strip().casefold())
        phrase = re.compile(rf"(?<!\w){words}(?!\w)")
        cubes = self.store.all_cubes(self.owner) if self.store.kind_of(self.owner) else []
        found = [cube.id for cube in cubes if cube.id == query_or_cube_id] or [
            cube.id for cube in cubes if cube.text is not None and phrase.search(cube.text.casefold())
        ]
        if not found:
            raise NotFoundError(
                f"No memory of {self.owner!r} is {query_or_cube_id!r} or contains it.",
                hint="List them with memories() or look with recall().",
            )
        receipt = self.store.forget(self.owner, found)
        statements = {cube.id for cube in cubes if cube.header.slot is not None}
        if statements & set(receipt.cube_ids):
            self.flush()  # what a forgotten statement had ended holds again
        return receipt

    def forget_everything(self) -> Receipt:
        """Erase the persona: memories, adapters, vectors and history. Only a tombstone of counts stays."""
        return self.store.forget_everything(self.owner)

    # Life ---------------------------------------------------------------------------------------------

    def archive(self, *cube_ids: str, reason: str = "") -> Revision:
        """Put memories aside: out of recall, kept in history, brought back by `activate`."""
        return self.store.archive(self.owner, cube_ids, reason=reason)

    def activate(self, *cube_ids: str, reason: str = "") -> Revision:
        """Bring memories back that were archived, merged or retired."""
        return self.store.activate(self.owner, cube_ids, reason=reason)

    def freeze(self, cube_id: str, reason: str) -> None:
        """Lock a memory: no edit, merge, expiry or decay until `unfreeze`."""
        self.store.freeze(self.owner, cube_id, reason)

    def unfreeze(self, cube_id: str, reason: str) -> State:
        """Unlock a memory and return the state it has again."""
        return self.store.unfreeze(self.owner, cube_id, reason)

    # Time ---------------------------------------------------------------------------------------------

    def snapshot(self, name: str) -> Snapshot:
        """Name the newest revision, to come back to with `as_of` or `rollback`."""
        return self.store.snapshot(self.owner, name)

    def snapshots(self) -> list[Snapshot]:
        """The named revisions, oldest first."""
        return self.store.snapshots(self.owner)

    def as_of(self, when: When) -> MemoryView:
        """What was remembered at a time, a revision or a snapshot, to be read only."""
        return self.store.as_of(self.owner, when)

    def rollback(self, to: int | str) -> Revision:
        """Make a new revision with the content of an old one, or of a snapshot.

        Groups come back with it: to this application, unlike to a `BoundStore`, who joins is its own affair.
        """
        with acting_as(self.store.principal.name):
            return self._model.store.rollback(self.owner, to)

    # Others -------------------------------------------------------------------------------------------

    def share(
        self,
        cube_id: str,
        to: str,
        right: Granted = "read",
        *,
        kind: PrincipalKind = "user",
        special: bool = False,
    ) -> None:
        """Let another user, a group or a service read one memory, or write new versions of it.

        Args:
            cube_id: of this persona.
            to: id of whom it is for.
            right: read or write.
            kind: what `to` is.
            special: must be said for a memory of sensitivity special.
        """
        self.store.grant(self.owner, cube_id, Principal(to, kind), right, special=special)

    def unshare(self, cube_id: str, to: str, *, kind: PrincipalKind = "user") -> None:
        """Take that back."""
        self.store.revoke(self.owner, cube_id, Principal(to, kind))

    def shared(self) -> dict[str, list[MemCube]]:
        """What others have shared with this persona, by owner."""
        return self.store.shared()

    def audit(self) -> list[Event]:
        """Every write to this persona: who, when, what kind; never a text."""
        return self.store.audit(self.owner)

    def verify_audit(self, *, anchor: Head | None = None) -> list[Fault]:
        """What is wrong with the audit log; nothing, if it was not tampered with."""
        return self.store.verify_audit(self.owner, anchor=anchor)


def _check(index: int, text: object) -> None:
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f"Text {index} is empty.", hint="Give some text to remember.")
    if len(text) > MAX_TEXT:
        raise InvalidInputError(
            f"Text {index} has {len(text)} characters.", hint=f"Split it; at most {MAX_TEXT} fit one memory."
        )
