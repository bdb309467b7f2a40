"""The branches of one forward pass: lanes, each bound to the kernel that adds it.

y += sum over lanes of  B (gate * (A x))           at every patched site
"""

from collections.abc import Callable, Mapping, Sequence
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
        self._dtype = lanes[0][1].data.dtype if lanes else torch.float32

    def add(self, site: Site, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add all branches of all rows in place. Nothing happens at a site that no adapter patches.

        Where `y` is less precise than the factors, the branches are summed in the factors' precision and
        added once.
        """
        parts = self._parts.get(site.index)
        if parts is None:
            return
        x, into = x.to(self._dtype), y
        plain = any(part.contiguous for part in parts)
        if plain:
            x = x.contiguous()
        if y.dtype != self._dtype or (plain and not y.is_contiguous()):
            into = torch.zeros(y.shape, dtype=self._dtype, device=y.device)
        for part in parts:
            part.add(site.index, x, into)
        if into is not y:
            y.add_(into)
