"""The loop all requests share, one step at a time: admit, prefill a chunk, decode one token, sample, emit.

    queue ──admit──► row table ──chunks under a token budget──► prompt done ──one token a step──► done
              │ slots, keys and values reserved here, given back when the row ends

A step never waits for a slow row: prompts are computed in chunks, ended rows are gone before the next
step, and what goes wrong with one row ends that row alone. Single-threaded; `Engine` runs it in its worker.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.decode_graphs import decode_graphs
from persona_sdk.engine.entries import entries, given_entries
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.generation import Generation
from persona_sdk.engine.options import EngineOptions
from persona_sdk.engine.prefix.bundles import KVShape
from persona_sdk.engine.prefix.cache import PrefixCache, Spill
from persona_sdk.engine.request import Completion, Steer
from persona_sdk.engine.row import Row
from persona_sdk.engine.sampling import choose
from persona_sdk.engine.schedule import Fit, Prefilling, Queue, ScheduleOptions, Waiting, chunks
from persona_sdk.engine.table import RowTable
from persona_sdk.errors import EngineError, NumericalError, PersonaError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import KVPrefix

logger = logging.getLogger("persona_sdk.engine")

SpillFactory = Callable[[KVShape, str], Spill]


class Loop:
    """Queue, row table and the steps over them. Every method is called by one thread at a time."""

    def __init__(
        self,
        model: LanguageModel,
        forward: Forward,
        options: EngineOptions,
        prefixes: PrefixCache,
        spill: SpillFactory | None = None,
        blocks: PrefixCache | None = None,
    ) -> None:
        self.model, self.forward, self.options = model, forward, options
        self.table = RowTable(model, forward, options, prefixes, blocks)
        self.graphs = decode_graphs(forward, self.table.pool, self.table.patches, model.device, options)
        shape = self.table.kv_shape
        prefixes.serve(shape, spill(shape, self.table.branch_precision) if spill and shape else None)
        self._queue = Queue(ScheduleOptions(prefill_tokens=options.prefill_tokens, max_wait=options.max_wait))
        self._waiting: dict[int, Generation] = {}
        self._end_tokens = end_tokens(model)
        self._ticket = 0
        self.steps = 0
        self.stirred = False  # somebody may have cancelled since the last step

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.table.rows and not self._waiting

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    def close(self) -> None:
        """Release the tiers and leave the base model as it was found."""
        if self.graphs is not None:
            self.graphs.clear()
        self.table.close()
        self.forward.close()

    def enqueue(self, generation: Generation) -> None:
        """Put a request in line; its adapters start to load."""
        request = generation.request
        self._ticket += 1
        self._waiting[self._ticket] = generation
        self._queue.add(
            Waiting(
                ticket=self._ticket,
                arrived=self.steps,
                scopes=request.scope,
                tokens_to_prefill=entries(request),
                kv_tokens=entries(request) + request.plan.options.max_new_tokens,
                resident=self.table.resident(request),
            )
        )
        self.table.prefetch(request)

    def step(self) -> None:
        """One step of everything that runs."""
        self.steps += 1
        with torch.inference_mode():
            self._drop_cancelled()
            self._admit()
            self._steer()
            decoding = [row for row in self.table.rows.values() if row.tokens]
            plan = chunks(
                [Prefilling(row.number, row.remaining) for row in self.table.rows.values() if row.remaining],
                self.options.prefill_tokens,
            )
            if plan:
                self._prefill([(self.table.rows[number], count) for number, count in plan])
            if decoding:
                self._pass(decoding, [row.step() for row in decoding])

    def fail_all(self, error: PersonaError) -> None:
        """End everything that runs or waits with an error."""
        for row in tuple(self.table.rows.values()):
            self._end(row, "error", error)
        for ticket, generation in tuple(self._waiting.items()):
            self._leave_queue(ticket)
            generation.finish(Completion((), "error", error=error))

    # Joining ------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        if not self._waiting or not self.table.places:
            return
        active = Counter(row.request.scope[0] for row in self.table.rows.values() if row.request.scope)
        self._queue.admit(self._try, active, step=self.steps, room=lambda: self.table.places)

    def _try(self, ticket: int) -> Fit:
        """Reserve all a request needs and make it a row, or say that it has to wait."""
        generation = self._waiting[ticket]
        try:
            row = self.table.reserve(generation)
        except Exception as error:  # whatever it is, it is this request's alone
            if not isinstance(error, PersonaError):
                logger.exception("a request could not be admitted")
                error = EngineError(f"The request could not be admitted: {error!r}.")
            del self._waiting[ticket]
            generation.finish(Completion((), "error", error=error))
            return Fit.NEVER
        if row is None:
            return Fit.NOT_NOW
        del self._waiting[ticket]
        return Fit.YES

    # Running ------------------------------------------------------------------------------------------

    def _prefill(self, parts: Sequence[tuple[Row, int]]) -> None:
        pieces = [(row, piece) for row, count in grouped(parts) for piece in row.pieces(count)]
        self._pass([row for row, _ in pieces], [piece for _, piece in pieces])

    def _pass(self, rows: Sequence[Row], new: Sequence[RowTokens]) -> None:
        """One forward pass. Rows whose prompt is done, or that are past it, get their next token.

        A row may stand there several times, with pieces of its prompt that follow one another.
        """
        counts, ready = [len(tokens.tokens) for tokens in new], []
        left = {row.number: row.remaining for row in rows}
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            left[row.number] -= count
            if left[row.number] <= 0:
                ready.append(index)
        logits = self.forward_pass([row.number for row in rows], new, wanted=ready)
        for row, count in zip(rows, counts, strict=True):
            row.advance(count)
            if row.remaining == 0 and not row.tokens:
                self._keep(row)
                if row.request.export:
                    row.exported = self.table.pool.export(row.table[: row.past])
        if not ready:
            return
        chosen = choose(logits, [rows[index].sampler for index in ready])
        # The one wait for the device in a step.
        for index, token, bad in zip(ready, chosen.ids, chosen.bad, strict=True):
            self._take(rows[index], token, bad)

    def forward_pass(
        self,
        numbers: Sequence[int],
        new: Sequence[RowTokens],
        *,
        wanted: Sequence[int] | None = None,
        every: bool = False,
    ) -> Float[Tensor, "outputs vocab"]:
        """Logits of the rows' new tokens under their own patches; see `PackedBatch` and `Forward`.

        Good until the next pass, which may write its own over them.
        """
        if self.graphs is not None and not every:
            logits = self.graphs.logits(numbers, new, wanted)
            if logits is not None:
                return logits
        batch = pack(new, self.model.device, wanted)
        branches = self.table.patches.batch(numbers, self.forward.spread(batch.lengths), self.model.device)
        return self.forward(batch, self.table.pool, branches, every=every)

    def _take(self, row: Row, token: int, bad: bool) -> None:
        if bad:
            error = NumericalError(
                f"The logits of token {len(row.tokens)} are not numbers.",
                hint="An adapter, a soft prefix or a kept prefix holds NaN or huge values: detach it.",
            )
            self._end(row, "error", error)
            return
        row.tokens.append(token)
        reason: str | None
        try:
            reason = self._finish_reason(row)
        except Exception as error:  # the caller's own should_stop
            logger.exception("should_stop failed")
            self._end(row, "error", EngineError(f"should_stop failed: {error!r}."))
            return
        if reason is None:
            row.generation.emit(token)
        else:
            self._end(row, reason, last=token)

    def _finish_reason(self, row: Row) -> str | None:
        options, tokens = row.request.plan.options, row.tokens
        ended = tokens[-1] in self._end_tokens and not options.ignore_eos
        if ended or (row.request.should_stop is not None and row.request.should_stop(tokens)):
            return "stop"
        return "length" if len(tokens) >= options.max_new_tokens else None

    def _steer(self) -> None:
        for row in self.table.rows.values():
            # Not in the middle of a prompt: what it leaves would depend on the chunk, and could not be kept.
            if row.tokens and (gates := row.generation.take_gates()):
                row.steers.append(Steer(len(row.tokens), gates))
                for number, gate in gates.items():
                    self.table.patches.steer(row.number, number, gate)

    def _keep(self, row: Row) -> None:
        """Keep the keys and values of a whole prompt, up to the first token that only approximates them."""
        request, cached = row.request, row.cached
        if not request.keep_prefix or request.plan.of(KVPrefix):
            return
        if self.table.prefixes.wants(row.exact, cached):
            given, count = given_entries(request), self.table.prefixes.keepable(row.exact)
            bundle = self.table.pool.export(row.table[given + cached if cached else 0 : given + count])
            self.table.prefixes.insert(
                request.plan, request.prompt[:count], bundle, request.scope, start=cached, mark=row.mark
            )

    # Leaving ------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        if not self.stirred:
            return
        self.stirred = False
        for row in tuple(self.table.rows.values()):
            if row.generation.cancelled:
                self._end(row, "cancelled")
        for ticket, generation in tuple(self._waiting.items()):
            if generation.cancelled:
                self._leave_queue(ticket)
                generation.finish(Completion((), "cancelled"))

    def _leave_queue(self, ticket: int) -> None:
        del self._waiting[ticket]
        self._queue.remove(ticket)

    def _end(self, row: Row, reason: str, error: PersonaError | None = None, last: int | None = None) -> None:
        """Free everything a row holds, then tell its reader."""
        self.table.free(row)
        row.generation.finish(
            Completion(
                tuple(row.tokens), reason, row.cached, tuple(row.steers), error, row.exported, row.reused
            ),
            last,
        )


def grouped(parts: Sequence[tuple[Row, int]]) -> list[tuple[Row, int]]:
    """Rows that share adapters side by side: their tokens then are one product."""
    users = Counter(slot for row, _ in parts for slot in set(row.slots))
    shared = [sorted((-users[slot], id(slot)) for slot in row.slots if users[slot] > 1) for row, _ in parts]
    return [parts[index] for index in sorted(range(len(parts)), key=shared.__getitem__)]


def end_tokens(model: LanguageModel) -> frozenset[int]:
    """Every id that ends a reply, by the generation config, else by config and tokenizer."""
    generation = getattr(model.module, "generation_config", None)
    for owner in (generation, model.module.config, model.tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
