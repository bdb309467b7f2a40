"""The branches of one forward pass: lanes, each bound to the kernel that adds it.

y += sum over lanes of  B (gate * (A x))           at every patched site
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.indexed import Indexed
from persona_sdk.engine.low_rank.kernels import Batched, Dense, Part, Segments
from persona_sdk.engine.low_rank.lanes import Lane
from persona_sdk.engine.low_rank.sites import Site
from persona_sdk.engine.low_rank.triton_indexed import TritonIndexed

_TORCH: Mapping[str, Callable[[Lane, torch.device], Part]] = MappingProxyType(
    {"dense": Dense, "batched": Batched, "segments": Segments}
)
# One call adds all lanes of an arena.
_TOGETHER: Mapping[str, Callable[[Sequence[Lane]], Part]] = MappingProxyType(
    {"indexed": Indexed, "triton": TritonIndexed}
)


class LowRankBatch:
    """All branches of one pass.

    Args:
        lanes: with the kernel of each. Those of one arena that a slot-indexed kernel adds go in one call.
        device: of the tokens.
    """

    def __init__(self, lanes: Sequence[tuple[str, Lane]], device: torch.device) -> None:
        together: dict[tuple[str, int], list[Lane]] = {}
        parts: list[tuple[Lane, Part]] = []
        for kernel, lane in lanes:
            if kernel in _TOGETHER:
                together.setdefault((kernel, id(lane.factors)), []).append(lane)
            else:
                parts.append((lane, _TORCH[kernel](lane, device)))
        parts += [(found[0], _TOGETHER[kernel](found)) for (kernel, _), found in together.items()]
        self._parts: dict[int, list[Part]] = {}
        for lane, part in parts:
            for site in lane.factors.sites:
                self._parts.setdefault(site, []).append(part)

    def add(self, site: Site, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add all branches of all rows in place. Nothing happens at a site that no adapter patches.

        Where kernels want more precision than `y` has, the sum is made in theirs and rounded once.
        """
        for dtype, group in groupby(self._parts.get(site.index, ()), attrgetter("dtype")):
            parts = list(group)
            given, into = x.to(dtype), y.to(dtype)
            if any(part.contiguous for part in parts):
                given, into = given.contiguous(), into.contiguous()
            for part in parts:
                part.add(site.index, given, into)
            if into is not y:
                y.copy_(into)
