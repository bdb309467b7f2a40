"""Decode steps of the loop as CUDA graphs: which steps, from which buffers, captured how often.

    rows, positions     1, 12      3, 40      5, 100     5, 200
    bucket              1, 64      4, 64      8, 128     8, 256        each with and without branches

A step is one copy for the rows, one per arena if their branches changed, and one replay: rows that join,
leave or are steered are written into buffers. Captured anew is what reads an address that changed: the token
pool or an arena grew, or there is room for more arenas or lanes (low_rank/room.py).

    captures  <=  row buckets * width buckets * 2        as long as nothing grows

Steps that do not fit take the ordinary pass, which computes the same.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.engine.forward.static_decode import StaticDecode
from persona_sdk.engine.low_rank import triton_indexed
from persona_sdk.engine.low_rank.graphs import GraphPool, Record, StaticBatch
from persona_sdk.engine.low_rank.lanes import Lane
from persona_sdk.engine.low_rank.room import LaneRoom, Room, bucket_of
from persona_sdk.engine.low_rank.rows import PatchTable
from persona_sdk.engine.options import EngineOptions

_LEAST_WIDTH = 64  # positions; below, attention is too small to be worth a capture of its own


@dataclass(eq=False)
class _Branches:
    """The branches of one bucket of rows.

    Args:
        number: tells it from all others, also from one whose memory it got.
        written: the lanes in the buffers.
    """

    batch: StaticBatch
    number: int
    written: Sequence[Lane] = field(default=())


class DecodeGraphs:
    """Replays decode steps. One thread at a time; inference mode.

    Args:
        forward: whose decode pass can be captured.
        pool: keys and values of all rows.
        patches: which row uses which adapters.
        device: of the model.
        reads: whether the kernel of the branches reads these blocks; steps with others are not taken.
        record: how to capture, see `GraphPool`.
        least_width: the narrowest bucket of positions.
    """

    def __init__(
        self,
        forward: Forward,
        pool: TokenPool,
        patches: PatchTable,
        device: torch.device,
        *,
        reads: Callable[[Tensor], bool] = triton_indexed.runs_on,
        record: Record | None = None,
        least_width: int = _LEAST_WIDTH,
    ) -> None:
        self._forward, self._pool, self._patches, self._device = forward, pool, patches, device
        self._reads, self._least_width = reads, least_width
        self._graphs = GraphPool(device, record=record)
        self._room = LaneRoom()
        self._held: Room = ()
        self._inputs: dict[tuple[int, int], StaticDecode] = {}
        self._branches: dict[int, _Branches] = {}  # by bucket of rows
        self._made = 0

    def logits(
        self, numbers: Sequence[int], new: Sequence[RowTokens], wanted: Sequence[int] | None = None
    ) -> Float[Tensor, "rows vocab"] | None:
        """Logits of every row's one new token, overwritten by the next call; None if the step must take the
        ordinary pass.

        Args:
            numbers: of the rows in the table of patches.
            new: their tokens.
            wanted: rows whose logits are wanted; a decode step wants all.
        """
        if wanted is not None and tuple(wanted) != tuple(range(len(new))):
            return None
        bucket = bucket_of(len(new)), max(bucket_of(max(len(row.table) for row in new)), self._least_width)
        inputs = self._inputs.get(bucket)
        if inputs is None:
            inputs = StaticDecode(*bucket, self._device)
        if not inputs.fits(new):
            return None
        lanes = self._patches.decoding(numbers)
        if not all(self._reads(lane.data) for lane in lanes):
            return None
        self._inputs[bucket] = inputs
        inputs.write(new)
        branches = self._written(bucket[0], lanes) if lanes else None
        out = self._graphs.run(
            lambda: self._forward(inputs.batch(), self._pool, branches.batch if branches else None),
            (*bucket, branches is not None),
            self._addresses(branches),
        )
        return out[: len(new)]

    def clear(self) -> None:
        """Drop all captures and buffers."""
        self._graphs.clear()
        self._inputs.clear()
        self._branches.clear()

    def __len__(self) -> int:
        return len(self._graphs)

    def _addresses(self, branches: _Branches | None) -> Hashable:
        own = (branches.number, branches.batch.addresses) if branches else None
        return self._pool.addresses, own

    def _written(self, rows: int, lanes: Sequence[Lane]) -> _Branches:
        """The branches of a bucket, holding these lanes."""
        held = self._room.holding(lanes)
        # Buckets not in use now would keep an arena's former blocks alive: adapters may have been forgotten.
        if held is not self._held or any(known.batch.moved for known in self._branches.values()):
            self._branches.clear()
            self._held = held
        known = self._branches.get(rows)
        if known is None:
            self._made += 1
            known = _Branches(StaticBatch(held, rows, self._device), self._made)
            self._branches[rows] = known
        if known.written is not lanes:
            known.batch.write(lanes)
            known.written = lanes
        return known


def decode_graphs(
    forward: Forward, pool: TokenPool, patches: PatchTable, device: torch.device, options: EngineOptions
) -> DecodeGraphs | None:
    """The graphs of a loop; None where there can be none."""
    if not (options.graphs and device.type == "cuda" and forward.capturable):
        return None
    # Branches by other kernels are arranged anew for every pass, at new addresses.
    reads = triton_indexed.runs_on if options.kernel == "triton" else _none
    return DecodeGraphs(forward, pool, patches, device, reads=reads)


def _none(_: Tensor) -> bool:
    return False
