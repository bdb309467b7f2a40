"""The bound handle for one user or one group: everything an application does with a persona.

Reads (`chat`, `stream`, `recall`, `history`, `explain`) change nothing. Writes (`remember`, `learn`,
`attach`, `detach`, `prefer`, `rollback`, `forget`) are commits: each makes one new revision, whole or not
at all.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_sdk.adapters import Adapter
from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError, NotFoundError, PersonaError
from persona_sdk.library import SHARED, commit_edit, split_name
from persona_sdk.materialize import Materialized, materialize
from persona_sdk.memory import MemCube, Passage, Receipt, Revision, turns
from persona_sdk.memory.cube import PersonaKind, utc_now
from persona_sdk.memory.reports import FlushReport
from persona_sdk.persona_memory import PersonaMemory
from persona_sdk.prompting import Messages
from persona_sdk.reply import Explanation, Reply, ReplyStream

if TYPE_CHECKING:
    from persona_sdk.model import PersonaModel

_log = logging.getLogger("persona_sdk")


class Persona:
    """One user or one group of a `PersonaModel`. Get one from `PersonaModel.persona` or `.group`."""

    def __init__(self, model: "PersonaModel", persona_id: str, *, kind: PersonaKind = "user") -> None:
        self.id = validate_id(persona_id)
        self.kind = kind
        self._model = model
        self._store = model.store
        known = "group" if self.id == SHARED else self._store.kind_of(self.id)
        if known not in (None, kind):
            raise InvalidInputError(
                f"{self.id!r} is a {known}, not a {kind}.",
                hint="Users and groups share one space of ids; model.group opens groups.",
            )
        self.memory = PersonaMemory(model, self.id, kind)
        model.adapters.handles[self.id] = self

    def __repr__(self) -> str:
        return f"Persona({self.id!r}, kind={self.kind!r}, revision={self.revision})"

    @property
    def revision(self) -> int:
        """Number of the newest revision; 0 before the first write."""
        return self._store.head(self.id)

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups this persona belongs to, in the order they apply."""
        return self._store.groups(self.id)

    # Conversation -------------------------------------------------------------------------------------

    def chat(self, messages: Messages, *, seed: int = 0, learn: bool = False, **options: Any) -> Reply:
        """Answer a message, or a list of ``{"role", "content"}`` turns. Learns nothing unless told to.

        Args:
            messages: what was said; the last turn is the user's.
            seed: of the sampling stream; greedy decoding does not use it.
            learn: afterwards, remember the last turn and the reply, and count the memories that were used;
                see `PersonaMemory.learn_from`. If that fails it is logged, and the reply returned.
            **options: see `persona_sdk.compose.ChatOptions` (``max_new_tokens``, ``do_sample``, ...).
        """
        replies: list[Reply] = self._model.chat_batch([(self, messages)], seed=seed, **options)
        if learn:
            self._learn_from(messages, replies[0])
        return replies[0]

    async def achat(self, messages: Messages, *, seed: int = 0, learn: bool = False, **options: Any) -> Reply:
        """`chat` without blocking the event loop. Cancelling the task ends the reply."""
        reply = await self._model.achat(self, messages, seed=seed, **options)
        if learn:
            await asyncio.to_thread(self._learn_from, messages, reply)
        return reply

    def _learn_from(self, messages: Messages, reply: Reply) -> None:
        try:
            self.memory.learn_from(messages, reply)
        except PersonaError:  # the reply is there, and must not be lost for what could not be remembered
            _log.exception("nothing was learned from a reply of %r", self.id)

    def stream(self, messages: Messages, *, seed: int = 0, **options: Any) -> ReplyStream:
        """Answer piece by piece, for ``for`` and ``async for``. The stream's ``.reply`` is the whole answer;
        its ``.steer`` changes what is still to come. Arguments as for `chat`.
        """
        return self._model.stream(self, messages, seed=seed, **options)

    def explain(self, reply: Reply) -> Explanation:
        """Which memories, adapters and rules made a reply of this persona.

        Raises:
            InvalidInputError: the reply belongs to somebody else.
        """
        if reply.persona != self.id:
            raise InvalidInputError(
                f"This reply was given to {reply.persona!r}, not to {self.id!r}.",
                hint="Explain a reply with the persona that received it.",
            )
        return Explanation(reply)

    # Memory -------------------------------------------------------------------------------------------

    def remember(self, text: str, **options: Any) -> MemCube:
        """Store one text as a memory of this persona and return its cube. Options as for `remember_all`."""
        return self.remember_all([text], **options)[0]

    def remember_all(self, texts: Sequence[str], **options: Any) -> list[MemCube]:
        """Store several texts in one revision: all of them, or none.

        Args:
            texts: the memories.
            **options: ``title``, ``tags``, ``semantic_type``, ``searchable``, ``pinned``, ``sensitivity``,
                ``expires_at``, ``valid_from``, ``valid_to``; see `PersonaMemory.remember`.

        Raises:
            InvalidInputError: a text is blank or longer than `MAX_TEXT` characters, or an option is wrong.
            StoreFullError: no room; nothing was stored.
        """
        return self.memory.remember(texts, **options)

    def learn(self, messages: turns.Messages, *, session: str = "") -> FlushReport:
        """Remember a conversation: every turn verbatim, and the facts and preferences the user states.

        Args:
            messages: a string, or ``{"role", "content"}`` turns, with ``at`` if it was not now.
            session: an id of the conversation.
        """
        self.memory.learn(messages, session=session)
        return self.memory.flush()

    def warm(self, *, system: str = "") -> MemCube | None:
        """Compute what stands first in every prompt of this persona, and keep its keys and values.

        That is the system message, the pinned memories and the promoted ones; their keys and values become an
        `activation` memory, and later chats start after them, also in another process. Any change of an
        adapter, a gate or one of these memories leaves it unused: warm again then.

        Args:
            system: the system message the application puts in front, if any.

        Returns:
            The activation cube, or None if there is less than a block of tokens to keep.

        Raises:
            PromptTooLongError: the pinned memories do not fit the context.
        """
        return self._model.warm(self, system=system)

    def recall(self, query: str, k: int = 5) -> list[Passage]:
        """The `k` best memories for a query, own, of the groups and shared by others, best first."""
        return self.memory.search(query, k)

    def memories(self) -> list[MemCube]:
        """Live texts that are still so, without recorded turns, oldest first; `memory.cubes` has all."""
        return self.memory.cubes(valid_at=utc_now(), turns=False)

    def forget(self, query_or_cube_id: str) -> Receipt:
        """Erase memories by cube id or phrase, with all derived from them; see `PersonaMemory.forget`."""
        return self.memory.forget(query_or_cube_id)

    def forget_everything(self) -> Receipt:
        """Erase this persona: memories, adapters, vectors and history. Only a tombstone of counts stays."""
        return self.memory.forget_everything()

    # Adapters -----------------------------------------------------------------------------------------

    def add_adapter(self, title: str, adapter: Adapter, *, sources: Sequence[MemCube] = ()) -> MemCube:
        """File an adapter of this persona, as ``<id>/<title>``; see `AdapterLibrary.add`."""
        return self._model.adapters.add(f"{self.id}/{title}", adapter, sources=sources, kind=self.kind)

    def attach(self, name: str, *, weight: float = 1.0, state: dict[str, Any] | None = None) -> Revision:
        """Use an adapter from now on. Attaching a name again replaces the old attachment.

        Args:
            name: ``"owner/name"`` of an adapter that this persona, one of its groups or ``shared`` owns.
            weight: strength; 1.0 is as trained.
            state: what the family keeps per persona.

        Raises:
            NotFoundError: no such adapter within this persona's reach.
            InvalidInputError: weight or state cannot be used.
            IncompatibleAdapterError: made for another base model, or shapes that do not fit it.
        """
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not -10 <= weight <= 10:  # false for NaN too
            raise InvalidInputError(
                f"weight={weight!r} cannot be used.", hint="Expected a number in [-10, 10]."
            )
        owner, title = split_name(name)
        if owner not in (self.id, *self.groups, SHARED):
            raise NotFoundError(
                f"There is no adapter {name!r} within reach of {self.id!r}.",
                hint="A persona can attach its own adapters, its groups' and shared ones.",
            )
        full = f"{owner}/{title}"
        draft, contribution = self._model.adapters.attachment(full, weight=float(weight), state=state or {})
        self._model.check(contribution)
        return self._edit(f"attach {full}", lambda: {"retire": self._attached(full)}, add=[draft])

    def detach(self, name: str) -> Revision:
        """Stop using an adapter.

        Raises:
            NotFoundError: it is not attached.
        """
        full = "/".join(split_name(name))

        def changes() -> dict[str, Any]:
            attached = self._attached(full)
            if not attached:
                raise NotFoundError(f"{full!r} is not attached to {self.id!r}.", hint="See attachments().")
            return {"retire": attached}

        return self._edit(f"detach {full}", changes)

    def prefer(self, /, **weights: float) -> Revision:
        """Say how much of each named quality is wanted, from now on: ``prefer(concise=0.7, detailed=0.3)``.

        A preference takes the place of the one before and reaches every adapter that this persona uses, those
        of its groups included. What is left of 1 goes to the qualities not named. What a group prefers is the
        default of its members. Without any weight the preference is taken back.

        Args:
            **weights: by the names that `preferences` lists.

        Raises:
            InvalidInputError: an unknown name, or weights an adapter cannot use: negative, NaN, all zero.
            NotFoundError: there is no preference to take back.
        """
        library = self._model.adapters
        drafts = [library.preference(self.id, weights)] if weights else []

        def changes() -> dict[str, Any]:
            before = [cube.id for cube in library.preferences(self.id)]
            if not weights and not before:
                raise NotFoundError(f"{self.id!r} prefers nothing.", hint="Name weights to prefer something.")
            return {"retire": before}

        return self._edit("prefer", changes, add=drafts)

    def preferences(self) -> dict[str, dict[str, float]]:
        """What holds now, by adapter and name, with the groups' preferences: ``{"nurses/tone": {...}}``."""
        return self._model.adapters.controls(self.id)

    def export_peft(self, folder: str | Path, **options: Any) -> Materialized:
        """Write everything this persona's adapters add up to, its groups' included, as one PEFT LoRA folder.

        Args:
            folder: where; peft and vLLM load it unchanged.
            **options: ``partial``, ``rank``, ``groups``, ``adjust``; see `materialize.materialize`.

        Raises:
            CompositionError: something that a PEFT folder cannot hold takes part, and ``partial`` is false.
        """
        return materialize(self._model, self.id, folder, **options)

    def attachments(self) -> list[str]:
        """Names of the attached adapters, in the order they apply."""
        return [attachment.name for attachment in self._model.adapters.attachments(self.id)]

    # History ------------------------------------------------------------------------------------------

    def history(self) -> list[Revision]:
        """Every revision, oldest first."""
        return self._store.history(self.id)

    def rollback(self, revision: int | str) -> Revision:
        """Make a new revision with the content of an old one, or of a snapshot.

        Raises:
            FrozenError: a frozen memory would be retired or brought back.
            NotFoundError: there is no such revision.
        """
        return self.memory.rollback(revision)

    def export(self, path: str | Path) -> Path:
        """Write this persona, history included, to one archive file."""
        return self._store.export(self.id, Path(path))

    def join(self, groups: Sequence[str]) -> None:
        """Set the groups this persona belongs to; a commit if they change."""
        if isinstance(groups, str):
            raise InvalidInputError(f"groups is {groups!r}.", hint="Expected a list of group ids.")
        wanted = tuple(dict.fromkeys(groups))
        if wanted != self.groups:
            self._commit("groups", groups=wanted)

    def _attached(self, name: str) -> list[str]:
        return [a.cube_id for a in self._model.adapters.attachments(self.id) if a.name == name]

    def _edit(self, message: str, changes: Callable[[], dict[str, Any]], **commit: Any) -> Revision:
        return commit_edit(self._store, self.id, changes, kind=self.kind, message=message, **commit)

    def _commit(self, message: str, **changes: Any) -> Revision:
        return self._store.commit(self.id, kind=self.kind, message=message, **changes)
