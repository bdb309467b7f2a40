"""The loop all requests share, one step at a time: admit, prefill a chunk, decode one token, sample, emit.

    queue ──admit──► row table ──chunks under a token budget──► prompt done ──one token a step──► done
              │ slots, keys and values reserved here, given back when the row ends

A step never waits for a slow row: prompts are computed in chunks, ended rows are gone before the next
step, and what goes wrong with one row ends that row alone. Single-threaded; `Engine` runs it in its worker.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.entries import entries, given_entries, soft_vectors
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.pool import KEYS, TokenPool
from persona_sdk.engine.generation import Generation
from persona_sdk.engine.low_rank.arena import Slot
from persona_sdk.engine.low_rank.calibration import branch_dtype
from persona_sdk.engine.low_rank.rows import BoundPatch, PatchTable
from persona_sdk.engine.low_rank.tiers import AdapterTiers
from persona_sdk.engine.options import EngineOptions
from persona_sdk.engine.prefix.bundles import KVShape, shape_of
from persona_sdk.engine.prefix.cache import PrefixCache, Spill
from persona_sdk.engine.request import Completion, Request, Steer
from persona_sdk.engine.row import Row, joined
from persona_sdk.engine.sampling import RowSampler, choose
from persona_sdk.engine.schedule import Fit, Prefilling, Queue, ScheduleOptions, Waiting, chunks
from persona_sdk.errors import (
    BudgetError,
    EngineError,
    IncompatibleAdapterError,
    NumericalError,
    PersonaError,
)
from persona_sdk.models import LanguageModel
from persona_sdk.plan import DecodingRule, KVPrefix
from persona_sdk.tensors import Digest, TensorBundle

logger = logging.getLogger("persona_sdk.engine")

SpillFactory = Callable[[KVShape], Spill]


class Loop:
    """Queue, row table and what the rows hold. Every method is called by one thread at a time."""

    def __init__(
        self,
        model: LanguageModel,
        forward: Forward,
        options: EngineOptions,
        prefixes: PrefixCache,
        spill: SpillFactory | None = None,
    ) -> None:
        self.model, self.forward, self.options = model, forward, options
        self.pool = TokenPool(
            forward.layers, device=model.device, dtype=forward.cache_dtype, budget_bytes=options.kv_bytes
        )
        dtype = branch_dtype(model.device, model.dtype, calibrate=options.calibrate)
        self.tiers = AdapterTiers(forward.sites, device=model.device, dtype=dtype, options=options.tiers())
        kernel = None if options.kernel == "auto" else options.kernel
        self.patches = PatchTable(calibrate=options.calibrate, kernel=kernel)
        shape = KVShape.of(forward.layers, forward.cache_dtype)
        self.prefixes = prefixes
        self._kv_shape = shape
        prefixes.serve(shape, spill(shape) if spill and shape else None)
        self.rows: dict[int, Row] = {}
        self._free_rows = list(range(options.max_rows))
        self._queue = Queue(ScheduleOptions(prefill_tokens=options.prefill_tokens, max_wait=options.max_wait))
        self._waiting: dict[int, Generation] = {}
        self._vocab = int(model.module.config.get_text_config().vocab_size)
        self._end_tokens = end_tokens(model)
        self._ticket = 0
        self.steps = 0
        self._trimmed = False
        self.stirred = False  # somebody may have cancelled since the last step

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.rows and not self._waiting

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    def close(self) -> None:
        """Release the tiers and leave the base model as it was found."""
        self.tiers.close()
        self.prefixes.clear()
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
                resident=all(self.tiers.resident(patch.factors) for patch in request.plan.low_rank),
            )
        )
        for patch in request.plan.low_rank:
            self.tiers.prefetch(patch.factors, patch.rank, loader(request, patch.factors))

    def step(self) -> None:
        """One step of everything that runs."""
        self.steps += 1
        with torch.inference_mode():
            self._drop_cancelled()
            self._admit()
            self._steer()
            decoding = [row for row in self.rows.values() if row.tokens]
            plan = chunks(
                [Prefilling(row.number, row.remaining) for row in self.rows.values() if row.remaining],
                self.options.prefill_tokens,
            )
            if plan:
                self._prefill([(self.rows[number], count) for number, count in plan])
            if decoding:
                self._pass(decoding, [row.step() for row in decoding])

    def fail_all(self, error: PersonaError) -> None:
        """End everything that runs or waits with an error."""
        for row in tuple(self.rows.values()):
            self._end(row, "error", error)
        for ticket, generation in tuple(self._waiting.items()):
            self._leave_queue(ticket)
            generation.finish(Completion((), "error", error=error))

    # Joining ------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        if not self._waiting or not self._free_rows:
            return
        active = Counter(row.request.scope[0] for row in self.rows.values() if row.request.scope)
        self._queue.admit(self._try, active, step=self.steps, room=lambda: len(self._free_rows))

    def _try(self, ticket: int) -> Fit:
        """Reserve all a request needs and make it a row, or say that it has to wait."""
        generation = self._waiting[ticket]
        try:
            row = self.reserve(generation)
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

    def reserve(self, generation: Generation) -> Row | None:
        """Make a request a row; None while others hold what it needs.

        Raises:
            PersonaError: it can never run: adapters that are missing or damaged, more than a whole budget.
        """
        request = generation.request
        if not self._free_rows:
            return None
        if self.rows and any(self.tiers.arriving(patch.factors) for patch in request.plan.low_rank):
            return None  # others need not wait for the disk
        slots: list[Slot] = []
        table = None
        mark = self.prefixes.mark() if request.mark is None else request.mark
        try:
            for patch in request.plan.low_rank:
                slot = self.tiers.acquire(patch.factors, patch.rank, loader(request, patch.factors))
                if slot is None:
                    break
                slots.append(slot)
            else:
                table = self.pool.take(entries(request) + request.plan.options.max_new_tokens)
            if table is None:
                self._release(slots)
                slots.clear()
                return self._alone(generation) if not self.rows else None
            row = Row(
                generation,
                self._free_rows[-1],
                table,
                tuple(slots),
                self._sampler(request),
                joined(soft_vectors(request, self.model.d_model)),
                mark,
            )
            self._start(row)
        except BaseException:
            self._release(slots)
            if table is not None:
                self.pool.give(table)
            raise
        self._free_rows.pop()
        self.rows[row.number] = row
        generation.admitted = generation.admitted or time.perf_counter()
        self.patches.bind(
            row.number,
            [BoundPatch(slot, patch.gate) for slot, patch in zip(slots, request.plan.low_rank, strict=True)],
        )
        return row

    def _alone(self, generation: Generation) -> Row | None:
        """Once more, with everything idle out of the way: nobody is left to wait for.

        Raises:
            BudgetError: the request needs more than there is.
        """
        if not self._trimmed:
            self.tiers.trim()
            self._trimmed = True
            try:
                return self.reserve(generation)
            finally:
                self._trimmed = False
        raise BudgetError(
            "The adapters of one request do not fit the device together.",
            hint="Raise EngineOptions.device_bytes, or attach fewer adapters.",
        )

    def _start(self, row: Row) -> None:
        """Put keys and values that exist already into the pool: a KV prefix, or a kept prompt prefix."""
        request = row.request
        for part in request.plan.of(KVPrefix):
            bundle = request.tensors[part.cache]
            if shape_of(bundle, part.length) != self._kv_shape:
                raise IncompatibleAdapterError(
                    f"KV prefix {part.origin!r} holds {shape_of(bundle, part.length)}.",
                    hint=f"Expected {self._kv_shape}: compute it again with this model and precision.",
                )
            self.pool.load(row.table[: part.length], bundle)
            row.past = part.length
            return
        if not request.keep_prefix:
            return
        # What a disk knows was brought into memory by whoever submitted the request.
        hit = self.prefixes.lookup(request.plan, request.prompt, request.scope, spill=False)
        if hit is None:
            return
        with hit:
            for part in hit.parts:
                count = part[KEYS].shape[1]
                self.pool.load(row.table[row.past : row.past + count], part)
                row.past += count
        row.cached = hit.tokens

    def _sampler(self, request: Request) -> RowSampler:
        plan = request.plan
        return RowSampler(
            plan.options,
            plan.of(DecodingRule),
            request.seed,
            request.prompt,
            vocab=self._vocab,
            device=self.model.device,
        )

    # Running ------------------------------------------------------------------------------------------

    def _prefill(self, parts: Sequence[tuple[Row, int]]) -> None:
        parts = grouped(parts)
        self._pass([row for row, _ in parts], [row.chunk(count) for row, count in parts])

    def _pass(self, rows: Sequence[Row], new: Sequence[RowTokens]) -> None:
        """One forward pass. Rows whose prompt is done, or that are past it, get their next token."""
        counts = [len(tokens.tokens) for tokens in new]
        ready = [i for i, (row, count) in enumerate(zip(rows, counts, strict=True)) if row.remaining <= count]
        logits = self.forward_pass([row.number for row in rows], new, wanted=ready)
        for row, count in zip(rows, counts, strict=True):
            row.past += count
            if row.remaining == 0 and not row.tokens:
                self._keep(row)
                if row.request.export:
                    row.exported = self.pool.export(row.table[: row.past])
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
        """Logits of the rows' new tokens under their own patches; see `PackedBatch` and `Forward`."""
        batch = pack(new, self.model.device, wanted)
        branches = self.patches.batch(numbers, self.forward.spread(batch.lengths), self.model.device)
        return self.forward(batch, self.pool, branches, every=every)

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
        for row in self.rows.values():
            # Not in the middle of a prompt: what it leaves would depend on the chunk, and could not be kept.
            if row.tokens and (gates := row.generation.take_gates()):
                row.steers.append(Steer(len(row.tokens), gates))
                for number, gate in gates.items():
                    self.patches.steer(row.number, number, gate)

    def _keep(self, row: Row) -> None:
        """Keep the keys and values of a whole prompt."""
        request, cached = row.request, row.cached
        if not request.keep_prefix or request.plan.of(KVPrefix):
            return
        if self.prefixes.wants(len(request.prompt), cached):
            given, count = given_entries(request), self.prefixes.keepable(len(request.prompt))
            bundle = self.pool.export(row.table[given + cached if cached else 0 : given + count])
            self.prefixes.insert(
                request.plan, request.prompt[:count], bundle, request.scope, start=cached, mark=row.mark
            )

    # Leaving ------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        if not self.stirred:
            return
        self.stirred = False
        for row in tuple(self.rows.values()):
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
        self.free(row)
        row.generation.finish(
            Completion(tuple(row.tokens), reason, row.cached, tuple(row.steers), error, row.exported), last
        )

    def free(self, row: Row) -> None:
        """Give back a row's place, its slots and its keys and values, once."""
        if self.rows.get(row.number) is not row:
            return
        del self.rows[row.number]
        self._free_rows.append(row.number)
        self.patches.unbind(row.number)
        self._release(row.slots)
        self.pool.give(row.table)

    def _release(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self.tiers.release(slot)


def grouped(parts: Sequence[tuple[Row, int]]) -> list[tuple[Row, int]]:
    """Rows that share adapters side by side: their tokens then are one product."""
    users = Counter(slot for row, _ in parts for slot in set(row.slots))
    shared = [sorted((-users[slot], id(slot)) for slot in row.slots if users[slot] > 1) for row, _ in parts]
    return [parts[index] for index in sorted(range(len(parts)), key=shared.__getitem__)]


def loader(request: Request, factors: Digest) -> Callable[[], TensorBundle]:
    """How the tiers get a bundle when none of them has it."""

    def load() -> TensorBundle:
        with torch.inference_mode(False):  # others may train with what the store keeps in memory
            return request.tensors[factors]

    return load


def end_tokens(model: LanguageModel) -> frozenset[int]:
    """Every id that ends a reply, by the generation config, else by config and tokenizer."""
    generation = getattr(model.module, "generation_config", None)
    for owner in (generation, model.module.config, model.tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
