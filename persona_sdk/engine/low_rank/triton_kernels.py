"""Triton kernels of the branch on CUDA. Imported only where Triton is there (triton_indexed.py).

    shrink    h[s, l, t, m, k] = g[l, row(t), k] * sum over columns c of split s of  A_m[k, c] x[t, c]
    expand    y[t, columns of m] += sum over lanes l, splits s, directions k of  h[s, l, t, m, k] B_m[k, :]

    symbol    argument        shape
    x, y      `x`, `y`        [tokens, d_in], [tokens, width]; rows may be apart by more than their width
    A, B      `data`          [slots, size], offsets as in blocks.py
    slot      `slots`         [lanes, rows]
    used      `used`          [lanes, rows] directions up to the last with a gate; 0 where the row has no slot
    g         `gates`         [lanes, rows, RANK]
    row(t)    `row_of_token`  [tokens]
    h         `hidden`        [SPLITS, lanes, tokens, MODULES, RANK] float32
    tile      `tiles`         [tiles, 5] module, B of its first column, d_out, first column in y, columns
    segment   `segments`      [segments, 3] row, first token, tokens: at most TOKENS tokens of one row

`*_rows` work token by token (decoding), `*_segments` on TOKENS tokens of one row at a time (prompts), with
tensor cores. A loop runs to `used`, so padded directions cost nothing, and a direction whose gate is zero is
neither read nor added, not even where it holds NaN. Sums are float32. Splits are summed by the expand, not by
atomics, and their number depends on d_in alone: a row's result is the same bits in any batch. Tokens are the
fastest axis of every grid, so that programs that read the same factors run together and meet in the cache.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def _jit(function: Callable[..., None]) -> Any:
    """`triton.jit` reads the source of a function, so wrappers of runtime type checkers come off first."""
    return triton.jit(inspect.unwrap(function))


@_jit
def shrink_rows(  # type: ignore[no-untyped-def]
    x, data, hidden, slots, used, gates, row_of_token, rows, lanes, tokens, size, first_a, x_stride,
    D_IN: tl.constexpr, RANK: tl.constexpr, MODULES: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT: tl.constexpr, K_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token, module and split, and lane."""
    token = tl.program_id(0).to(tl.int64)
    module = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    lane = tl.program_id(2)
    place = lane * rows + tl.load(row_of_token + token)
    directions = tl.load(used + place)
    if directions > 0:
        A = data + tl.load(slots + place).to(tl.int64) * size + first_a + module * RANK * D_IN
        h = hidden + (((split * lanes + lane) * tokens + token) * MODULES + module) * RANK
        for start in range(0, directions, R_BLOCK):
            k = start + tl.arange(0, R_BLOCK)
            gate = tl.load(gates + place * RANK + k, mask=k < directions, other=0.0)
            products = tl.zeros([R_BLOCK, K_BLOCK], dtype=tl.float32)
            for first in range(0, SPLIT, K_BLOCK):
                within = first + tl.arange(0, K_BLOCK)
                c = split * SPLIT + within
                inside = (within < SPLIT) & (c < D_IN)
                row = tl.load(x + token * x_stride + c, mask=inside, other=0.0).to(tl.float32)
                block = tl.load(
                    A + k[:, None] * D_IN + c[None, :],
                    mask=(gate != 0.0)[:, None] & inside[None, :],
                    other=0.0,
                ).to(tl.float32)
                products += block * row[None, :]
            sums = tl.sum(products, axis=1)
            tl.store(h + k, tl.where(gate != 0.0, sums * gate, 0.0), mask=k < directions)


@_jit
def expand_rows(  # type: ignore[no-untyped-def]
    y, data, hidden, slots, used, gates, row_of_token, tiles, rows, lanes, tokens, size, y_stride,
    RANK: tl.constexpr, MODULES: tl.constexpr, SPLITS: tl.constexpr,
    C_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token and tile of columns. It adds all lanes, in their order, and writes y once."""
    token = tl.program_id(0).to(tl.int64)
    tile = tiles + tl.program_id(1) * 5
    module = tl.load(tile)
    b = tl.load(tile + 1)
    d_out = tl.load(tile + 2)
    column = tl.load(tile + 3)
    c = tl.arange(0, C_BLOCK)
    inside = c < tl.load(tile + 4)
    row = tl.load(row_of_token + token)
    total = tl.zeros([C_BLOCK], dtype=tl.float32)
    found = 0
    for lane in range(lanes):
        place = lane * rows + row
        directions = tl.load(used + place)
        found += directions
        if directions > 0:
            B = data + tl.load(slots + place).to(tl.int64) * size + b
            for start in range(0, directions, R_BLOCK):
                k = start + tl.arange(0, R_BLOCK)
                gate = tl.load(gates + place * RANK + k, mask=k < directions, other=0.0)
                h = tl.zeros([R_BLOCK], dtype=tl.float32)
                for split in range(SPLITS):
                    at = ((split * lanes + lane) * tokens + token) * MODULES + module
                    h += tl.load(hidden + at * RANK + k, mask=k < directions, other=0.0)
                block = tl.load(
                    B + k[:, None] * d_out + c[None, :],
                    mask=(gate != 0.0)[:, None] & inside[None, :],
                    other=0.0,
                ).to(tl.float32)
                # A direction without a gate has h = 0 and a block of zeros.
                total += tl.sum(h[:, None] * block, axis=0)
    if found > 0:
        out = y + token * y_stride + column + c
        before = tl.load(out, mask=inside, other=0.0)
        tl.store(out, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


@_jit
def shrink_segments(  # type: ignore[no-untyped-def]
    x, data, hidden, slots, used, gates, segments, rows, lanes, tokens, size, first_a, x_stride,
    D_IN: tl.constexpr, RANK: tl.constexpr, MODULES: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT: tl.constexpr, K_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    SAME: tl.constexpr,
):  # fmt: skip
    """As `shrink_rows`, for the tokens of a segment. SAME: x and the factors have one precision."""
    segment = segments + tl.program_id(0) * 3
    module = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    lane = tl.program_id(2)
    place = lane * rows + tl.load(segment)
    t = tl.arange(0, TOKENS)
    present = t < tl.load(segment + 2)
    token = tl.load(segment + 1).to(tl.int64) + t
    directions = tl.load(used + place)
    if (directions > 0) & (tl.load(segment + 2) > 0):
        A = data + tl.load(slots + place).to(tl.int64) * size + first_a + module * RANK * D_IN
        h = hidden + (((split * lanes + lane) * tokens + token) * MODULES + module) * RANK
        for start in range(0, directions, R_BLOCK):
            k = start + tl.arange(0, R_BLOCK)
            gate = tl.load(gates + place * RANK + k, mask=k < directions, other=0.0)
            sums = tl.zeros([TOKENS, R_BLOCK], dtype=tl.float32)
            for first in range(0, SPLIT, K_BLOCK):
                within = first + tl.arange(0, K_BLOCK)
                c = split * SPLIT + within
                inside = (within < SPLIT) & (c < D_IN)
                row = tl.load(
                    x + token[:, None] * x_stride + c[None, :],
                    mask=present[:, None] & inside[None, :],
                    other=0.0,
                )
                block = tl.load(
                    A + k[None, :] * D_IN + c[:, None],
                    mask=(gate != 0.0)[None, :] & inside[:, None],
                    other=0.0,
                )
                if SAME:
                    sums = tl.dot(row, block, sums, input_precision="ieee")
                else:
                    sums = tl.dot(row.to(tl.float32), block.to(tl.float32), sums, input_precision="ieee")
            gated = tl.where((gate != 0.0)[None, :], sums * gate[None, :], 0.0)
            tl.store(h[:, None] + k[None, :], gated, mask=present[:, None] & (k < directions)[None, :])


@_jit
def expand_segments(  # type: ignore[no-untyped-def]
    y, data, hidden, slots, used, gates, segments, tiles, rows, lanes, tokens, size, y_stride,
    RANK: tl.constexpr, MODULES: tl.constexpr, SPLITS: tl.constexpr,
    C_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `expand_rows`, for the tokens of a segment. PRECISION: in which h, float32, enters the product."""
    segment = segments + tl.program_id(0) * 3
    tile = tiles + tl.program_id(1) * 5
    module = tl.load(tile)
    b = tl.load(tile + 1)
    d_out = tl.load(tile + 2)
    column = tl.load(tile + 3)
    c = tl.arange(0, C_BLOCK)
    inside = c < tl.load(tile + 4)
    row = tl.load(segment)
    t = tl.arange(0, TOKENS)
    count = tl.load(segment + 2)
    present = t < count
    token = tl.load(segment + 1).to(tl.int64) + t
    total = tl.zeros([TOKENS, C_BLOCK], dtype=tl.float32)
    found = 0
    for lane in range(lanes):
        place = lane * rows + row
        directions = tl.load(used + place)
        found += directions
        if (directions > 0) & (count > 0):
            B = data + tl.load(slots + place).to(tl.int64) * size + b
            for start in range(0, directions, R_BLOCK):
                k = start + tl.arange(0, R_BLOCK)
                gate = tl.load(gates + place * RANK + k, mask=k < directions, other=0.0)
                h = tl.zeros([TOKENS, R_BLOCK], dtype=tl.float32)
                for split in range(SPLITS):
                    at = ((split * lanes + lane) * tokens + token) * MODULES + module
                    h += tl.load(
                        hidden + at[:, None] * RANK + k[None, :],
                        mask=present[:, None] & (k < directions)[None, :],
                        other=0.0,
                    )
                block = tl.load(
                    B + k[:, None] * d_out + c[None, :],
                    mask=(gate != 0.0)[:, None] & inside[None, :],
                    other=0.0,
                ).to(tl.float32)
                total = tl.dot(h, block, total, input_precision=PRECISION)
    if found > 0:
        out = y + token[:, None] * y_stride + column + c[None, :]
        mask = present[:, None] & inside[None, :]
        before = tl.load(out, mask=mask, other=0.0)
        tl.store(out, (before.to(tl.float32) + total).to(before.dtype), mask=mask)


# The interpreter's products of bfloat16 are those of their bits: there, factors are widened first.
INTERPRETED = not isinstance(shrink_rows, triton.runtime.JITFunction)
