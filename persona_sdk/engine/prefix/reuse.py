"""Memory blocks in any order: each one's keys and values computed once by itself, turned to their place.

    prompt      | lead | head | block a | block b | ... | question |
    kept               each block computed alone, or behind `behind` tokens, under the row's own patches
    place       k' = R(start - made_at) k,  v' = v              (`rotation`)
    compute     lead, head, the picked tokens of the blocks and the question, in one pass over just those:
                in every layer their new keys and values are in place before anybody looks

What a block was computed without, the blocks now before it, stays missing in the tokens that are not
picked. So this is an approximation: exact only where every block token is picked. Off unless asked for.

| symbol  | field                 | shape                                                              |
|---------|-----------------------|--------------------------------------------------------------------|
| start   | `BlockReuse.starts`   | [blocks], positions in the row                                     |
| d       | `BlockReuse.deltas`   | [blocks], start minus the position the block was made at           |
|         | `BlockReuse.computed` | [tokens], ascending positions                                      |

A kept block is a prompt of its own in a `PrefixCache`: found by composition and by every token of it and
before it, forgotten by scope, overwritten when it leaves.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from persona_sdk.config import FrozenConfig
from persona_sdk.engine.forward.architectures import blocks_of
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.fused import FusedForward
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.engine.prefix.bundles import KEYS, VALUES, KVShape, part
from persona_sdk.engine.prefix.cache import PrefixCache
from persona_sdk.engine.prefix.keys import lead_length
from persona_sdk.engine.prefix.rotation import delta_cos_sin, key_deviation, pick_recomputed, rotate_keys
from persona_sdk.errors import CompositionError, DeviceMemoryError, InvalidInputError, ModelError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, KVPrefix, LowRankPatch
from persona_sdk.tensors import TensorBundle

Run: TypeAlias = Callable[[Forward, RowTokens], Tensor]
"""One pass over new tokens of the row, under its own patches; logits after the last."""

_PROBED = 2  # layers: the keys of the first depend on the token alone
_CHECKED = 8  # tokens
_NO_TOKEN = -1  # stands behind a block when it is looked up: a lookup leaves one token to compute


class ReuseOptions(FrozenConfig):
    """How blocks are reused.

    ``first`` picks the first tokens of every block, ``deviation`` those whose keys in the second layer
    differ most from what a full pass gives there, ``both`` half of each.
    """

    fraction: float = Field(0.15, ge=0, le=1, description="of every block's tokens, computed again")
    pick: Literal["first", "deviation", "both"] = "first"
    behind_head: bool = Field(True, description="blocks are made behind the head, not at the beginning")


@dataclass(frozen=True)
class BlockPrompt:
    """A prompt in pieces. Their tokens, one after another, are what a full prefill would compute."""

    head: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.question or not all(self.blocks):
            raise InvalidInputError(
                f"Blocks of {[len(block) for block in self.blocks]} tokens and a question of "
                f"{len(self.question)}.",
                hint="Each needs at least one token.",
            )

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole prompt."""
        return (*self.head, *(token for block in self.blocks for token in block), *self.question)


@dataclass(frozen=True)
class BlockReuse:
    """What goes where and what is computed: pure data. Make it with `plan_reuse`."""

    prompt: BlockPrompt
    lead: int
    made_at: int
    starts: tuple[int, ...]
    computed: tuple[int, ...]

    @property
    def deltas(self) -> tuple[int, ...]:
        """How far each block's keys are turned."""
        return tuple(start - self.made_at for start in self.starts)

    def new(self, table: NDArray[np.int64], vectors: Float[Tensor, "_ d_model"] | None = None) -> RowTokens:
        """What is computed once the blocks are in the pool. `vectors` are the row's soft prefix."""
        ids = (*(0,) * self.lead, *self.prompt.tokens)
        return RowTokens([ids[place] for place in self.computed], self.computed, table[: len(ids)], vectors)


def plan_reuse(
    prompt: BlockPrompt,
    options: ReuseOptions,
    *,
    lead: int = 0,
    deviation: Float[Tensor, " tokens"] | None = None,
) -> BlockReuse:
    """Places and picked tokens.

    Args:
        prompt: the pieces.
        options: which tokens are computed again.
        lead: positions of a soft prefix before the head.
        deviation: of every block token; what `options.pick` other than ``first`` needs.

    Raises:
        InvalidInputError: deviations are missing, or not one a token.
    """
    if (options.pick == "first") != (deviation is None):
        raise InvalidInputError(f"Picking by {options.pick!r}.", hint="Deviations go with the other picks.")
    lengths, made_at = [len(block) for block in prompt.blocks], len(prompt.head) * options.behind_head
    first = lead + len(prompt.head)
    starts = tuple(accumulate(lengths, initial=first))
    # What comes first is never picked: the head, computed anyway, or without one the first block.
    before = [first] if first else []
    if deviation is not None:
        deviation = torch.cat([deviation.new_zeros(sum(before)), deviation])
    share = {"first": 1.0, "both": 0.5, "deviation": 0.0}[options.pick]
    picked = pick_recomputed([*before, *lengths], options.fraction, deviation=deviation, leading=share)
    again = (picked.nonzero()[:, 0]).tolist()
    stop = starts[-1] + len(prompt.question)
    computed = (*range(first), *again, *range(starts[-1], stop))
    return BlockReuse(prompt, lead, made_at, starts[:-1], computed)


class BlockAssembler:
    """Keeps blocks and puts them into rows. One thread at a time, the one that runs the forward passes.

    Raises:
        ModelError: the model's keys do not turn as rotary positions do.
    """

    def __init__(
        self, model: LanguageModel, forward: Forward, pool: TokenPool, *, budget_bytes: int = 2**28
    ) -> None:
        self._model, self._forward, self._pool = model, forward, pool
        self._frequency = rotary_frequency(model, forward, pool)
        self.kept = PrefixCache(budget_bytes, block=1, shape=KVShape.of(forward.layers, forward.cache_dtype))
        self._probe: Forward | None = None

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

        Blocks that are not kept are computed now and kept.

        Args:
            run: a pass over the row under its own patches.
            table: the row's slots, from position 0.
            plan: what the row is composed of.
            prompt: its pieces.
            options: what is computed again.
            vectors: the row's soft prefix.
            scopes: labels of whom new blocks are for, see `forget`.
            mark: of `kept.mark` before the prompt was made.

        Raises:
            CompositionError: the plan has a KV prefix, whose keys stand where they are.
            ModelError: picking by deviation, which only the fused pass can.
            DeviceMemoryError: a missing block has no room in the pool now.
        """
        if plan.of(KVPrefix):
            raise CompositionError("Blocks behind a KV prefix.", hint="Leave one of the two out.")
        lead = lead_length(plan)
        bare = options.model_copy(update={"pick": "first"})
        reuse = plan_reuse(prompt, bare, lead=lead)
        before = prompt.head[: reuse.made_at]
        for block, start, delta in zip(prompt.blocks, reuse.starts, reuse.deltas, strict=True):
            with self._block(run, plan, before, block, scopes, mark) as kept:
                self._pool.load(table[start : start + len(block)], self._turned(kept, delta))
        if options.pick != "first" and prompt.blocks:
            deviation = self._deviation(run, table, reuse, vectors)
            reuse = plan_reuse(prompt, options, lead=lead, deviation=deviation)
        return reuse.new(table, vectors)

    def forget(self, scope: str) -> int:
        """Drop and overwrite the blocks made for a scope; how many entries."""
        return self.kept.forget(scope)

    @contextmanager
    def _block(
        self,
        run: Run,
        plan: CompositionPlan,
        before: tuple[int, ...],
        block: tuple[int, ...],
        scopes: Collection[str],
        mark: int | None,
    ) -> Iterator[TensorBundle]:
        """Keys and values of a block at the positions it was made at, kept from now on."""
        alone = replace(plan, parts=plan.of(LowRankPatch))
        tokens = (*before, *block)
        hit = self.kept.lookup(alone, (*tokens, _NO_TOKEN), scopes)
        if hit is not None:
            with hit:
                if hit.tokens == len(tokens):
                    yield part(hit.bundle, len(before), len(tokens))
                    return
        slots = self._pool.take(len(tokens))
        if slots is None:
            raise DeviceMemoryError(
                f"There is no room now to compute a block of {len(tokens)} tokens.",
                hint="Ask again when other rows are done.",
            )
        try:
            run(self._forward, RowTokens(tokens, range(len(tokens)), slots))
            made = self._pool.export(slots)
        finally:
            self._pool.give(slots)
        own = {name: made[name][:, len(before) :].clone() for name in (KEYS, VALUES)}
        self.kept.insert(alone, tokens, made, scopes, mark=mark)
        yield own

    def _turned(self, kept: TensorBundle, delta: int) -> TensorBundle:
        if delta == 0:
            return kept
        deltas = torch.full((kept[KEYS].shape[1],), delta)
        cos, sin = (table.to(kept[KEYS].device) for table in delta_cos_sin(self._frequency.cpu(), deltas))
        return {KEYS: rotate_keys(kept[KEYS], cos, sin), VALUES: kept[VALUES]}

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
        stop = len(ids) - len(reuse.prompt.question)
        places = table[reuse.starts[0] : stop]
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


def rotary_frequency(model: LanguageModel, forward: Forward, pool: TokenPool) -> Float[Tensor, " half"]:
    """The model's rotary frequencies, checked: equal tokens in a row differ by nothing but their turn.

    Raises:
        ModelError: there are none, several, or ones that change with the length, or some layer's keys do
            not turn so.
    """

    def refuse(why: str) -> ModelError:
        return ModelError(
            f"{model.name}: {why}; memory blocks cannot be moved.", hint="Use kept prefixes, which stay."
        )

    rotary = [module for module in model.module.modules() if isinstance(_frequency(module), Tensor)]
    if not rotary:
        raise refuse("no rotary positions")
    frequency = _frequency(rotary[0]).detach()
    if any(not torch.equal(_frequency(other), frequency) for other in rotary[1:]):
        raise refuse("layers with different rotary positions")
    if getattr(rotary[0], "rope_type", "default") in ("dynamic", "longrope"):
        raise refuse("rotary positions that change with the length")
    if len(set(forward.layers)) != 1 or 2 * len(frequency) > forward.layers[0].key_dim:
        raise refuse("layers of different shapes")
    slots = pool.take(_CHECKED)
    if slots is None:
        raise DeviceMemoryError("There is no room for a check now.", hint="Ask again when rows are done.")
    try:
        with torch.inference_mode():
            forward(pack([RowTokens([1] * _CHECKED, range(_CHECKED), slots)], model.device), pool, None)
            keys = pool.export(slots)[KEYS].float().cpu()
    finally:
        pool.give(slots)
    cos, sin = delta_cos_sin(frequency.cpu(), torch.arange(_CHECKED))
    off = (rotate_keys(keys[:, :1].expand_as(keys), cos, sin) - keys).abs().max() / keys.abs().max()
    if not off <= (1e-3 if forward.cache_dtype == model.dtype == torch.float32 else 0.05):
        raise refuse(f"keys that turn otherwise (off by {float(off):.2g})")
    return torch.as_tensor(frequency)


def _frequency(module: nn.Module) -> Any:
    return getattr(module, "inv_freq", None)
