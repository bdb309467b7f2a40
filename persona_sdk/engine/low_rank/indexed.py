"""The compiled kernel for CPUs: reads every factor where it stands, once per row that uses it.

    y[t] += B_k^T (g_k (A_k . x[t]))          for every job, token t of it, and rank direction k with g_k != 0

    symbol   field             shape
    A, B     `data`            [slots, size], offsets in `table` (a, b, column, d_out per module)
    x, y     `x`, `y`          [tokens, d_in], [tokens, width]
    g        `gates`           [jobs, rank]
    job      `jobs`            (slot, first token, token after the last) per row and patch

A job is one row's use of one slot. All lanes of an arena go in one call per site. Jobs are sorted by lane,
then by slot, so that a slot shared by many rows is read from memory once, while every row adds its patches
in its own order: its result depends on no other row, bit for bit.

A block is read once from front to back, all A's of a site and then all its B's: one stream for the hardware's
prefetcher. That took up to a sixth less time than A and B of each direction in turn; several directions at a
time (more streams), prefetch instructions and blocks of rows were slower or no faster.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.compiled import compiled
from persona_sdk.engine.low_rank.lanes import Lane


@no_type_check  # see compiled.py
def _kernel(data: Any, x: Any, y: Any, table: Any, rank: Any, jobs: Any, gates: Any) -> None:
    d_in, modules = x.shape[1], table.shape[0]
    hidden = np.empty((modules, rank), np.float32)
    for job in range(jobs.shape[0]):
        block = data[jobs[job, 0]]
        for token in range(jobs[job, 1], jobs[job, 2]):
            row, out = x[token], y[token]
            for module in range(modules):
                a = table[module, 0]
                for k in range(rank):
                    gate, dot = gates[job, k], np.float32(0)
                    if gate != 0:
                        A = block[a + k * d_in : a + (k + 1) * d_in]
                        for c in range(d_in):
                            dot += A[c] * row[c]
                        dot *= gate
                    hidden[module, k] = dot
            for module in range(modules):
                b, column, d_out = table[module, 1], table[module, 2], table[module, 3]
                into = out[column : column + d_out]
                for k in range(rank):
                    if gates[job, k] != 0:
                        weight = hidden[module, k]
                        B = block[b + k * d_out : b + (k + 1) * d_out]
                        for c in range(d_out):
                            into[c] += weight * B[c]


@cache
def kernel() -> Callable[..., None] | None:
    """The compiled kernel; None where numba cannot be imported."""
    # One signature, so that nothing is compiled in the middle of a step.
    numbers, places = "float32[:, ::1]", "int64[:, ::1]"
    return compiled(_kernel, f"void({numbers}, {numbers}, {numbers}, {places}, int64, {places}, {numbers})")


def runs_on(data: Tensor) -> bool:
    """Whether the compiled kernel can read these blocks."""
    return (
        data.device.type == "cpu"
        and data.dtype == torch.float32
        and data.is_contiguous()
        and kernel() is not None
    )


class Indexed:
    """All lanes of one arena, ready to be added. See the module's docstring."""

    contiguous = True

    def __init__(self, lanes: Sequence[Lane]) -> None:
        found = kernel()
        assert found is not None
        self._kernel, self._data = found, lanes[0].data.numpy()
        self._factors, self._rank = lanes[0].factors.sites, lanes[0].factors.rank
        jobs, gates = [], []
        for lane in lanes:
            rows = np.flatnonzero(lane.slots >= 0)
            rows = rows[np.argsort(lane.slots[rows], kind="stable")]
            stops = np.cumsum(lane.lengths)[rows]
            jobs.append(np.stack([lane.slots[rows], stops - lane.lengths[rows], stops], axis=1))
            gates.append(lane.gates[rows])
        self._jobs = np.ascontiguousarray(np.concatenate(jobs))
        self._gates = np.ascontiguousarray(np.concatenate(gates))

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add the branches of a site that this arena patches."""
        self._kernel(
            self._data, x.numpy(), y.numpy(), self._factors[site].table, self._rank, self._jobs, self._gates
        )
