"""The facade: one base model, one store, any number of personas.

model = PersonaModel.from_pretrained("smollm2-135m", store="personas/")
alice = model.persona("alice", groups=["nurses"])
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from persona_sdk.compose import ChatOptions, Composer, Composition
from persona_sdk.engine import Completion, Engine, EngineOptions, Request
from persona_sdk.engine.prefix.bundles import KVShape
from persona_sdk.errors import InvalidInputError, ModelError, PersonaError
from persona_sdk.library import AdapterLibrary
from persona_sdk.memory import CrossEncoder, MemCube, MemoryStore, RetrievalOptions, Retriever
from persona_sdk.memory.extraction import Extractor
from persona_sdk.memory_system import MemorySystem
from persona_sdk.models import Embedder, LanguageModel
from persona_sdk.persona import Persona
from persona_sdk.plan import CompositionPlan, Contribution
from persona_sdk.prefixes import PrefixLibrary
from persona_sdk.prompting import Messages
from persona_sdk.reply import Reply, ReplyStream, TextDecoder
from persona_sdk.steering import Steering
from persona_sdk.tensors import TensorBundle

if TYPE_CHECKING:
    from persona_sdk.promotion import Promoter


class PersonaModel:
    """A base model that behaves differently for every persona.

    Args:
        base: the frozen base model.
        store: where personas live.
        embedder: turns memories and queries into vectors; a name is loaded when it is first needed.
        engine: rows, tokens per step and memory budgets of the engine.
        retrieval: weights of recall.
        **memory: ``extractor``, ``cross_encoder``; see `MemorySystem`.
    """

    def __init__(
        self,
        base: LanguageModel,
        store: MemoryStore,
        embedder: str | Embedder = "minilm",
        engine: EngineOptions | None = None,
        retrieval: RetrievalOptions | None = None,
        **memory: Any,
    ) -> None:
        self.base = base
        self.store = store
        self.adapters = AdapterLibrary(base, store)
        self.memory = MemorySystem(store, embedder, retrieval or RetrievalOptions(), **memory)
        self._prefixes: PrefixLibrary | None = None
        self.engine = Engine(base, engine, spill=self._spill)
        blocks = self.engine.options.block_reuse is not None
        self._composer = Composer(base, store, self.adapters, self.memory.recall, blocks=blocks)
        store.on_forget(self._forgotten)

    @classmethod
    def from_pretrained(
        cls,
        name: str | LanguageModel = "smollm2-135m",
        *,
        store: str | Path | MemoryStore = "personas",
        embedder: str | Embedder = "minilm",
        device: str = "auto",
        dtype: str = "auto",
        engine: EngineOptions | Mapping[str, Any] | None = None,
        retrieval: RetrievalOptions | Mapping[str, Any] | None = None,
        extractor: Extractor | None = None,
        cross_encoder: CrossEncoder | None = None,
    ) -> Self:
        """Open a store with a base model.

        Args:
            name: alias, local path or hub id of a causal LM, or one that is already loaded.
            store: folder of the store, made if it does not exist; the URL of a PostgreSQL database; or a
                store that is open, as an encrypted one. The model closes it.
            embedder: alias, path or hub id of a sentence-transformers model, or an `Embedder`.
            device: ``"auto"`` takes CUDA when there is one.
            dtype: a torch dtype's name, ``"auto"`` or ``"fastest"``, as in `LanguageModel.from_pretrained`.
            engine: limits of the engine (`persona_sdk.engine.EngineOptions`), or a mapping of them.
            retrieval: weights of recall (`persona_sdk.memory.RetrievalOptions`), or a mapping of them.
            extractor: draws statements from conversations, as `lm_extraction.LMExtractor`; None: rules.
            cross_encoder: reorders what recall found, as a sentence-transformers ``CrossEncoder`` wrapped.

        Raises:
            UnknownModelError: the name leads nowhere.
            StoreError: the folder cannot be opened as a store.
            InvalidInputError: no such device or dtype here, or one is named and the model is loaded already.
        """
        if not isinstance(name, str) and (device, dtype) != ("auto", "auto"):
            raise InvalidInputError(
                f"{name.name} is loaded already, as {name.precision} on {name.device}.",
                hint="Give device and dtype to LanguageModel.from_pretrained.",
            )
        if isinstance(name, str):  # before the store is opened: a wrong name must not make one
            name = LanguageModel.from_pretrained(name, device=device, dtype=dtype)
        limits, weights = EngineOptions.from_options(engine), RetrievalOptions.from_options(retrieval)
        opened = store if isinstance(store, MemoryStore) else MemoryStore.open(store)
        return cls(
            name,
            opened,
            embedder,
            limits,
            weights,
            extractor=extractor,
            cross_encoder=cross_encoder,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store and take the hooks off the base model."""
        self.memory.close()
        self.engine.close()
        self.store.close()

    def persona(self, persona_id: str, *, groups: Sequence[str] | None = None) -> Persona:
        """The handle of a user. Nothing is written unless `groups` is given and differs.

        Raises:
            InvalidInputError: the id is unusable, or a group has the user's own id.
        """
        persona = Persona(self, persona_id)
        if groups is not None:
            persona.join(groups)
        return persona

    def group(self, group_id: str) -> Persona:
        """The handle of a group: its memories and attachments apply to every member."""
        return Persona(self, group_id, kind="group")

    def import_persona(
        self, path: str | Path, *, as_id: str | None = None, keep_groups: bool = False
    ) -> Persona:
        """Read an archive made by `Persona.export`, under its own id or another.

        Args:
            path: the archive.
            as_id: the id to give it; None keeps the archive's.
            keep_groups: also join the groups the archive names. Members read what a group remembers, so do
                this with archives you trust.

        Raises:
            ArchiveError: damaged, unsafe, or the id is taken; nothing was written.
        """
        owner = self.store.import_archive(Path(path), as_id=as_id, keep_groups=keep_groups)
        return Persona(self, owner, kind=self.store.kind_of(owner) or "user")

    def chat(self, messages: Messages, *, seed: int = 0, **options: Any) -> Reply:
        """The base model's own answer: an empty plan, nobody's memory."""
        replies: list[Reply] = self.chat_batch([(None, messages)], seed=seed, **options)
        return replies[0]

    @overload
    def chat_batch(
        self,
        requests: Sequence[tuple[Persona | None, Messages]],
        *,
        seed: int = 0,
        return_errors: Literal[False] = False,
        **options: Any,
    ) -> list[Reply]: ...

    @overload
    def chat_batch(
        self,
        requests: Sequence[tuple[Persona | None, Messages]],
        *,
        seed: int = 0,
        return_errors: Literal[True],
        **options: Any,
    ) -> list[Reply | PersonaError]: ...

    def chat_batch(
        self,
        requests: Sequence[tuple[Persona | None, Messages]],
        *,
        seed: int = 0,
        return_errors: bool = False,
        **options: Any,
    ) -> Sequence[Reply | PersonaError]:
        """Answer many personas in one heterogeneous batch; ``None`` is the base model.

        Every row gets what it would get alone. All requests are planned, or none runs.

        Args:
            requests: whom to answer, and what was said.
            seed: of every row's sampling stream.
            return_errors: put the error of a row that failed while running in its place, as
                ``asyncio.gather`` does; otherwise the first one is raised when all rows are done.
            **options: see `persona_sdk.compose.ChatOptions`.
        """
        chat_options = ChatOptions.parse(options)
        mark = self.engine.mark()
        composed = [self._compose(persona, messages, chat_options) for persona, messages in requests]
        decoder = TextDecoder(self.base.tokenizer, chat_options.stop_strings)
        completions = self.engine.generate([self._request(c, seed, decoder, mark) for c in composed])
        errors = [completion.error for completion in completions if completion.error is not None]
        if errors and not return_errors:
            raise errors[0]
        return [
            completion.error or self._reply(composition, completion, seed, decoder)
            for composition, completion in zip(composed, completions, strict=True)
        ]

    async def achat(
        self, persona: Persona | None, messages: Messages, *, seed: int = 0, **options: Any
    ) -> Reply:
        """Answer one persona without blocking the event loop. Cancelling the task ends the row."""
        stream: ReplyStream = await asyncio.to_thread(self.stream, persona, messages, seed=seed, **options)
        async for _ in stream:
            pass
        return stream.reply

    def stream(
        self, persona: Persona | None, messages: Messages, *, seed: int = 0, **options: Any
    ) -> ReplyStream:
        """Answer piece by piece. The plan is made, and bad input refused, before the first piece."""
        chat_options = ChatOptions.parse(options)
        mark = self.engine.mark()
        composition = self._compose(persona, messages, chat_options)
        decoder = TextDecoder(self.base.tokenizer, chat_options.stop_strings)
        generation = self.engine.submit(self._request(composition, seed, decoder, mark))
        return ReplyStream(
            generation,
            decoder,
            lambda completion: self._reply(composition, completion, seed, decoder),
            Steering(composition.contributors),
        )

    @property
    def embedder(self) -> Embedder:
        """The text embedder, loaded on first use."""
        return self.memory.embedder

    @property
    def retriever(self) -> Retriever:
        """Search over memories."""
        return self.memory.retriever

    def promoter(self, **options: Any) -> "Promoter":
        """What moves memories between text, keys and values, and weights; see `Promoter` for the options.

        Without a ``move`` of your own, what is long unused is archived and what has expired is erased.
        """
        from persona_sdk.promotion import Promoter

        return Promoter(self, **{"move": self.memory.move, **options})

    def warm(self, persona: Persona, *, system: str = "") -> MemCube | None:
        """See `Persona.warm`.

        Raises:
            ModelError: this model's layers keep keys and values of different shapes.
        """
        mark = self.engine.mark()  # before anything is read
        self.engine.ready()
        if self._prefixes is None:
            raise ModelError(
                f"The layers of {self.base.name} keep keys and values of different shapes.",
                hint="Prefixes of such models are not kept; chat without warming.",
            )

        def compute(request: Request) -> TensorBundle:
            return self.engine.keys_values(replace(request, mark=mark))

        return self._prefixes.warm(persona.id, compute, kind=persona.kind, system=system)

    def check(self, contribution: Contribution) -> None:
        """Raise unless the engine can execute these parts on this base model."""
        plan = CompositionPlan(self.base.fingerprint, contribution.parts)
        self.engine.check(Request(prompt=(0,), plan=plan, tensors=contribution.tensors), room=False)

    def _compose(self, persona: Persona | None, messages: Messages, options: ChatOptions) -> Composition:
        return self._composer.compose(None if persona is None else persona.id, messages, options)

    @staticmethod
    def _request(composition: Composition, seed: int, decoder: TextDecoder, mark: int) -> Request:
        return Request(
            prompt=composition.prompt,
            plan=composition.plan,
            tensors=composition.tensors,
            seed=seed,
            should_stop=decoder.stopped if composition.plan.options.stop_strings else None,
            scope=tuple(composition.revisions),
            mark=mark,
            blocks=composition.blocks,
        )

    def _reply(
        self, composition: Composition, completion: Completion, seed: int, decoder: TextDecoder
    ) -> Reply:
        return Reply(
            text=decoder.text(completion.tokens),
            tokens=completion.tokens,
            finish_reason=completion.finish_reason,
            persona=composition.persona,
            revisions=composition.revisions,
            plan=composition.plan,
            seed=seed,
            precision=self.base.precision,
            branch_precision=self.engine.branch_precision,
            prompt_tokens=composition.prompt,
            citations=composition.passages,
            dropped_turns=composition.dropped_turns,
            skipped=composition.skipped,
            steers=completion.steers,
            controls=composition.controls,
            cached_tokens=completion.cached_tokens,
            reused_tokens=completion.reused_tokens,
        )

    def _spill(self, shape: KVShape, branch_precision: str) -> PrefixLibrary:
        self._prefixes = PrefixLibrary(
            self.base, self.store, self.adapters, self._composer, shape, branch_precision
        )
        return self._prefixes

    def _forgotten(self, owner: str) -> None:
        self.engine.forget(owner)
