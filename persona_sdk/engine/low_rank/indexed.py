"""The compiled kernel for CPUs: reads every factor where it stands, and once for all tokens that share it.

    y[t] += B_k^T (g_k (A_k . x[t]))          for every use of a slot, token t of it, and rank direction k

    symbol   field             shape
    A, B     `data`            [slots, size], offsets in `table` (a, b, column, d_out per module); float32, or
                               bfloat16, widened as it is read
    x, y     `x`, `y`          [tokens, d_in], [tokens, width]
    g        `gates`           [uses, rank]
    use      `uses`            (first token, token after the last) of one row under one patch
    job      `jobs`            (slot, first use, use after the last, directions) of uses with one slot

All lanes of an arena go in one call per site. Jobs are sorted by lane, then by slot, so that a slot many
rows share is read from memory once, while every row adds its patches in its own order. Work is cut to fit
registers and the first cache: 4 directions of 1 or 2 tokens at a time, and the cut depends on a row's own
tokens alone. So its result depends on no other row, bit for bit.

`directions` is how many lead with a gate, if that is a multiple of 4 and none follows. Other gates make it 0:
those uses go one direction at a time and read nothing of one that is off, as it may hold NaN for somebody
else's sake.

A decode step is bound by reading factors, and one site of one block is too short a stream for the hardware's
prefetcher to get up to speed, so each job asks for the next one's. On one core of an AVX-512 server, 32 users
and 4 groups of SmolLM2's shapes at rank 8: 31 ms with float32 factors, 21 with bfloat16, and 28 if it did not
ask.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_sdk.engine.compiled import compiled
from persona_sdk.engine.low_rank.lanes import Lane
from persona_sdk.engine.stored import STORED, numbers, prefetch, widened

_CACHE_LINE = 32  # numbers of bfloat16


@no_type_check  # see compiled.py
def _kernel(data: Any, x: Any, y: Any, table: Any, rank: Any, jobs: Any, uses: Any, gates: Any) -> None:
    d_in, modules, zero, last_job = x.shape[1], table.shape[0], np.float32(0), jobs.shape[0] - 1
    longest = 0
    for job in range(jobs.shape[0]):
        tokens = 0
        for use in range(jobs[job, 1], jobs[job, 2]):
            tokens += uses[use, 1] - uses[use, 0]
        longest = max(longest, tokens)
    hidden = np.empty((longest, modules, rank), np.float32)  # by token of the job
    for job in range(jobs.shape[0]):
        block, first, last, directions = data[jobs[job, 0]], jobs[job, 1], jobs[job, 2], jobs[job, 3]
        ahead = data[jobs[min(job + 1, last_job), 0]]
        whole = directions > 0
        step, used = (4, directions) if whole else (1, rank)
        for module in range(modules):
            a = table[module, 0]
            for k in range(0, used, step):
                A0, place = block[a + k * d_in : a + (k + 1) * d_in], 0
                if not whole:
                    for use in range(first, last):
                        gate = gates[use, k]
                        for token in range(uses[use, 0], uses[use, 1]):
                            x0, s00 = x[token], zero
                            if gate != 0:
                                for c in range(d_in):
                                    s00 += widened(A0[c]) * x0[c]
                                s00 *= gate
                            hidden[place, module, k] = s00
                            place += 1
                    continue
                for c in range(a + k * d_in, a + (k + 4) * d_in, _CACHE_LINE):
                    prefetch(ahead, c)
                A1 = block[a + (k + 1) * d_in : a + (k + 2) * d_in]
                A2 = block[a + (k + 2) * d_in : a + (k + 3) * d_in]
                A3 = block[a + (k + 3) * d_in : a + (k + 4) * d_in]
                for use in range(first, last):
                    token, stop, g = uses[use, 0], uses[use, 1], gates[use, k : k + 4]
                    while token + 1 < stop:
                        x0, x1, h0 = x[token], x[token + 1], hidden[place, module, k : k + 4]
                        h1 = hidden[place + 1, module, k : k + 4]
                        s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
                        for c in range(d_in):
                            s00 += widened(A0[c]) * x0[c]
                            s01 += widened(A1[c]) * x0[c]
                            s02 += widened(A2[c]) * x0[c]
                            s03 += widened(A3[c]) * x0[c]
                            s10 += widened(A0[c]) * x1[c]
                            s11 += widened(A1[c]) * x1[c]
                            s12 += widened(A2[c]) * x1[c]
                            s13 += widened(A3[c]) * x1[c]
                        h0[0], h0[1], h0[2], h0[3] = s00 * g[0], s01 * g[1], s02 * g[2], s03 * g[3]
                        h1[0], h1[1], h1[2], h1[3] = s10 * g[0], s11 * g[1], s12 * g[2], s13 * g[3]
                        token, place = token + 2, place + 2
                    if token < stop:
                        x0, h0 = x[token], hidden[place, module, k : k + 4]
                        s00 = s01 = s02 = s03 = zero
                        for c in range(d_in):
                            s00 += widened(A0[c]) * x0[c]
                            s01 += widened(A1[c]) * x0[c]
                            s02 += widened(A2[c]) * x0[c]
                            s03 += widened(A3[c]) * x0[c]
                        h0[0], h0[1], h0[2], h0[3] = s00 * g[0], s01 * g[1], s02 * g[2], s03 * g[3]
                        place += 1
        for module in range(modules):
            b, column, d_out = table[module, 1], table[module, 2], table[module, 3]
            for k in range(0, used, step):
                B0, place = block[b + k * d_out : b + (k + 1) * d_out], 0
                if not whole:
                    for use in range(first, last):
                        for token in range(uses[use, 0], uses[use, 1]):
                            if gates[use, k] != 0:
                                y0, w00 = y[token, column : column + d_out], hidden[place, module, k]
                                for c in range(d_out):
                                    y0[c] += w00 * widened(B0[c])
                            place += 1
                    continue
                for c in range(b + k * d_out, b + (k + 4) * d_out, _CACHE_LINE):
                    prefetch(ahead, c)
                B1 = block[b + (k + 1) * d_out : b + (k + 2) * d_out]
                B2 = block[b + (k + 2) * d_out : b + (k + 3) * d_out]
                B3 = block[b + (k + 3) * d_out : b + (k + 4) * d_out]
                for use in range(first, last):
                    token, stop = uses[use, 0], uses[use, 1]
                    while token + 1 < stop:
                        y0, y1 = y[token, column : column + d_out], y[token + 1, column : column + d_out]
                        h0, h1 = hidden[place, module, k : k + 4], hidden[place + 1, module, k : k + 4]
                        w00, w01, w02, w03 = h0[0], h0[1], h0[2], h0[3]
                        w10, w11, w12, w13 = h1[0], h1[1], h1[2], h1[3]
                        for c in range(d_out):
                            b0, b1, b2, b3 = widened(B0[c]), widened(B1[c]), widened(B2[c]), widened(B3[c])
                            y0[c] += w00 * b0 + w01 * b1 + w02 * b2 + w03 * b3
                            y1[c] += w10 * b0 + w11 * b1 + w12 * b2 + w13 * b3
                        token, place = token + 2, place + 2
                    if token < stop:
                        y0, h0 = y[token, column : column + d_out], hidden[place, module, k : k + 4]
                        w00, w01, w02, w03 = h0[0], h0[1], h0[2], h0[3]
                        for c in range(d_out):
                            y0[c] += (
                                w00 * widened(B0[c])
                                + w01 * widened(B1[c])
                                + w02 * widened(B2[c])
                                + w03 * widened(B3[c])
                            )
                        place += 1


@cache
def kernel(factors: torch.dtype = torch.float32) -> Callable[..., None] | None:
    """The kernel compiled for factors of a dtype in `STORED`; None where numba cannot be imported."""
    # One signature, so that nothing is compiled in the middle of a step.
    data = "uint16[:, ::1]" if factors == torch.bfloat16 else "float32[:, ::1]"
    x, places = "float32[:, ::1]", "int64[:, ::1]"
    return compiled(_kernel, f"void({data}, {x}, {x}, {places}, int64, {places}, {places}, {x})")


def runs_on(data: Tensor) -> bool:
    """Whether the compiled kernel can read these blocks."""
    return (
        data.device.type == "cpu"
        and data.dtype in STORED
        and data.is_contiguous()
        and kernel(data.dtype) is not None
    )


class Indexed:
    """All lanes of one arena, ready to be added. See the module's docstring."""

    contiguous, dtype = True, torch.float32

    def __init__(self, lanes: Sequence[Lane]) -> None:
        found = kernel(lanes[0].data.dtype)
        assert found is not None
        self._kernel, self._data = found, numbers(lanes[0].data)
        self._factors, self._rank = lanes[0].factors.sites, lanes[0].factors.rank
        jobs: list[tuple[int, int, int, int]] = []
        uses, gates, done = [], [], 0
        for lane in lanes:
            rows = np.flatnonzero((lane.slots >= 0) & (lane.lengths > 0))
            kinds = lane.slots[rows], _directions(lane.gates[rows])
            order = np.lexsort(kinds[::-1])
            rows, slots, directions = rows[order], kinds[0][order], kinds[1][order]
            fresh = (np.diff(slots, prepend=-1) != 0) | (np.diff(directions, prepend=-1) != 0)
            for first, last in pairwise([*np.flatnonzero(fresh).tolist(), len(rows)]):
                jobs.append((int(slots[first]), done + first, done + last, int(directions[first])))
            stops = np.cumsum(lane.lengths)[rows]
            uses.append(np.stack([stops - lane.lengths[rows], stops], axis=1))
            gates.append(lane.gates[rows])
            done += len(rows)
        self._jobs = np.array(jobs, dtype=np.int64).reshape(-1, 4)
        self._uses = np.ascontiguousarray(np.concatenate(uses))
        self._gates = np.ascontiguousarray(np.concatenate(gates))

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add the branches of a site that this arena patches."""
        factors = self._factors[site]
        self._kernel(
            self._data, x.numpy(), y.numpy(), factors.table, self._rank, self._jobs, self._uses, self._gates
        )


def _directions(gates: Float[np.ndarray, "uses rank"]) -> Int[np.ndarray, " uses"]:
    """How many leading directions have a gate; 0 unless that is a multiple of 4 and none follows."""
    on = gates != 0
    leading = np.where(on.all(axis=1), on.shape[1], on.argmin(axis=1))
    return np.where((on.sum(axis=1) == leading) & (leading % 4 == 0), leading, 0)
