"""Arenas that stand alone, filled with random adapters, and the dense formula in float64."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.engine.low_rank.lanes import BoundPatch
from persona_sdk.engine.low_rank.sites import Site, SiteModule

SITES = (
    Site(0, 12, (SiteModule("q", 12, 0), SiteModule("k", 5, 12), SiteModule("v", 5, 17))),
    Site(1, 12, (SiteModule("o", 12, 0),)),
    Site(2, 12, (SiteModule("gate", 33, 0), SiteModule("up", 33, 33))),
    Site(3, 33, (SiteModule("down", 12, 0),)),
)


@dataclass(eq=False, repr=False)
class Arena:
    layout: BlockLayout
    data: Tensor


@dataclass(frozen=True)
class Slot:
    arena: Arena
    index: int
    rank: int
    digest: str


@dataclass(eq=False, repr=False)
class World:
    """Two arenas that differ in rank and in what they patch, and the factors written into them."""

    dtype: torch.dtype = torch.float32
    slots: int = 6
    arenas: list[Arena] = field(default_factory=list)
    factors: dict[tuple[int, int], dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        for rank, modules in ((8, ("q", "k", "v", "o", "gate", "up", "down")), (4, ("q", "v", "gate"))):
            layout = BlockLayout(rank, SITES, frozenset(modules))
            arena = Arena(layout, torch.zeros(self.slots, layout.size, dtype=self.dtype))
            for index in range(self.slots):
                own = rank - index % 3  # padded directions hold zeros
                pairs = {
                    module.path: (
                        torch.randn(own, site.d_in, generator=generator).to(self.dtype),
                        torch.randn(module.d_out, own, generator=generator).to(self.dtype),
                    )
                    for site in SITES
                    for module in site.modules
                    if module.path in modules
                }
                bundle = {
                    f"{path}.{name}": t
                    for path, AB in pairs.items()
                    for name, t in zip("AB", AB, strict=True)
                }
                arena.data[index] = layout.pack(bundle, self.dtype)
                self.factors[len(self.arenas), index] = pairs
            self.arenas.append(arena)

    def slot(self, arena: int, index: int) -> Slot:
        rank = self.arenas[arena].layout.rank - index % 3
        return Slot(self.arenas[arena], index, rank, f"{arena}/{index}")

    def patch(self, arena: int, index: int, gate: tuple[float, ...]) -> BoundPatch:
        slot = self.slot(arena, index)
        return BoundPatch(slot, tuple(gate[k % len(gate)] for k in range(slot.rank)))

    def inputs(self, tokens: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            (
                torch.randn(tokens, site.d_in, generator=generator),
                torch.randn(tokens, site.width, generator=generator),
            )
            for site in SITES
        ]

    def reference(self, rows, lengths, inputs) -> list[np.ndarray]:
        """``y + B diag(g) A x`` in float64, token by token."""
        outputs = []
        for site, (x, y) in zip(SITES, inputs, strict=True):
            out, start = y.double().numpy().copy(), 0
            for patches, length in zip(rows, lengths, strict=True):
                for patch in patches:
                    number = self.arenas.index(patch.slot.arena)
                    for module in site.modules:
                        if module.path in self.factors[number, patch.slot.index]:
                            A, B = (
                                t.double().numpy()
                                for t in self.factors[number, patch.slot.index][module.path]
                            )
                            columns = slice(module.column, module.column + module.d_out)
                            delta = B @ np.diag(patch.gate) @ A
                            out[start : start + length, columns] += (
                                x[start : start + length].double().numpy() @ delta.T
                            )
                start += length
            outputs.append(out)
        return outputs


def added(batch, inputs) -> list[Tensor]:
    """What a batch makes of copies of the outputs."""
    outputs = []
    for site, (x, y) in zip(SITES, inputs, strict=True):
        out = y.clone()
        batch.add(site, x, out)
        outputs.append(out)
    return outputs
