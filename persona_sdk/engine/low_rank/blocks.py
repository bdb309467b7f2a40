"""Flat blocks: all factors of one adapter in one contiguous tensor, so that a load is one copy.

    block:  | site 0: A_q A_k A_v  B_q B_k B_v | site 1: A B | ...        A [rank, d_in], B [rank, d_out]

Every adapter of one `BlockLayout` has its factors at the same offsets, so a kernel finds them by slot
number alone. The A's of a site stand together: modules that share their input share one shrink. B is kept
transposed, [rank, d_out], so that its rows are contiguous. Ranks are padded with zeros to the layout's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.sites import Site, SiteModule
from persona_sdk.tensors import TensorBundle, low_rank_pairs

RANK_CLASSES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Span:
    """Where one module's factors stand in a block: offsets in numbers, not bytes."""

    module: SiteModule
    a: int
    b: int


@dataclass(frozen=True)
class BlockLayout:
    """Offsets of every factor of the adapters that patch the same modules at the same padded rank.

    Args:
        rank: the padded rank.
        sites: all sites of the forward pass.
        modules: paths of the modules the adapters patch.
    """

    rank: int
    sites: tuple[Site, ...]
    modules: frozenset[str]

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """For every site, by index, the spans of its patched modules; empty where none is patched."""
        offset, spans = 0, []
        for site in self.sites:
            patched = [module for module in site.modules if module.path in self.modules]
            b = offset + len(patched) * self.rank * site.d_in
            found = []
            for place, module in enumerate(patched):
                found.append(Span(module, offset + place * self.rank * site.d_in, b))
                b += self.rank * module.d_out
            spans.append(tuple(found))
            offset = b
        return tuple(spans)

    @cached_property
    def size(self) -> int:
        """Numbers in one block."""
        total = 0
        for site in self.sites:
            for module in site.modules:
                if module.path in self.modules:
                    total += self.rank * (site.d_in + module.d_out)
        return total

    def pack(self, bundle: TensorBundle, dtype: torch.dtype = torch.float32) -> Float[Tensor, " size"]:
        """The flat block of a bundle whose modules are this layout's."""
        block = torch.zeros(self.size, dtype=dtype)
        places = {span.module.path: (site, span) for site, spans in zip(self.sites, self.spans, strict=True)
                  for span in spans}
        for path, A, B in low_rank_pairs(bundle):
            site, span = places[path]
            rank, d_in, d_out = A.shape[0], site.d_in, span.module.d_out
            block[span.a : span.a + rank * d_in].view(rank, d_in).copy_(A)
            block[span.b : span.b + rank * d_out].view(rank, d_out).copy_(B.T)
        return block


def layout_of(sites: Sequence[Site], bundle: TensorBundle, rank: int) -> BlockLayout:
    """The layout a bundle belongs to: its modules, and the smallest rank class that holds `rank`."""
    padded = next((size for size in RANK_CLASSES if size >= rank), rank)
    modules = frozenset(path for path, _, _ in low_rank_pairs(bundle))
    return BlockLayout(padded, tuple(sites), modules)
