"""Lanes: the patches of all rows, arranged so that a kernel reads plain arrays.

    rows        0         1         2         3
    lane 0      slot 4    slot 7    none      slot 4        first patch of every row in this arena
    lane 1      slot 1    slot 1    none      none          second patch, here a group's: stored once

A row with k patches in one arena takes part in k lanes of it; arenas differ in padded rank and in the modules
they patch. The number of lanes is that of the richest row, whatever the number of adapters.

    symbol            field             shape
    slot of a row     `Lane.slots`      [rows], -1 where the row has none
    g, the gate       `Lane.gates`      [rows, rank], zeros on padded directions
    A, B of a site    `SiteFactors`     offsets in a block, see blocks.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from persona_sdk.engine.low_rank.blocks import BlockLayout, Span
from persona_sdk.errors import EngineError


@runtime_checkable
class Arena(Protocol):
    """Blocks of one layout. `data` ``[slots, size]`` may become another, larger tensor between steps."""

    @property
    def layout(self) -> BlockLayout:
        """Where each factor stands in a block."""
        ...

    @property
    def data(self) -> Tensor:
        """All blocks."""
        ...


@runtime_checkable
class Slot(Protocol):
    """One adapter's place in an arena."""

    @property
    def arena(self) -> Arena:
        """Where it stands."""
        ...

    @property
    def index(self) -> int:
        """Which block of `arena.data`."""
        ...

    @property
    def rank(self) -> int:
        """The adapter's own rank, at most the layout's."""
        ...

    @property
    def digest(self) -> str:
        """What it holds."""
        ...


@dataclass(frozen=True)
class BoundPatch:
    """One patch of a row: a slot and the row's own gate, one number per rank direction of the adapter."""

    slot: Slot
    gate: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.gate) != self.slot.rank:
            raise EngineError(
                f"The gate holds {len(self.gate)} numbers, the adapter has rank {self.slot.rank}.",
                hint="One number per rank direction.",
            )


@dataclass(frozen=True)
class SiteFactors:
    """The patched modules of one site: all A's together from `first_a` on, each module's B.

    `table` says the same to compiled code: a row (a, b, column, d_out) for every module.
    """

    d_in: int
    first_a: int
    stop: int
    spans: tuple[Span, ...]
    table: Int[np.ndarray, "modules 4"]


@dataclass(frozen=True, eq=False)
class Factors:
    """What kernels must know of an arena, worked out once."""

    arena: Arena

    @cached_property
    def rank(self) -> int:
        """The padded rank."""
        return self.arena.layout.rank

    @cached_property
    def sites(self) -> Mapping[int, SiteFactors]:
        """The patched sites, by index."""
        layout, found = self.arena.layout, {}
        for site, spans in zip(layout.sites, layout.spans, strict=True):
            if spans:
                table = [(span.a, span.b, span.module.column, span.module.d_out) for span in spans]
                stop = spans[-1].b + layout.rank * spans[-1].module.d_out
                found[site.index] = SiteFactors(
                    site.d_in, spans[0].a, stop, spans, np.array(table, dtype=np.int64)
                )
        return found

    @cached_property
    def order(self) -> tuple[int, int, tuple[str, ...]]:
        """By which arenas are sorted: in an order that does not depend on who shares the batch."""
        paths = (span.module.path for site in self.sites.values() for span in site.spans)
        return self.rank, self.arena.layout.size, tuple(paths)

    @cached_property
    def modules(self) -> int:
        """Number of patched modules."""
        return sum(len(site.spans) for site in self.sites.values())


@dataclass(frozen=True, eq=False)
class Lane:
    """At most one slot per row, all of one arena, with every row's gate.

    Args:
        factors: the arena.
        data: its blocks at the time.
        slots: of every row; -1 where it has none.
        gates: of every row, zero beyond the adapter's own rank.
        lengths: tokens of every row.
        digests: what the slots in use hold.
    """

    factors: Factors
    data: Float[Tensor, "slots size"]
    slots: Int[np.ndarray, " rows"]
    gates: Float[np.ndarray, "rows rank"]
    lengths: Int[np.ndarray, " rows"]
    digests: Mapping[int, str]

    @cached_property
    def token_slots(self) -> Int[np.ndarray, " tokens"]:
        """The slot of every token."""
        return np.repeat(self.slots, self.lengths)

    @cached_property
    def token_gates(self) -> Float[np.ndarray, "tokens rank"]:
        """The gate of every token."""
        return np.repeat(self.gates, self.lengths, axis=0)

    @cached_property
    def used(self) -> Int[np.ndarray, " used"]:
        """The slots in use, ascending."""
        return np.unique(self.slots[self.slots >= 0])

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, first token, token after the last) of neighbouring tokens with one slot."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        found: list[tuple[int, int, int]] = []
        for slot, start, stop in zip(self.slots.tolist(), starts[:-1], starts[1:], strict=True):
            if slot < 0 or start == stop:
                continue
            if found and found[-1][0] == slot and found[-1][2] == start:
                found[-1] = (slot, found[-1][1], stop)
            else:
                found.append((slot, start, stop))
        return tuple(found)

    @cached_property
    def shape(self) -> "LaneShape":
        """What the work of this lane depends on."""
        counts = np.bincount(self.token_slots[self.token_slots >= 0])
        return LaneShape(
            tokens=int(counts.sum()),
            all_tokens=int(self.lengths.sum()),
            slots=len(self.used),
            span=int(self.used[-1] - self.used[0] + 1),
            longest=int(counts.max()),
            runs=len(self.runs),
            size=self.factors.arena.layout.size,
            sites=len(self.factors.sites),
            modules=self.factors.modules,
            itemsize=self.data.element_size(),
            prompt=bool((self.lengths > 1).any()),
        )


@dataclass(frozen=True)
class LaneShape:
    """What a kernel's time depends on.

    Args:
        tokens: tokens that have a slot, of `all_tokens`.
        slots: distinct slots in use; `span` counts the unused ones between them too.
        longest: the most tokens that share a slot.
        runs: neighbouring tokens with one slot count once.
        size: numbers in a block, which is also the multiply-adds of one token.
        sites, modules: patched ones.
        itemsize: bytes of a number.
        prompt: some row has several tokens.
    """

    tokens: int
    all_tokens: int
    slots: int
    span: int
    longest: int
    runs: int
    size: int
    sites: int
    modules: int
    itemsize: int
    prompt: bool = False

    @property
    def gathers(self) -> bool:
        """Whether torch kernels copy the slots in use: they lie too far apart to read all between them."""
        return self.span > 2 * self.slots

    @property
    def blocks(self) -> int:
        """Blocks a torch kernel reads."""
        return self.slots if self.gathers else self.span


def lanes_of(
    factors: Factors,
    rows: Sequence[Sequence[BoundPatch]],
    lengths: Sequence[int],
) -> list[Lane]:
    """The lanes of one arena. `rows` gives every row's patches in this arena, in order."""
    lanes = []
    counts, rank = np.array(lengths, dtype=np.int64), factors.rank
    for place in range(max(map(len, rows))):
        slots = np.full(len(rows), -1, dtype=np.int64)
        gates = np.zeros((len(rows), rank), dtype=np.float32)
        digests: dict[int, str] = {}
        for row, patches in enumerate(rows):
            # A row without a new token, or whose gate is all zero, has no part in this pass.
            if place < len(patches) and lengths[row] and any(patches[place].gate):
                slot, gate = patches[place].slot, patches[place].gate
                slots[row], digests[slot.index] = slot.index, slot.digest
                gates[row, : len(gate)] = gate
        if digests:
            lanes.append(Lane(factors, factors.arena.data, slots, gates, counts, digests))
    return lanes
