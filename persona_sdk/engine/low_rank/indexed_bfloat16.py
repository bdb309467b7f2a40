"""The compiled kernel for bfloat16 factors on CPUs: half the bytes of indexed.py's, a job per row and patch.

    y[t] += B_k^T (g_k (A_k . x[t]))          for every job, token t of it, and rank direction k with g_k != 0

    symbol   stored as     computed in
    A, B     bfloat16      float32
    x, y     bfloat16      float32; y is rounded once per job
    g        float32       float32

A decode step is bound by reading factors. One site of one block is too short a stream for the hardware's
prefetcher to get up to speed, so each job asks for the next one's while it computes: 21 against 26 ms for 32
users and 4 groups of SmolLM2's shapes at rank 8, where float32 factors take 32. A row's result depends on no
other row, bit for bit.
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
from persona_sdk.engine.stored import numbers, prefetch, rounded, widened

_CACHE_LINE = 32  # numbers


@no_type_check  # see compiled.py
def _kernel(data: Any, x: Any, y: Any, table: Any, rank: Any, jobs: Any, gates: Any) -> None:
    d_in, modules, last = x.shape[1], table.shape[0], jobs.shape[0] - 1
    hidden = np.empty((modules, rank), np.float32)
    row, total = np.empty(d_in, np.float32), np.empty(y.shape[1], np.float32)
    for job in range(jobs.shape[0]):
        block, ahead = data[jobs[job, 0]], data[jobs[min(job + 1, last), 0]]
        for token in range(jobs[job, 1], jobs[job, 2]):
            out, first = y[token], token == jobs[job, 1]
            for c in range(d_in):
                row[c] = widened(x[token, c])
            for module in range(modules):
                a = table[module, 0]
                for k in range(rank):
                    gate, dot, place = gates[job, k], np.float32(0), a + k * d_in
                    if first:
                        for c in range(place, place + d_in, _CACHE_LINE):
                            prefetch(ahead, c)
                    if gate != 0:
                        A = block[place : place + d_in]
                        for c in range(d_in):
                            dot += widened(A[c]) * row[c]
                        dot *= gate
                    hidden[module, k] = dot
            for module in range(modules):
                b, column, d_out = table[module, 1], table[module, 2], table[module, 3]
                into = out[column : column + d_out]
                for c in range(d_out):
                    total[c] = widened(into[c])
                for k in range(rank):
                    place = b + k * d_out
                    if first:
                        for c in range(place, place + d_out, _CACHE_LINE):
                            prefetch(ahead, c)
                    if gates[job, k] != 0:
                        weight = hidden[module, k]
                        B = block[place : place + d_out]
                        for c in range(d_out):
                            total[c] += weight * widened(B[c])
                for c in range(d_out):
                    into[c] = rounded(total[c], into)


@cache
def kernel() -> Callable[..., None] | None:
    """The compiled kernel; None where numba cannot be imported."""
    # One signature, so that nothing is compiled in the middle of a step.
    bits, places = "uint16[:, ::1]", "int64[:, ::1]"
    return compiled(_kernel, f"void({bits}, {bits}, {bits}, {places}, int64, {places}, float32[:, ::1])")


def runs_on(data: Tensor) -> bool:
    """Whether the compiled kernel can read these blocks."""
    return (
        data.device.type == "cpu"
        and data.dtype == torch.bfloat16
        and data.is_contiguous()
        and kernel() is not None
    )


class IndexedBfloat16:
    """All lanes of one arena, ready to be added. See the module's docstring."""

    contiguous = True

    def __init__(self, lanes: Sequence[Lane]) -> None:
        found = kernel()
        assert found is not None
        self._kernel, self._data = found, numbers(lanes[0].data)
        self._factors, self._rank = lanes[0].factors.sites, lanes[0].factors.rank
        jobs, gates = [], []
        for lane in lanes:
            # By slot, so that one shared by many rows is read from memory once; see indexed.py.
            rows = np.flatnonzero(lane.slots >= 0)
            rows = rows[np.argsort(lane.slots[rows], kind="stable")]
            stops = np.cumsum(lane.lengths)[rows]
            jobs.append(np.stack([lane.slots[rows], stops - lane.lengths[rows], stops], axis=1))
            gates.append(lane.gates[rows])
        self._jobs = np.ascontiguousarray(np.concatenate(jobs))
        self._gates = np.ascontiguousarray(np.concatenate(gates))

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add the branches of a site that this arena patches."""
        table = self._factors[site].table
        self._kernel(self._data, numbers(x), numbers(y), table, self._rank, self._jobs, self._gates)
