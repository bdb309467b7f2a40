"""From who to how: a persona at its current revision and a request become one plan.

    messages, persona, groups ──snapshot──► attachments ──contribute──► parts + tensors
                                     └────► recall ─────────────────► passages, prompt tokens

The composer reads; it never writes. What may be combined is decided by `persona_sdk.plan.COMBINATIONS`
when the plan is built, before any tensor is loaded into the engine.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pydantic import Field

from persona_sdk.adapters import AdapterRequest
from persona_sdk.config import GenerationOptions
from persona_sdk.errors import NotFoundError, PromptTooLongError
from persona_sdk.library import SHARED, AdapterLibrary
from persona_sdk.memory import MemoryStore, Passage
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, PassageRef, Passages, PlanPart, SoftPrefix
from persona_sdk.prompting import Message, Messages, drop_oldest, encode, parse_messages, with_passages
from persona_sdk.tensors import Digest, TensorBundle

# (owners, query, k, revision by owner) -> passages
Recall: TypeAlias = Callable[[tuple[str, ...], str, int, Mapping[str, int]], Sequence[Passage]]

_log = logging.getLogger("persona_sdk.compose")


class ChatOptions(GenerationOptions):
    """Generation options plus what concerns the conversation.

    ``recall_k`` memories at most are put into the prompt, if their score reaches ``recall_score``.
    ``overflow`` says what happens when the conversation does not fit the context: an error, or dropping
    the oldest turns, which is logged and reported in ``reply.dropped_turns``.
    """

    recall_k: int = Field(4, ge=0)
    recall_score: float = Field(
        0.1, description="cosine; unrelated texts score about 0 with the default embedder"
    )
    overflow: Literal["error", "drop_oldest_turns"] = "error"

    def generation(self) -> GenerationOptions:
        """The part that belongs into the plan."""
        return GenerationOptions(**self.model_dump(include=set(GenerationOptions.model_fields)))


@dataclass(frozen=True)
class Composition:
    """A plan, its tensors and prompt, and what they were made from.

    ``skipped`` names attachments that could not take part: the adapter's owner is no longer a group of
    the persona, or the adapter is not in this store.
    """

    plan: CompositionPlan
    prompt: tuple[int, ...]
    tensors: Mapping[Digest, TensorBundle] = field(default_factory=dict)
    persona: str | None = None
    revisions: Mapping[str, int] = field(default_factory=dict)
    passages: tuple[Passage, ...] = ()
    dropped_turns: int = 0
    skipped: tuple[str, ...] = ()


class Composer:
    """Builds compositions for one base model over one store."""

    def __init__(
        self, model: LanguageModel, store: MemoryStore, library: AdapterLibrary, recall: Recall
    ) -> None:
        self._model = model
        self._store = store
        self._library = library
        self._recall_from = recall

    def compose(
        self, persona: str | None, messages: Messages, options: ChatOptions, groups: Sequence[str] = ()
    ) -> Composition:
        """Plan one request. ``persona=None`` is the base model with an empty plan.

        Raises:
            InvalidInputError: the messages are not a conversation.
            CompositionError: the attached adapters may not be combined.
            PromptTooLongError: the prompt does not fit and turns may not be dropped.
        """
        turns = parse_messages(messages)
        owners = (persona, *groups) if persona is not None else ()
        revisions = {owner: self._store.head(owner) for owner in owners}
        parts: list[PlanPart] = []
        tensors: dict[Digest, TensorBundle] = {}
        skipped: list[str] = []
        for owner in owners:
            for attachment in self._library.attachments(owner, revision=revisions[owner]):
                try:
                    loaded = self._library.load(attachment)
                except NotFoundError:
                    loaded = None
                if loaded is None or attachment.adapter.owner not in (*owners, SHARED):
                    skipped.append(attachment.name)
                    continue
                request = AdapterRequest(
                    origin=loaded.label, weight=attachment.weight, text=turns[-1].content
                )
                contribution = loaded.adapter.contribute(attachment.state, request)
                parts += contribution.parts
                tensors |= contribution.tensors
        passages = self._recall(owners, turns, options, revisions)
        if passages:
            parts.append(Passages(items=tuple(map(_reference, passages))))
        plan = CompositionPlan(self._model.fingerprint, tuple(parts), options.generation())
        prompt, dropped = self._fit(turns, passages, plan, options)
        return Composition(plan, prompt, tensors, persona, revisions, passages, dropped, tuple(skipped))

    def _recall(
        self,
        owners: tuple[str, ...],
        turns: Sequence[Message],
        options: ChatOptions,
        revisions: Mapping[str, int],
    ) -> tuple[Passage, ...]:
        if not owners or options.recall_k == 0:
            return ()
        found = self._recall_from(owners, turns[-1].content, options.recall_k, revisions)
        return tuple(passage for passage in found if passage.score >= options.recall_score)

    def _fit(
        self,
        turns: tuple[Message, ...],
        passages: Sequence[Passage],
        plan: CompositionPlan,
        options: ChatOptions,
    ) -> tuple[tuple[int, ...], int]:
        """Token ids of the prompt and the number of turns that had to be dropped."""
        prefixes: tuple[SoftPrefix, ...] = plan.of(SoftPrefix)
        room = self._model.context_length - options.max_new_tokens - sum(p.length for p in prefixes)
        texts = [passage.text for passage in passages]
        dropped = 0
        while True:
            prompt = encode(self._model.tokenizer, with_passages(turns, texts))
            if len(prompt) <= room:
                break
            shorter = drop_oldest(turns) if options.overflow == "drop_oldest_turns" else None
            if shorter is None:
                raise PromptTooLongError(
                    f"The prompt has {len(prompt)} tokens; {max(room, 0)} fit beside "
                    f"{options.max_new_tokens} new ones in a context of {self._model.context_length}.",
                    hint='Shorten it, lower max_new_tokens, or pass overflow="drop_oldest_turns".',
                )
            turns, dropped = shorter, dropped + 1
        if dropped:
            _log.warning("dropped the %d oldest turns to fit %d tokens of context", dropped, room)
        return prompt, dropped


def _reference(passage: Passage) -> PassageRef:
    return PassageRef(
        cube_id=passage.id,
        owner=passage.owner,
        score=round(passage.score, 6),
        text_sha256=hashlib.sha256(passage.text.encode()).hexdigest(),
    )
