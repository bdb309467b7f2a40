"""The branch on CUDA: all lanes of an arena in two launches per site, factors read where they stand.

    y[t] += sum over lanes l of  B (g[l, row(t)] * (A x[t]))        A, B of slot[l, row(t)]

    symbol      field                     shape
    A, B        `LaneBuffers.data`        [slots, size]
    slot, g     `.slots`, `.gates`        see lane_buffers.py
    x, y        `x`, `y`                  [tokens, d_in], [tokens, width]

Decoding works token by token; prompts work on 16 tokens of one row at a time, on tensor cores. `add` reads no
tensor on the host; it is one operator of torch (``persona_sdk::low_rank_add``) with a shape function, so that
fake tensors and compilers pass through it.

Triton is imported by the first launch. Without it, or on CPUs, `runs_on` says no and torch does the work.
"""

import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.lane_buffers import TOKENS, LaneBuffers
from persona_sdk.engine.low_rank.lanes import Lane

logger = logging.getLogger("persona_sdk.engine")


@cache
def kernels() -> ModuleType | None:
    """triton_kernels.py; None where Triton cannot be imported."""
    try:
        from persona_sdk.engine.low_rank import triton_kernels
    except ImportError as error:
        logger.info("Triton cannot be imported (%s); low-rank branches run in torch.", error)
        return None
    return triton_kernels


def runs_on(data: Tensor) -> bool:
    """Whether these kernels can read an arena's blocks."""
    return (
        data.device.type == "cuda"
        and data.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and data.is_contiguous()
        and kernels() is not None
    )


class TritonIndexed:
    """All lanes of one arena, ready to be added. Takes any mix of precisions; sums are float32.

    Made from lanes, it serves one batch; made from buffers, whatever is written into them.
    """

    contiguous = False

    def __init__(self, lanes: Sequence[Lane] | LaneBuffers, device: torch.device | None = None) -> None:
        if isinstance(lanes, LaneBuffers):
            self.buffers, self.dtype = lanes, lanes.data.dtype
            return
        self.dtype = lanes[0].data.dtype
        lengths = lanes[0].lengths
        self.buffers = LaneBuffers(
            lanes[0].factors,
            lanes=len(lanes),
            rows=len(lengths),
            tokens=int(lengths.sum()),
            prompts=bool((lengths > 1).any()),
            device=device or lanes[0].data.device,
        )
        self.buffers.write(lanes)

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add the branches of a site that this arena patches."""
        buffers = self.buffers
        factors = buffers.factors.sites[site]
        torch.ops.persona_sdk.low_rank_add(
            x, y, buffers.data, buffers.slots, buffers.used, buffers.gates, buffers.row_of_token,
            buffers.segments, buffers.tiles[site], buffers.hidden, factors.first_a, len(factors.spans),
            buffers.blocking.split, buffers.blocking.k, buffers.blocking.c,
        )  # fmt: skip


def _launch(
    x: Tensor, y: Tensor, data: Tensor, slots: Tensor, used: Tensor, gates: Tensor, row_of_token: Tensor,
    segments: Tensor, tiles: Tensor, hidden: Tensor, first_a: int, modules: int, split: int, k: int, c: int,
) -> None:  # fmt: skip
    """Shrink, then expand. Grids come from shapes alone."""
    found = kernels()
    assert found is not None
    (lanes, rows, rank), (tokens, d_in) = gates.shape, x.shape
    splits, directions = -(-d_in // split), 1 << (rank - 1).bit_length()
    sizes = {"RANK": rank, "MODULES": modules, "SPLITS": splits}
    cut = {"D_IN": d_in, "SPLIT": split, "K_BLOCK": k}
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if len(segments):
            sizes |= {"R_BLOCK": max(16, min(directions, 64)), "TOKENS": TOKENS}
            # TF32 holds bfloat16 and float16 factors exactly and rounds h eight times finer than bfloat16.
            precision = "ieee" if data.dtype == torch.float32 else "tf32"
            found.shrink_segments[len(segments), modules * splits, lanes](
                x, data, hidden, slots, used, gates, segments, rows, lanes, tokens, data.stride(0), first_a,
                x.stride(0), SAME=x.dtype == data.dtype and not found.INTERPRETED, **sizes, **cut,
            )  # fmt: skip
            found.expand_segments[len(segments), len(tiles)](
                y, data, hidden, slots, used, gates, segments, tiles, rows, lanes, tokens, data.stride(0),
                y.stride(0), C_BLOCK=c, PRECISION=precision, **sizes,
            )  # fmt: skip
        else:
            sizes |= {"R_BLOCK": min(directions, 16)}
            found.shrink_rows[tokens, modules * splits, lanes](
                x, data, hidden, slots, used, gates, row_of_token, rows, lanes, tokens, data.stride(0),
                first_a, x.stride(0), **sizes, **cut,
            )  # fmt: skip
            found.expand_rows[tokens, len(tiles)](
                y, data, hidden, slots, used, gates, row_of_token, tiles, rows, lanes, tokens,
                data.stride(0), y.stride(0), C_BLOCK=c, **sizes,
            )  # fmt: skip


def _shapes_only(*_: object) -> None:
    """The operator returns nothing, so nothing is to be said about its result."""


_library = torch.library.Library("persona_sdk", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "low_rank_add(Tensor x, Tensor(a!) y, Tensor data, Tensor slots, Tensor used, Tensor gates, "
    "Tensor row_of_token, Tensor segments, Tensor tiles, Tensor(b!) hidden, int first_a, int modules, "
    "int split, int k, int c) -> ()"
)
for _device, _function in (("CUDA", _launch), ("CPU", _launch), ("Meta", _shapes_only)):
    _library.impl("low_rank_add", _function, _device)  # type: ignore[no-untyped-call]
