"""What a conversation gives back: replies, streams of text, and their explanation."""

import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona_sdk.engine import Completion, Generation, Steer
from persona_sdk.memory import Passage
from persona_sdk.plan import CompositionPlan, DecodingRule, KVPrefix, LowRankPatch, SoftPrefix
from persona_sdk.steering import Steering


@dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, with everything needed to explain it and to produce it again.

    ``str(reply)`` is the text. The same prompt tokens, plan, seed and steers give the same tokens if the base
    weights are float32; in another `precision` the batch a row was in rounds along. Adapters are read in
    `branch_precision`. ``cached_tokens`` of the
    prompt came from kept keys and values. ``controls`` are the preferences the reply began with, by adapter
    and name. ``reused_tokens`` of it have those of a memory that was computed
    apart, which an engine does only when told to (`EngineOptions.block_reuse`). With any, the tokens are
    those of an approximation: an engine with other options gives others.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    persona: str | None
    revisions: Mapping[str, int]
    plan: CompositionPlan
    seed: int
    precision: str
    branch_precision: str
    prompt_tokens: tuple[int, ...] = field(repr=False)
    citations: tuple[Passage, ...] = ()
    dropped_turns: int = 0
    skipped: tuple[str, ...] = ()
    steers: tuple[Steer, ...] = ()
    controls: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cached_tokens: int = field(default=0, compare=False)
    reused_tokens: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def plan_id(self) -> str:
        """Content hash of the plan."""
        return self.plan.plan_id

    @property
    def usage(self) -> Usage:
        """Tokens read and written."""
        return Usage(len(self.prompt_tokens), len(self.tokens))


class ReplyStream:
    """Pieces of text as they are made, for ``for`` and ``async for``; ``.reply`` is the whole answer.

    Generation starts at once. Dropping the stream, or leaving its loop early, ends it.
    """

    def __init__(
        self,
        generation: Generation,
        decoder: "TextDecoder",
        finish: Callable[[Completion], Reply],
        steering: Steering,
    ) -> None:
        self._generation = generation
        self._decoder = decoder
        self._finish = finish
        self._steering = steering
        self._sent = ""
        self._pieces = self._read()
        weakref.finalize(self, generation.cancel)

    def __iter__(self) -> Iterator[str]:
        whole = False
        try:
            yield from self._pieces
            whole = True
        finally:
            if not whole:
                self.cancel()

    def __next__(self) -> str:
        return next(self._pieces)

    async def __aiter__(self) -> AsyncIterator[str]:
        tokens: list[int] = []
        async for token in self._generation:
            tokens.append(token)
            if piece := self._piece(tokens):
                yield piece
        if piece := self._piece(tokens, last=True):
            yield piece

    @property
    def reply(self) -> Reply:
        """The whole answer; reads the rest of the stream first."""
        for _ in self._pieces:
            pass
        completion = self._generation.result()
        if completion.error is not None:
            raise completion.error
        return self._finish(completion)

    def steer(self, /, *, weights: Mapping[str, float] | None = None, **controls: float) -> None:
        """Change the rest of the reply: named controls of attached adapters, or strengths of attachments.

        Args:
            weights: new strength by attachment, ``{"nurses/tone": 0.2}``.
            **controls: new values of controls, by the names their adapters give them.

        Raises:
            InvalidInputError: this reply has no such control or attachment.
            CompositionError: more than gates would have to change.
            EngineError: the reply is complete.
        """
        if gates := self._steering.gates(controls, weights or {}):
            self._generation.steer(gates)

    def cancel(self) -> None:
        """End the reply here; ``.reply`` is what was said so far, with ``finish_reason`` "cancelled"."""
        self._generation.cancel()

    def _read(self) -> Iterator[str]:
        tokens: list[int] = []
        for token in self._generation:
            tokens.append(token)
            if piece := self._piece(tokens):
                yield piece
        if piece := self._piece(tokens, last=True):
            yield piece

    def _piece(self, tokens: Sequence[int], *, last: bool = False) -> str:
        text = self._decoder.text(tokens) if last else self._decoder.settled(tokens)
        piece = text[len(self._sent) :]
        self._sent = max(self._sent, text, key=len)
        return piece


class TextDecoder:
    """Text of a growing list of tokens, cut at the first stop string and never inside a character."""

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stop_strings
        self._window = 4 * max(map(len, stop_strings), default=0) + 16  # its bytes, and slack

    def text(self, tokens: Sequence[int]) -> str:
        """The final text of these tokens."""
        return self._cut(tokens)[0]

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string has appeared, asked after every token.

        Only the last tokens are decoded, as the worker waits for this: those before were looked at already.
        """
        return bool(self._stops) and self._cut(tokens[-self._window :])[1]

    def settled(self, tokens: Sequence[int]) -> str:
        """The part of the text that later tokens cannot change any more."""
        text, stopped = self._cut(tokens)
        if stopped:
            return text
        text = text.rstrip("\ufffd")  # an unfinished multi-byte character
        pending = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(pending, default=0)]

    def _cut(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text up to the first stop string, and whether there was one."""
        text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


@dataclass(frozen=True)
class Explanation:
    """Why a reply came out as it did. Prints as text; ``rich`` renders it as a table."""

    reply: Reply

    def rows(self) -> list[tuple[str, str]]:
        """What was used, as (what, detail) pairs."""
        reply = self.reply
        rows = [
            ("persona", reply.persona or "(base model)"),
            ("revisions", ", ".join(f"{owner}@{n}" for owner, n in reply.revisions.items()) or "-"),
        ]
        for part in reply.plan.parts:
            if isinstance(part, LowRankPatch):
                low, high = min(part.gate), max(part.gate)
                gate = f"{low:g}" if low == high else f"{low:g}..{high:g}"
                detail = f"{part.origin}  rank {part.rank}, gate {gate}, weights {part.factors[:12]}"
                rows.append(("adapter", detail))
            elif isinstance(part, SoftPrefix):
                rows.append(("soft prefix", f"{part.origin}  {part.length} vectors {part.vectors[:12]}"))
            elif isinstance(part, KVPrefix):
                rows.append(("KV prefix", f"{part.origin}  {part.length} tokens {part.cache[:12]}"))
            elif isinstance(part, DecodingRule):
                rows.append(("decoding rule", f"{part.origin}  {len(part.bias)} tokens"))
        for adapter, controls in reply.controls.items():
            values = ", ".join(f"{name} {value:.3g}" for name, value in controls.items())
            rows.append(("preference", f"{adapter}  {values}"))
        for passage in reply.citations:
            pinned = passage.header.pinned
            score = "" if pinned else f"{passage.score:.2f}  "
            rows.append(("pinned" if pinned else "memory", f"{score}{passage.owner}: {passage.text}"))
        rows += [
            ("steered", f"from token {steer.token}: new gate for {', '.join(map(self._origin, steer.gates))}")
            for steer in reply.steers
        ]
        if reply.cached_tokens:
            rows.append(("reused", f"keys and values of {reply.cached_tokens} prompt tokens"))
        if reply.reused_tokens:
            rows.append(("approximated", f"{reply.reused_tokens} prompt tokens, of memories computed apart"))
        if reply.dropped_turns:
            rows.append(("dropped", f"{reply.dropped_turns} oldest turns did not fit"))
        rows += [("left out", what) for what in reply.skipped]
        options = reply.plan.options
        how = f"sampled, seed {reply.seed}" if options.do_sample else "greedy"
        rows.append(("decoding", f"{how}, at most {options.max_new_tokens} tokens"))
        precision = reply.precision
        if reply.plan.low_rank and reply.branch_precision != precision:
            precision += f", adapters in {reply.branch_precision}"
        rows.append(("precision", precision))
        rows.append(("plan", reply.plan_id[:16]))
        return rows

    def _origin(self, patch: int) -> str:
        return self.reply.plan.low_rank[patch].origin

    def __str__(self) -> str:
        return "\n".join(f"{what:<14}{detail}" for what, detail in self.rows())

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=None, show_header=False, box=None, padding=(0, 2, 0, 0))
        for what, detail in self.rows():
            table.add_row(Text(what, style="bold cyan"), Text(detail))  # Text: memories are no markup
        return table
