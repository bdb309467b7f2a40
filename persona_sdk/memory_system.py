"""Search and writing over one store: what the personas of a model share of the memory system.

retriever    finds memories                              uses what the writer stored at once
writer       turns conversations into memories           in this thread, or in one of its own after start()
record_uses  counts what replies were given              only when told to: reads do not learn
move         archive, expire                             what the scheduler decides about states of life
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from persona_sdk.embedders import Embedder, load_embedder
from persona_sdk.memory import (
    CrossEncoder,
    MemoryStore,
    Passage,
    Principal,
    RetrievalOptions,
    Retriever,
    VectorIndex,
    governance,
    uses,
)
from persona_sdk.memory.cube import PersonaKind, utc_now
from persona_sdk.memory.expiry import expire
from persona_sdk.memory.extraction import Extractor
from persona_sdk.memory.reports import FlushReport, Observed
from persona_sdk.memory.revisions import head
from persona_sdk.memory.turns import Messages
from persona_sdk.memory.writer import MemoryWriter


class MemorySystem:
    """The memory services of one open store.

    Args:
        store: where personas live.
        embedder: turns memories and queries into vectors; a name is loaded when it is first needed.
        options: weights of recall.
        extractor: draws statements from turns; rules, if none is given.
        cross_encoder: reorders what recall found.
    """

    def __init__(
        self,
        store: MemoryStore,
        embedder: str | Embedder,
        options: RetrievalOptions,
        *,
        extractor: Extractor | None = None,
        cross_encoder: CrossEncoder | None = None,
    ) -> None:
        self.store = store
        self._extractor, self._cross_encoder = extractor, cross_encoder
        self.options = options
        self._embedder = embedder
        self._index = VectorIndex(store)

    @cached_property
    def embedder(self) -> Embedder:
        """The text embedder, loaded on first use."""
        return load_embedder(self._embedder)

    @cached_property
    def retriever(self) -> Retriever:
        """Search over memories."""
        return self.search_with(self.options)

    def search_with(self, options: RetrievalOptions) -> Retriever:
        """Search with other weights."""
        return Retriever(self.store, self._index, self.embedder, options, cross_encoder=self._cross_encoder)

    def recall(
        self, owners: Sequence[str], query: str, k: int, revisions: Mapping[str, int], shared: bool = False
    ) -> Sequence[Passage]:
        """For the composer: the best passages that the first of the owners may read, at these revisions.

        Args:
            owners: the persona, then its groups.
            query: what was said.
            k: how many at most.
            revisions: by owner.
            shared: also search what others shared with the persona.
        """
        asking = Principal(owners[0], self.store.kind_of(owners[0]) or "user")
        with self.store.reading() as connection:
            reach = [*owners, *(governance.owners_for(connection, asking) if shared else ())]
            written = any(revisions.get(owner) or head(connection, owner) for owner in reach)
        if not written:  # nobody has written anything yet: the embedder can stay unloaded
            return []
        return self.retriever.recall(reach, query, k, revisions, principal=asking)

    @cached_property
    def writer(self) -> MemoryWriter:
        """Takes in conversations. ``writer.start()`` lets it work in a thread of its own."""
        return MemoryWriter(self.store, self.embedder, extractor=self._extractor, on_use=self.record_uses)

    def learn(
        self, owner: str, kind: PersonaKind, messages: Messages, *, session: str = "", system: str = ""
    ) -> Observed:
        """Store messages verbatim and queue what they say for `flush`."""
        return self.writer.observe(owner, messages, session=session, system=system, kind=kind)

    def flush(self, owner: str) -> FlushReport:
        """Work out what the owner's waiting turns say."""
        return self.writer.flush(owner)

    def record_uses(self, owner: str, cube_ids: Sequence[str]) -> None:
        """Count a use of memories now."""
        uses.record(self.store, owner, cube_ids, utc_now())

    def move(self, owner: str, cube_ids: Sequence[str], kind: str, reason: str) -> None:
        """Carry out a decision about states of life: ``"archive"`` these, or ``"expire"`` what is due."""
        if kind == "archive":
            self.store.archive(owner, cube_ids, reason=reason)
        else:
            expire(self.store, owner, now=utc_now())

    def close(self) -> None:
        """Stop the writer's thread, if it has one."""
        if "writer" in vars(self):  # it is made when it is first needed
            self.writer.close()
