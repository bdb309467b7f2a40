"""What the hardware allows: bytes and operations a step cannot do without, from shapes alone.

    flops   = 1 + n r κ / (n P_b + R P_h)             n = R·T tokens; the head sees one token a row
    bytes   = 1 + c r κ / (P_b + P_h)                 decode; c = U at best, c = R for row-bound buffers
    roofline = 1 + max(b U r κ / bandwidth, 2 n r κ / peak) / t_base

| symbol | meaning                                              |
|--------|------------------------------------------------------|
| P_b    | weights of the linears of the blocks                 |
| P_h    | weights of the output head, tied or not              |
| κ      | sum of d_in + d_out over the patched modules         |
| r      | rank                                                 |
| R, T   | rows of the batch, tokens of each row in this step   |
| U      | distinct adapters in the batch                       |
| b      | bytes a weight: 4                                    |
| t_base | measured time of the base model's step               |

A step bound by memory cannot cost less than `bytes`, one bound by arithmetic not less than `flops`. On a
CPU a step of 32 rows in float32 is bound by arithmetic and its low-rank branch by memory, so neither is
the floor of the sum; `roofline` is, with the bandwidth and peak measured on the machine of the run.
Attention, norms and activations are left out; they cost base and contenders the same.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """The three numbers of a model that the floor depends on. P_b, P_h and κ of the module's docstring."""

    blocks: int
    head: int
    kappa: int

    @classmethod
    def of(cls, linears: Mapping[str, tuple[int, int]], *, vocab: int, d_model: int) -> "Shape":
        """From ``(d_in, d_out)`` of every patched linear, which are all linears but the head."""
        return cls(
            blocks=sum(d_in * d_out for d_in, d_out in linears.values()),
            head=vocab * d_model,
            kappa=sum(d_in + d_out for d_in, d_out in linears.values()),
        )


@dataclass(frozen=True)
class Rates:
    """What this machine was measured to do with the threads of the run."""

    bytes_per_second: float
    flops_per_second: float


def flops_ratio(shape: Shape, *, rank: int, rows: int, tokens: int) -> float:
    """Multiply-adds of a step with low-rank branches over those without."""
    n = rows * tokens
    return 1 + n * rank * shape.kappa / (n * shape.blocks + rows * shape.head)


def bytes_ratio(shape: Shape, *, rank: int, copies: int) -> float:
    """Weight bytes a step reads with `copies` low-rank adapters over those without."""
    return 1 + copies * rank * shape.kappa / (shape.blocks + shape.head)


def roofline_ratio(
    shape: Shape, rates: Rates, *, rank: int, rows: int, tokens: int, distinct: int, base_seconds: float
) -> float:
    """Base step plus the least time of the branch on this machine, over the base step."""
    branch = max(
        _BYTES * distinct * rank * shape.kappa / rates.bytes_per_second,
        2 * rows * tokens * rank * shape.kappa / rates.flops_per_second,
    )
    return 1 + branch / base_seconds


def measure_rates(*, megabytes: int = 256, side: int = 1024, repeats: int = 25) -> Rates:
    """Best of several: reading a tensor far larger than the caches, and a square float32 product."""
    stream = torch.ones(megabytes * 2**20 // _BYTES)
    square = torch.ones(side, side)
    return Rates(
        bytes_per_second=stream.numel() * _BYTES / _fastest(stream.sum, repeats),
        flops_per_second=2 * side**3 / _fastest(lambda: square @ square, repeats),
    )


def _fastest(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
