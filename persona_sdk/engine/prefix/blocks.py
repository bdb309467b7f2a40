"""The blocks an engine keeps, and how they come into rows: found, turned to their place, or computed there.

    begin      kept blocks ──turned──► the row's slots;  the rest is an `Assembly`'s to compute in pieces
    assemble   the same for one row alone, in passes of its own

A kept block is a prompt of its own in a `PrefixCache`: found by composition and by every token of it and
before it, and only for the scopes it was made for; forgotten by scope, overwritten when it leaves. What is
kept of a block never depends on the blocks that stood around it.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from persona_sdk.engine.forward.architectures import blocks_of
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens
from persona_sdk.engine.forward.fused import FusedForward
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.engine.prefix.assembly import Assembly
from persona_sdk.engine.prefix.bundles import KEYS, VALUES, KVShape, last, part
from persona_sdk.engine.prefix.cache import PrefixCache
from persona_sdk.engine.prefix.frequency import rotary_frequency
from persona_sdk.engine.prefix.keys import lead_length
from persona_sdk.engine.prefix.reuse import BlockPrompt, BlockReuse, ReuseOptions, plan_reuse
from persona_sdk.engine.prefix.rotation import delta_cos_sin, key_deviation, rotate_keys
from persona_sdk.errors import CompositionError, ModelError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, KVPrefix, LowRankPatch
from persona_sdk.tensors import TensorBundle

Run: TypeAlias = Callable[[Forward, RowTokens], Tensor]
"""One pass over new tokens of the row, under its own patches; logits after the last."""

_PROBED = 2  # layers: the keys of the first depend on the token alone
_BUDGET = 2**28
_NO_TOKEN = -1  # stands behind a block when it is looked up: a lookup leaves one token to compute


def block_cache(budget_bytes: int) -> PrefixCache:
    """What blocks are kept in: found by their last token, wherever that is."""
    return PrefixCache(budget_bytes, block=1)


class BlockAssembler:
    """Keeps blocks and puts them into rows. One thread at a time, the one that runs the forward passes.

    Args:
        model: the base model.
        forward: its pass.
        pool: keys and values of the rows.
        kept: of `block_cache`; None makes one.

    Raises:
        ModelError: the model's keys do not turn as rotary positions do.
    """

    def __init__(
        self, model: LanguageModel, forward: Forward, pool: TokenPool, kept: PrefixCache | None = None
    ) -> None:
        self._model, self._forward, self._pool = model, forward, pool
        self._frequency = rotary_frequency(model, forward, pool)
        self.kept = block_cache(_BUDGET) if kept is None else kept
        self.kept.serve(KVShape.of(forward.layers, forward.cache_dtype))
        self._probe: Forward | None = None

    def begin(
        self,
        table: NDArray[np.int64],
        plan: CompositionPlan,
        reuse: BlockReuse,
        *,
        vectors: Float[Tensor, "_ d_model"] | None = None,
        scopes: Collection[str] = (),
        mark: int | None = None,
    ) -> Assembly:
        """Put the kept blocks into a row's slots; the rest is the assembly's. No pass is run here.

        Args:
            table: the row's slots, from position 0. Those before `reuse.computed` hold what they must.
            plan: what the row is composed of.
            reuse: of its prompt.
            vectors: the row's soft prefix.
            scopes: labels of whom the prompt is for: their blocks are found, and new ones are theirs.
            mark: of `kept.mark` before the prompt was made.

        Raises:
            CompositionError: the plan has a KV prefix, whose keys stand where they are.
        """
        if plan.of(KVPrefix):
            raise CompositionError("Blocks behind a KV prefix.", hint="Leave one of the two out.")
        behind = reuse.prompt.head if reuse.made_at else ()
        under = plan if reuse.made_at else replace(plan, parts=plan.of(LowRankPatch))

        def tokens(span: tuple[int, int]) -> tuple[int, ...]:
            start, stop = (place - reuse.lead for place in span)
            return (*behind, *reuse.prompt.tokens[start:stop])

        def found(span: tuple[int, int]) -> bool:
            start, stop = span
            hit = self.kept.lookup(under, (*tokens(span), _NO_TOKEN), scopes)
            if hit is None:
                return False
            with hit:
                if hit.tokens < len(tokens(span)):
                    return False
                own = last(hit.parts, stop - start)
                self._pool.load(table[start:stop], self._turned(own, start - reuse.made_at))
            return True

        def made(span: tuple[int, int], slots: NDArray[np.int64]) -> None:
            start, stop = span
            bundle = self._pool.export(slots)
            if start != reuse.made_at:
                own = part(bundle, len(slots) - (stop - start), len(slots))
                self._pool.load(table[start:stop], self._turned(own, start - reuse.made_at))
            self.kept.insert(under, tokens(span), bundle, scopes, mark=mark)

        missing = [span for span in reuse.blocks if not found(span)]
        return Assembly(reuse, missing, table, vectors, made)

    def assemble(
        self,
        run: Run,
        table: NDArray[np.int64],
        plan: CompositionPlan,
        prompt: BlockPrompt,
        options: ReuseOptions,
        *,
        vectors: Float[Tensor, "_ d_model"] | None = None,
        scopes: Collection[str] = (),
        mark: int | None = None,
    ) -> RowTokens:
        """Put all blocks into the row's slots; what is left to compute, in one pass or in ascending chunks.

        Blocks that are not kept are computed now, by `run`, and kept. Arguments as for `begin`.

        Raises:
            CompositionError: as `begin`.
            ModelError: picking by deviation, which only the fused pass can.
        """
        lead, bare = lead_length(plan), options.model_copy(update={"pick": "first"})
        reuse = plan_reuse(prompt, bare, lead=lead)
        assembly = self.begin(table, plan, reuse, vectors=vectors, scopes=scopes, mark=mark)
        while not assembly.assembled:
            [piece, *_] = assembly.next(assembly.remaining)
            run(self._forward, piece)
            assembly.advance(len(piece.tokens))
        if options.pick != "first" and prompt.blocks:
            deviation = self._deviation(run, table, reuse, vectors)
            reuse = plan_reuse(prompt, options, lead=lead, deviation=deviation)
            assembly = Assembly(reuse, (), table, vectors, lambda *_: None)
        [rest] = assembly.next(assembly.remaining)
        return rest

    def forget(self, scope: str) -> int:
        """Drop and overwrite the blocks made for a scope; how many entries."""
        return self.kept.forget(scope)

    def _turned(self, kept: TensorBundle, delta: int) -> TensorBundle:
        if delta == 0:
            return kept
        keys = kept[KEYS].to(self._pool.keys[0].device)
        deltas = torch.full((keys.shape[1],), delta)
        cos, sin = (table.to(keys.device) for table in delta_cos_sin(self._frequency.cpu(), deltas))
        return {KEYS: rotate_keys(keys, cos, sin), VALUES: kept[VALUES]}

    def _deviation(
        self,
        run: Run,
        table: NDArray[np.int64],
        reuse: BlockReuse,
        vectors: Float[Tensor, "_ d_model"] | None,
    ) -> Float[Tensor, " tokens"]:
        """How far the kept keys of the first layers are off. What is computed for it, stays: it is exact."""
        probe = self._probing()
        ids = (*(0,) * reuse.lead, *reuse.prompt.tokens)
        stop = reuse.blocks[-1][1]
        places = np.concatenate([table[slice(*span)] for span in reuse.blocks])
        kept = self._first_keys(places)
        run(probe, RowTokens(ids[:stop], range(stop), table[:stop], vectors))
        return key_deviation(kept, self._first_keys(places)).cpu()

    def _first_keys(self, slots: NDArray[np.int64]) -> Float[Tensor, "layers tokens kv_heads key_dim"]:
        index = torch.from_numpy(slots).to(self._pool.keys[0].device)
        return torch.stack([keys.index_select(0, index) for keys in self._pool.keys[:_PROBED]])

    def _probing(self) -> Forward:
        """The first layers as a forward pass of their own, with a head of one word."""
        if self._probe is None:
            blocks = blocks_of(self._model.module) if isinstance(self._forward, FusedForward) else None
            if blocks is None:
                raise ModelError(
                    f"{self._model.name} runs on the general pass, which cannot stop after some layers.",
                    hint='Use pick="first".',
                )
            weight = blocks.head.weight[:1].detach()
            head = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype)
            self._probe = FusedForward(replace(blocks, layers=blocks.layers[:_PROBED], head=head))
        return self._probe
