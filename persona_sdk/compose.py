"""From who to how: a persona at its current revision and a request become one plan.

    messages, persona, groups ──snapshot──► attachments ──contribute──► parts + tensors
                                     ├────► pinned memories ──────────┐
                                     └────► recall ───────────────────┴► passages, prompt tokens

The composer reads; it never writes. What may be combined is decided by `persona_sdk.plan.COMBINATIONS`
when the plan is built, before any tensor is loaded into the engine.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, TypeAlias

from pydantic import Field

from persona_sdk.adapter_cache import PlanTensors
from persona_sdk.adapters import AdapterRequest
from persona_sdk.config import GenerationOptions
from persona_sdk.errors import PromptTooLongError
from persona_sdk.library import AdapterLibrary, Unused
from persona_sdk.memory import MemCube, MemoryStore, Passage
from persona_sdk.memory.cube import utc_now
from persona_sdk.memory.facts import DOUBTFUL, PROMOTION
from persona_sdk.memory.turns import TURN
from persona_sdk.models import LanguageModel
from persona_sdk.passage_spans import Span, passage_spans
from persona_sdk.plan import CompositionPlan, PassageRef, Passages, PlanPart, SoftPrefix
from persona_sdk.prompting import Message, Messages, drop_oldest, encode, parse_messages, with_passages
from persona_sdk.steering import Contributor
from persona_sdk.tensors import Digest, TensorBundle

# (owners, query, k, revision by owner, also what others shared) -> passages
Recall: TypeAlias = Callable[[tuple[str, ...], str, int, Mapping[str, int], bool], Sequence[Passage]]

# What the header of a pinned memory says in its attributes. Such a text is in every prompt of its owner, as
# are those that the scheduler promoted (`persona_sdk.promotion`), which stand behind the pinned ones.
PINNED = {"pinned": True}
_OWNERS_IN_RAM = 1024

_log = logging.getLogger("persona_sdk.compose")


def fit_for_prompts(passages: Sequence[Passage], conversation: Sequence[str]) -> tuple[Passage, ...]:
    """Leave out what reads like an instruction or contradicts something better founded, and recorded turns
    that would only repeat something: this conversation, a question, or what was drawn from them and is among
    the passages itself.
    """
    drawn = {(s.owner, s.cube_id) for passage in passages for s in passage.header.sources}
    here = {text.strip().casefold() for text in conversation}

    def idle(passage: Passage) -> bool:
        text = passage.text.strip()
        return passage.header.semantic_type == TURN and (
            text.endswith("?") or text.casefold() in here or (passage.owner, passage.id) in drawn
        )

    return tuple(p for p in passages if not idle(p) and not DOUBTFUL & set(p.header.tags))


def promoted_ids(cubes: Iterable[MemCube]) -> set[str]:
    """The texts that an owner's activation cubes put into every prompt."""
    return {
        source.cube_id
        for cube in cubes
        if cube.header.semantic_type == PROMOTION and cube.header.trust == "system"
        for source in cube.header.sources
        if source.owner == cube.owner
    }


class ChatOptions(GenerationOptions):
    """Generation options plus what concerns the conversation.

    ``recall_k`` memories at most are put into the prompt, if their score reaches ``recall_score``.
    ``overflow`` says what happens when the conversation does not fit the context: an error, or dropping
    the oldest turns, which is logged and reported in ``reply.dropped_turns``.
    """

    recall_k: int = Field(4, ge=0)
    recall_score: float = Field(
        0.1, description="least score, in units of the cosine; unrelated texts score about 0"
    )
    recall_shared: bool = Field(
        False, description="also what others shared with the persona, which nobody has reviewed"
    )
    overflow: Literal["error", "drop_oldest_turns"] = "error"

    def generation(self) -> GenerationOptions:
        """The part that belongs into the plan."""
        return GenerationOptions(**self.model_dump(include=set(GenerationOptions.model_fields)))


@dataclass(frozen=True)
class Composition:
    """A plan, its tensors and prompt, and what they were made from.

    ``passages`` are the pinned memories, which have no score of their own and get 1, and the recalled ones.
    ``skipped`` says what could not take part and why: attachments whose adapter is out of reach or not in
    this store, memories that did not fit the context. ``blocks`` says which tokens of the prompt are which
    recalled memories, if the composer looks for them.
    """

    plan: CompositionPlan
    prompt: tuple[int, ...]
    tensors: Mapping[Digest, TensorBundle] = field(default_factory=dict)
    persona: str | None = None
    revisions: Mapping[str, int] = field(default_factory=dict)
    passages: tuple[Passage, ...] = ()
    dropped_turns: int = 0
    skipped: tuple[str, ...] = ()
    contributors: tuple[Contributor, ...] = field(default=(), repr=False)
    blocks: tuple[Span, ...] = ()

    @property
    def controls(self) -> dict[str, dict[str, float]]:
        """Values of the adapters' controls before anything is steered, by adapter."""
        found: dict[str, dict[str, float]] = {}
        for contributor in self.contributors:
            if values := contributor.controls:
                found.setdefault(contributor.name, dict(values))
        return found


class Composer:
    """Builds compositions for one base model over one store.

    Args:
        model: the base model.
        store: where personas live.
        library: the adapters of that store.
        recall: finds memories.
        blocks: also say where in the prompt the recalled memories stand, which takes a second tokenization.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: MemoryStore,
        library: AdapterLibrary,
        recall: Recall,
        *,
        blocks: bool = False,
    ) -> None:
        self._model = model
        self._store = store
        self._library = library
        self._recall_from = recall
        self._blocks = blocks
        self._pinned = PinnedMemories(store)

    def compose(self, persona: str | None, messages: Messages, options: ChatOptions) -> Composition:
        """Plan one request from one snapshot. ``persona=None`` is the base model with an empty plan.

        Raises:
            InvalidInputError: the messages are not a conversation.
            CompositionError: the attached adapters may not be combined.
            PromptTooLongError: the prompt does not fit and turns may not be dropped.
        """
        turns = parse_messages(messages)
        revisions: dict[str, int] = {}
        if persona is not None:
            revisions = self._library.revisions(persona)
        contributors, tensors, skipped = self._adapters(revisions, turns[-1].content)
        adapted = tuple(part for contributor in contributors for part in contributor.parts)
        pinned = self._pinned.of(revisions)
        pinned, passages = self._recall(revisions, turns, options, pinned)
        prefix = sum(part.length for part in adapted if isinstance(part, SoftPrefix))
        fitted = self._fit(turns, pinned, passages, prefix, options)
        parts: tuple[PlanPart, ...] = adapted
        used = (*pinned, *fitted.passages)
        if used:
            parts = (*parts, Passages(items=tuple(map(_reference, used))))
        plan = CompositionPlan(self._model.fingerprint, parts, options.generation())
        skipped += [f"memory {p.id[:8]}: does not fit" for p in passages[len(fitted.passages) :]]
        return Composition(
            plan=plan,
            prompt=fitted.prompt,
            tensors=PlanTensors(tensors),
            persona=persona,
            revisions=revisions,
            passages=used,
            dropped_turns=fitted.dropped_turns,
            skipped=tuple(skipped),
            contributors=contributors,
            blocks=self._spans(fitted, pinned) if self._blocks else (),
        )

    def _adapters(
        self, revisions: Mapping[str, int], text: str
    ) -> tuple[tuple[Contributor, ...], dict[Digest, TensorBundle], list[str]]:
        """What all attachments contribute, the tensors that takes, and which were left out and why."""
        contributors: list[Contributor] = []
        tensors: dict[Digest, TensorBundle] = {}
        skipped: list[str] = []
        for _, attachment, found in self._library.reachable(revisions):
            if isinstance(found, Unused):
                gone = ", no longer a group" if found is Unused.OUT_OF_REACH else ""
                skipped.append(f"{attachment.name}: {found}{gone}")
                continue
            request = AdapterRequest(origin=found.label, weight=attachment.weight, text=text)
            contribution = found.adapter.contribute(attachment.state, request)
            contributors.append(
                Contributor(
                    name=attachment.name,
                    adapter=found.adapter,
                    state=attachment.state,
                    request=request,
                    parts=contribution.parts,
                    first=sum(len(earlier.patches) for earlier in contributors),
                )
            )
            tensors |= contribution.tensors
        return tuple(contributors), tensors, skipped

    def _recall(
        self,
        revisions: Mapping[str, int],
        turns: Sequence[Message],
        options: ChatOptions,
        pinned: tuple[Passage, ...],
    ) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
        """The pinned memories, those with a ``why`` that were asked for too, and the others nearest to what
        was said last.
        """
        if not revisions or options.recall_k == 0:
            return pinned, ()
        asked, known = turns[-1].content, {passage.id for passage in pinned}
        # Twice as many: some are turns that say no more than what was drawn from them.
        found = self._recall_from(
            tuple(revisions), asked, 2 * options.recall_k + len(pinned), revisions, options.recall_shared
        )
        near = [p for p in found if p.score >= options.recall_score]
        why = {p.id: p.why for p in near}
        fresh = [p for p in near if p.id not in known]
        recalled = fit_for_prompts(fresh, [turn.content for turn in turns])[: options.recall_k]
        return tuple(replace(p, why=why.get(p.id)) for p in pinned), recalled

    def _fit(
        self,
        turns: tuple[Message, ...],
        pinned: tuple[Passage, ...],
        passages: tuple[Passage, ...],
        prefix: int,
        options: ChatOptions,
    ) -> "_Fitted":
        """The prompt that fits: without the least relevant memories first, then without the oldest turns."""
        always = [passage.text for passage in pinned]
        room = self._model.context_length - options.max_new_tokens - prefix
        given = len(turns)
        while True:
            prompt = encode(
                self._model.tokenizer, with_passages(turns, [*always, *(p.text for p in passages)])
            )
            if len(prompt) <= room:
                break
            shorter = drop_oldest(turns) if options.overflow == "drop_oldest_turns" else None
            if passages:
                passages = passages[:-1]
            elif shorter is not None:
                turns = shorter
            else:
                raise PromptTooLongError(
                    f"The prompt has {len(prompt)} tokens; {max(room, 0)} fit beside "
                    f"{options.max_new_tokens} new ones in a context of {self._model.context_length}.",
                    hint='Shorten it, lower max_new_tokens, or pass overflow="drop_oldest_turns".'
                    + (f" {len(pinned)} pinned memories are always in it." if pinned else ""),
                )
        dropped = given - len(turns)
        if dropped:
            _log.warning("dropped the %d oldest turns to fit %d tokens of context", dropped, room)
        return _Fitted(prompt, turns, passages, dropped)

    def _spans(self, fitted: "_Fitted", pinned: tuple[Passage, ...]) -> tuple[Span, ...]:
        """Where the recalled passages stand. The pinned ones before them are part of what never changes."""
        texts = [passage.text for passage in (*pinned, *fitted.passages)]
        turns = with_passages(fitted.turns, texts)
        return passage_spans(self._model.tokenizer, turns, texts, fitted.prompt, first=len(pinned))


class PinnedMemories:
    """The pinned memories of owners at their revisions, oldest first; read once a revision, kept in RAM.

    Those of groups come before the persona's own, which change more often: what members share stands at the
    beginning of their prompts.
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._kept: OrderedDict[str, tuple[object, tuple[Passage, ...]]] = OrderedDict()
        self._lock = threading.Lock()
        store.on_forget(self._drop)

    def of(self, revisions: Mapping[str, int]) -> tuple[Passage, ...]:
        """The pinned memories of all owners, in the order in which they stand in the prompt."""
        now = utc_now()
        owners = [*list(revisions)[1:], *list(revisions)[:1]]
        found = [passage for owner in owners for passage in self._of_owner(owner, revisions[owner])]
        return tuple(p for p in found if _stands(p, now) and may_see(p, next(iter(revisions))))

    def _of_owner(self, owner: str, revision: int) -> tuple[Passage, ...]:
        if revision == 0:
            return ()
        state = (revision, self._store.mark(owner))  # the mark changes when something is forgotten
        with self._lock:
            if owner in self._kept and self._kept[owner][0] == state:
                self._kept.move_to_end(owner)
                return self._kept[owner][1]
        texts = self._store.cubes(owner, revision=revision, kind="plaintext")
        promoted = promoted_ids(self._store.cubes(owner, revision=revision, kind="activation"))
        pinned = [cube for cube in texts if cube.header.pinned]
        pinned += [cube for cube in texts if cube.id in promoted and not cube.header.pinned]
        passages = tuple(
            Passage(cube.id, cube.owner, cube.text, 1.0, cube.header.created_at, cube.header)
            for cube in pinned
            if cube.text is not None and cube.state != "archived"
        )
        with self._lock:
            self._kept[owner] = (state, passages)
            if len(self._kept) > _OWNERS_IN_RAM:
                self._kept.popitem(last=False)
        return passages

    def _drop(self, owner: str) -> None:
        with self._lock:
            self._kept.pop(owner, None)


def may_see(passage: Passage, persona: str) -> bool:
    """Whether a memory may be in a persona's prompt: membership in a group does not share what is special."""
    return passage.owner == persona or passage.header.sensitivity != "special"


def _stands(passage: Passage, now: datetime) -> bool:
    header = passage.header
    return header.valid(now) and not header.expired(now) and not DOUBTFUL & set(header.tags)


@dataclass(frozen=True)
class _Fitted:
    prompt: tuple[int, ...]
    turns: tuple[Message, ...]
    passages: tuple[Passage, ...]
    dropped_turns: int


def _reference(passage: Passage) -> PassageRef:
    return PassageRef(
        cube_id=passage.id,
        owner=passage.owner,
        score=round(passage.score, 6),
        text_sha256=hashlib.sha256(passage.text.encode()).hexdigest(),
    )
