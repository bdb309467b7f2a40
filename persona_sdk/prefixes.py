"""The tie between the engine's prefixes and the store: a persona's stable prefix as an activation MemCube.

    warm   system + pinned memories ──► tokens ──engine──► keys, values ──commit──► activation cube
    chat   PrefixCache ──miss──► `PrefixLibrary.load` ──► the cube of one of the request's owners

The cube's sources are the pinned memories and the attachments and adapters it was computed under, so that
forgetting any of them erases it too. What finds it is the hash of composition and tokens: after any change
of an adapter or a gate it is never found again, and `warm` retires it. Reads write nothing.

| what is stored          | where              | form                                              |
|-------------------------|--------------------|---------------------------------------------------|
| keys, values            | payload            | [layers, lead + tokens, kv_heads, head_dim]       |
| token ids               | payload ``tokens`` | [tokens], compared in full before use             |
| how it is found         | header attributes  | `PrefixFacts`                                     |
"""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from persona_sdk.compose import ChatOptions, Composer, Composition
from persona_sdk.config import FrozenConfig
from persona_sdk.engine.prefix.bundles import KEYS, VALUES, KVShape, shape_of
from persona_sdk.engine.prefix.keys import BLOCK, chain, composition_key, lead_length, root
from persona_sdk.engine.request import Request
from persona_sdk.errors import NotFoundError, RevisionConflictError, StoreError
from persona_sdk.library import AdapterLibrary, Unused
from persona_sdk.memory import CubeDraft, CubeHeader, MemCube, MemoryStore, Source
from persona_sdk.memory.facts import PREFIX
from persona_sdk.models import LanguageModel
from persona_sdk.prompting import Message, stable_tokens
from persona_sdk.tensors import Digest, TensorBundle

SEMANTIC_TYPE = PREFIX
TOKENS = "tokens"
_TRIES = 10
_OWNERS_IN_RAM = 1024

_log = logging.getLogger("persona_sdk.prefixes")


class PrefixFacts(FrozenConfig):
    """What the cube of a prefix says in its attributes.

    ``chain`` is the hash of its last block boundary and includes the composition; ``lead`` positions of a
    soft prefix stand before the first of ``length`` tokens. ``dtype`` is that of the keys and values,
    ``branches`` that of the adapters they were computed with. ``tokenizer`` is the hash of what made the
    tokens; the base model's fingerprint, which is part of ``composition``, does not cover it.
    """

    composition: Digest
    chain: Digest
    block: int
    lead: int
    length: int
    tokens_sha256: str
    system_sha256: str
    dtype: str
    branches: str = "float32"
    tokenizer: str = ""


@dataclass(frozen=True)
class Kept:
    """A live cube of a prefix."""

    cube_id: str
    blob: Digest
    facts: PrefixFacts
    sources: frozenset[tuple[str, str]]
    trusted: bool


@dataclass(frozen=True)
class _Stable:
    """A persona's stable prefix at its revision: what `warm` has computed."""

    composition: Composition
    tokens: tuple[int, ...]
    sources: tuple[Source, ...]
    facts: PrefixFacts

    @property
    def request(self) -> Request:
        made = self.composition
        return Request(prompt=self.tokens, plan=made.plan, tensors=made.tensors, scope=tuple(made.revisions))


class PrefixLibrary:
    """Prefixes in a store; a `persona_sdk.engine.prefix.cache.Spill`.

    Args:
        model: the base model.
        store: where personas live.
        library: the adapters of that store.
        composer: makes the plans.
        shape: what the engine's pool takes; cubes of another precision are not read.
        branch_precision: of the adapters in the engine; cubes made with another are not read.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: MemoryStore,
        library: AdapterLibrary,
        composer: Composer,
        shape: KVShape,
        branch_precision: str = "float32",
        *,
        block: int = BLOCK,
    ) -> None:
        self._model = model
        self._store = store
        self._library = library
        self._composer = composer
        self._identity = {
            "dtype": str(shape.dtype).removeprefix("torch."),
            "branches": branch_precision,
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
        }
        self._block = block
        self._known: OrderedDict[str, tuple[object, tuple[Kept, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def warm(
        self,
        owner: str,
        compute: Callable[[Request], TensorBundle],
        *,
        kind: str = "user",
        system: str = "",
    ) -> MemCube | None:
        """Compute and store the stable prefix of a persona, unless that is there already; retire older ones.

        Args:
            owner: the persona.
            compute: the engine's forward pass over a soft prefix and all tokens of a prompt.
            kind: ``"user"`` or ``"group"``, for an owner that has no commit yet.
            system: the system message the application puts in front, if any.

        Returns:
            The activation cube, or None if less than one block of tokens is stable.

        Raises:
            PromptTooLongError: the pinned memories do not fit the context.
            RevisionConflictError: the persona kept changing meanwhile.
        """
        computed: tuple[PrefixFacts, TensorBundle] | None = None
        for _ in range(_TRIES):
            stable = self._stable(owner, system)
            if stable is None:
                continue  # something changed while it was put together
            if stable.facts.lead + stable.facts.length == 0:
                return None
            live = self._live(owner)
            named = frozenset((source.owner, source.cube_id) for source in stable.sources)
            for kept in live:
                if kept.trusted and kept.facts == stable.facts and kept.sources == named:
                    return self._store.get(owner, kept.cube_id)
            if computed is None or computed[0] != stable.facts:
                computed = stable.facts, self._payload(stable, compute(stable.request))
            with suppress(RevisionConflictError, NotFoundError):  # NotFoundError: a source was forgotten
                revision = self._store.commit(
                    owner,
                    kind=kind,
                    parent=stable.composition.revisions[owner],
                    add=[_draft(stable, computed[1])],
                    retire=[kept.cube_id for kept in live if _replaced(kept.facts, stable.facts)],
                    message="warm prefix",
                )
                return self._store.get(owner, revision.added[0])
        raise RevisionConflictError(
            f"{owner!r} changed {_TRIES} times while its prefix was computed.", hint="Warm it again later."
        )

    def load(
        self, hashes: Sequence[Digest], scopes: Sequence[str]
    ) -> tuple[tuple[int, ...], TensorBundle] | None:
        """The stored prefix of one of the owners `scopes` that ends at the first of these boundaries.

        Damaged or foreign ones are passed over: the prompt is computed instead.
        """
        place = {value: index for index, value in enumerate(hashes)}
        found = [
            (place[kept.facts.chain], owner, kept)
            for owner in scopes
            for kept in self._live(owner)
            if kept.facts.chain in place and self._usable(kept)
        ]
        for _, owner, kept in sorted(found, key=lambda item: item[0]):
            try:
                payload = self._store.load_blob(owner, kept.blob)
            except StoreError as error:
                _log.warning("prefix %s of %r cannot be read: %s", kept.cube_id[:8], owner, error)
                continue
            tokens = payload.get(TOKENS)
            if tokens is not None and tokens.ndim == 1 and not tokens.is_floating_point():
                ids = tuple(int(token) for token in tokens.tolist())
                if _tokens_sha256(ids) == kept.facts.tokens_sha256:
                    return ids, {name: payload[name] for name in (KEYS, VALUES) if name in payload}
            _log.warning("prefix %s of %r is not what its header says", kept.cube_id[:8], owner)
        return None

    def _stable(self, owner: str, system: str) -> _Stable | None:
        """The stable prefix now; None if the store changed under it."""
        revisions = self._library.revisions(owner)
        # Before composing: what is missing here cannot take part below, and what takes part is a source.
        sources = self._adapter_sources(revisions)
        turns = [Message(role="system", content=system)] if system else []
        composition = self._composer.compose(
            owner,
            [*turns, Message(role="user", content=".")],
            ChatOptions(recall_k=0, max_new_tokens=1),
        )
        if dict(composition.revisions) != revisions:
            return None
        for passage in composition.passages:
            cube = self._store.lookup(passage.owner, [passage.id]).get(passage.id)
            if cube is None:
                return None
            sources.append(Source.of(cube))
        texts = [passage.text for passage in composition.passages]
        tokens = stable_tokens(self._model.tokenizer, system, texts)
        tokens = tokens[: len(tokens) // self._block * self._block]
        key = composition_key(composition.plan)
        facts = PrefixFacts(
            composition=key,
            chain=[root(key, self._block), *chain(key, tokens, self._block)][-1],
            block=self._block,
            lead=lead_length(composition.plan),
            length=len(tokens),
            tokens_sha256=_tokens_sha256(tokens),
            system_sha256=hashlib.sha256(system.encode()).hexdigest(),
            **self._identity,
        )
        unique = {(source.owner, source.cube_id): source for source in sources}
        return _Stable(composition, tokens, tuple(unique.values()), facts)

    def _adapter_sources(self, revisions: Mapping[str, int]) -> list[Source]:
        """The attachments within reach at these revisions, their adapters, and what gates those."""
        preferences = [self._library.preferences(owner, revision=n) for owner, n in revisions.items()]
        sources = [Source.of(cube) for cubes in preferences for cube in cubes]
        for owner, attachment, found in self._library.reachable(revisions):
            if found is not Unused.OUT_OF_REACH:
                where = attachment.adapter
                cubes = self._store.lookup(owner, [attachment.cube_id])
                adapters = self._store.lookup(where.owner, [where.cube_id])
                sources += [Source.of(cube) for cube in (*cubes.values(), *adapters.values())]
        return sources

    def _payload(self, stable: _Stable, bundle: TensorBundle) -> TensorBundle:
        shape_of(bundle, stable.facts.lead + stable.facts.length)
        kept = {name: bundle[name].detach().cpu() for name in (KEYS, VALUES)}
        return {**kept, TOKENS: torch.tensor(stable.tokens, dtype=torch.int64)}

    def _usable(self, kept: Kept) -> bool:
        # An archive may claim anything, and numbers cannot be compared with tokens: those are not used.
        facts = kept.facts
        return (
            kept.trusted
            and facts.block == self._block
            and facts.model_dump(include=set(self._identity)) == self._identity
        )

    def _live(self, owner: str) -> tuple[Kept, ...]:
        """The prefix cubes of an owner at its newest revision."""
        state = self._store.mark(owner)
        with self._lock:
            if owner in self._known and self._known[owner][0] == state:
                self._known.move_to_end(owner)
                return self._known[owner][1]
        found = []
        for cube in self._store.cubes(owner, kind="activation"):
            if cube.header.semantic_type == SEMANTIC_TYPE and cube.blob is not None:
                with suppress(ValidationError):  # written by another version: neither used nor retired
                    facts = PrefixFacts.model_validate(cube.header.attributes)
                    sources = frozenset((s.owner, s.cube_id) for s in cube.header.sources)
                    found.append(Kept(cube.id, cube.blob, facts, sources, cube.header.trust == "system"))
        with self._lock:
            self._known[owner] = (state, tuple(found))
            if len(self._known) > _OWNERS_IN_RAM:
                self._known.popitem(last=False)
        return tuple(found)


def tokenizer_fingerprint(tokenizer: Any) -> Digest:
    """SHA-256 (hex) of what turns text into tokens: vocabulary, merges, normalization and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return hashlib.sha256(f"tokenizer-1\0{rules}\0{template}".encode()).hexdigest()


def _draft(stable: _Stable, payload: TensorBundle) -> CubeDraft:
    header = CubeHeader(
        title="stable prefix",
        semantic_type=SEMANTIC_TYPE,
        trust="system",
        sources=stable.sources,
        attributes=stable.facts.model_dump(),
    )
    return CubeDraft(kind="activation", payload=payload, header=header)


def _replaced(old: PrefixFacts, new: PrefixFacts) -> bool:
    """Prefixes of other system messages under the same composition stay."""
    return old.composition != new.composition or old.system_sha256 == new.system_sha256


def _tokens_sha256(tokens: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()
