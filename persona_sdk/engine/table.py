"""The row table: who runs, and all that running rows hold. What is reserved here is given back here, once.

    reserve    a place, adapter slots, token slots for prompt and reply; what is kept of the prompt goes there
    free       all of it back, when the row ends, however it ends

A row gets everything it can ever need before it starts, so a running row never waits for memory.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from persona_sdk.engine.entries import entries, given_entries, soft_vectors
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.pool import KEYS, TokenPool
from persona_sdk.engine.generation import Generation
from persona_sdk.engine.low_rank.arena import Slot
from persona_sdk.engine.low_rank.calibration import branch_dtype
from persona_sdk.engine.low_rank.rows import BoundPatch, PatchTable
from persona_sdk.engine.low_rank.tiers import AdapterTiers
from persona_sdk.engine.options import EngineOptions
from persona_sdk.engine.prefix.blocks import BlockAssembler
from persona_sdk.engine.prefix.bundles import KVShape, shape_of
from persona_sdk.engine.prefix.cache import PrefixCache
from persona_sdk.engine.prefix.reuse import BlockPrompt, plan_reuse
from persona_sdk.engine.request import Request
from persona_sdk.engine.row import Row, joined
from persona_sdk.engine.sampling import RowSampler
from persona_sdk.errors import BudgetError, DeviceMemoryError, IncompatibleAdapterError, ModelError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import DecodingRule, KVPrefix
from persona_sdk.tensors import Digest, TensorBundle

logger = logging.getLogger("persona_sdk.engine")


class RowTable:
    """Rows, their adapters' slots, their keys and values. Every method is called by one thread at a time.

    Attributes:
        rows: running rows by number.
        pool: keys and values of all rows.
        tiers: where adapters are.
        patches: which row uses which adapters with which gates.
        prefixes: kept prompt beginnings.
        blocks: kept memory blocks; None if they are not reused, or cannot be on this model.
        kv_shape: what the pool takes; None if layers differ.
        branch_precision: of adapters, by name.
    """

    def __init__(
        self,
        model: LanguageModel,
        forward: Forward,
        options: EngineOptions,
        prefixes: PrefixCache,
        blocks: PrefixCache | None = None,
    ) -> None:
        self.model, self.forward = model, forward
        self.pool = TokenPool(
            forward.layers, device=model.device, dtype=forward.cache_dtype, budget_bytes=options.kv_bytes
        )
        dtype = branch_dtype(model.device, model.dtype, options.branch_precision, calibrate=options.calibrate)
        self.branch_precision = str(dtype).removeprefix("torch.")
        self.tiers = AdapterTiers(forward.sites, device=model.device, dtype=dtype, options=options.tiers())
        kernel = None if options.kernel == "auto" else options.kernel
        self.patches = PatchTable(calibrate=options.calibrate, kernel=kernel)
        self.prefixes = prefixes
        self._reuse = options.block_reuse
        self.blocks = None if blocks is None else self._assembler(blocks)
        self.kv_shape = KVShape.of(forward.layers, forward.cache_dtype)
        self.rows: dict[int, Row] = {}
        self._free_rows = list(range(options.max_rows))
        self._vocab = int(model.module.config.get_text_config().vocab_size)
        self._trimmed = False

    @property
    def places(self) -> int:
        """Rows that may still join."""
        return len(self._free_rows)

    def close(self) -> None:
        """Release the tiers and all that is kept of prompts."""
        self.tiers.close()
        self.prefixes.clear()
        if self.blocks is not None:
            self.blocks.kept.clear()

    def arriving(self, request: Request) -> bool:
        """Whether an adapter of a request is on its way from the disk."""
        return any(self.tiers.arriving(patch.factors) for patch in request.plan.low_rank)

    def resident(self, request: Request) -> bool:
        """Whether all adapters of a request stand in device slots."""
        return all(self.tiers.resident(patch.factors) for patch in request.plan.low_rank)

    def prefetch(self, request: Request) -> None:
        """Let the adapters of a request start to load."""
        for patch in request.plan.low_rank:
            self.tiers.prefetch(patch.factors, patch.rank, loader(request, patch.factors))

    def reserve(self, generation: Generation) -> Row | None:
        """Make a request a row; None while others hold what it needs.

        Raises:
            PersonaError: it can never run: adapters that are missing or damaged, more than a whole budget.
        """
        request = generation.request
        if not self._free_rows:
            return None
        if self.rows and self.arriving(request):
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
        """Put keys and values that exist already into the pool: a KV prefix, or what is kept of a prompt."""
        request = row.request
        for part in request.plan.of(KVPrefix):
            bundle = request.tensors[part.cache]
            if shape_of(bundle, part.length) != self.kv_shape:
                raise IncompatibleAdapterError(
                    f"KV prefix {part.origin!r} holds {shape_of(bundle, part.length)}.",
                    hint=f"Expected {self.kv_shape}: compute it again with this model and precision.",
                )
            self.pool.load(row.table[: part.length], bundle)
            row.past = part.length
            return
        if not request.keep_prefix:
            return
        # What a disk knows was brought into memory by whoever submitted the request.
        hit = self.prefixes.lookup(request.plan, request.prompt, request.scope, spill=False)
        if hit is not None:
            with hit:
                for part in hit.parts:
                    count = part[KEYS].shape[1]
                    self.pool.load(row.table[row.past : row.past + count], part)
                    row.past += count
            row.cached = hit.tokens
        self._start_blocks(row)

    def _start_blocks(self, row: Row) -> None:
        """Put kept blocks behind what is exact already, if the request has any that may be reused."""
        request = row.request
        if self.blocks is None or self._reuse is None or not request.blocks or request.export:
            return
        prompt = BlockPrompt(request.prompt, request.blocks)
        reuse = plan_reuse(prompt, self._reuse, lead=given_entries(request), done=row.past)
        if reuse.blocks:
            row.assembly = self.blocks.begin(
                row.table, request.plan, reuse, vectors=row.vectors, scopes=request.scope, mark=row.mark
            )

    def _assembler(self, kept: PrefixCache) -> BlockAssembler | None:
        try:
            return BlockAssembler(self.model, self.forward, self.pool, kept)
        except (ModelError, DeviceMemoryError) as error:
            logger.warning("memory blocks are not reused, every prompt is computed in full: %s", error)
            return None

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


def loader(request: Request, factors: Digest) -> Callable[[], TensorBundle]:
    """How the tiers get a bundle when none of them has it."""

    def load() -> TensorBundle:
        with torch.inference_mode(False):  # others may train with what the store keeps in memory
            return request.tensors[factors]

    return load
