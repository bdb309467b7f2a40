"""The branches of one forward pass: lanes, each bound to the kernel that adds it.

y += sum over lanes of  B (gate * (A x))           at every patched site
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank import indexed_bfloat16
from persona_sdk.engine.low_rank.indexed import Indexed
from persona_sdk.engine.low_rank.indexed_bfloat16 import IndexedBfloat16
from persona_sdk.engine.low_rank.kernels import Batched, Dense, Part, Segments
from persona_sdk.engine.low_rank.lanes import Lane
from persona_sdk.engine.low_rank.sites import Site
from persona_sdk.engine.low_rank.triton_indexed import TritonIndexed

_TORCH: Mapping[str, Callable[[Lane, torch.device], Part]] = MappingProxyType(
    {"dense": Dense, "batched": Batched, "segments": Segments}
)
# One call adds all lanes of an arena.
_TOGETHER: Mapping[str, Callable[[Sequence[Lane]], Part]] = MappingProxyType(
    {"indexed": Indexed, "indexed bfloat16": IndexedBfloat16, "triton": TritonIndexed}
)
_LONG_RUN = 16  # tokens of one slot in a row, on average, from which a matrix product wins


class LowRankBatch:
    """All branches of one pass.

    Args:
        lanes: with the kernel of each. Those of one arena that a slot-indexed kernel adds go in one call.
            "batched" names what is computed; bfloat16 factors on CPUs have a kernel of their own for it,
            which is used (`_own`).
        device: of the tokens.
    """

    def __init__(self, lanes: Sequence[tuple[str, Lane]], device: torch.device) -> None:
        together: dict[tuple[str, int], list[Lane]] = {}
        parts: list[tuple[Lane, Part]] = []
        self._dtypes: dict[Part, torch.dtype] = {}  # what x and y must have; else that of the factors
        for chosen, lane in lanes:
            kernel = _own(chosen, lane)
            if kernel in _TOGETHER:
                together.setdefault((kernel, id(lane.factors)), []).append(lane)
            else:
                parts.append((lane, _TORCH[kernel](lane, device)))
                if kernel == "segments" and _is_bfloat16_on_cpu(lane):
                    self._dtypes[parts[-1][1]] = torch.float32
        parts += [(found[0], _TOGETHER[kernel](found)) for (kernel, _), found in together.items()]
        self._parts: dict[int, list[Part]] = {}
        for lane, part in parts:
            self._dtypes.setdefault(part, lane.data.dtype)
            for site in lane.factors.sites:
                self._parts.setdefault(site, []).append(part)

    def add(self, site: Site, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add all branches of all rows in place. Nothing happens at a site that no adapter patches.

        Where a kernel wants more precision than `y` has, the sum is made in the kernel's and rounded once.
        """
        for dtype, group in groupby(self._parts.get(site.index, ()), self._dtypes.__getitem__):
            parts = list(group)
            given, into = x.to(dtype), y.to(dtype)
            if any(part.contiguous for part in parts):
                given, into = given.contiguous(), into.contiguous()
            for part in parts:
                part.add(site.index, given, into)
            if into is not y:
                y.copy_(into)


def _own(kernel: str, lane: Lane) -> str:
    """The kernel that bfloat16 factors on a CPU have for what a torch kernel computes, if there is one."""
    short = lane.shape.tokens < _LONG_RUN * lane.shape.runs
    own = kernel == "batched" and short and indexed_bfloat16.runs_on(lane.data)
    return "indexed bfloat16" if own else kernel


def _is_bfloat16_on_cpu(lane: Lane) -> bool:
    return lane.data.device.type == "cpu" and lane.data.dtype == torch.bfloat16
