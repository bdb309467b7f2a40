"""Low-rank branches in torch: for machines without numba, for CUDA without Triton, and for prompts.

    dense      y += ((x A_cat^T) * G) B_cat       all tokens times all slots; G is the gate, and zero where a
                                                  token does not use a slot. Best where few slots are shared
    batched    y_s += (g * (x_s A_s^T)) B_s       tokens arranged by slot, [slots, m, d_in]: one batched
                                                  product; m = 1 is one adapter per row
    segments   the same, one product per run of neighbouring tokens with one slot: prompts

    symbol     field                     shape
    x, y       `x`, `y`                  [tokens, d_in], [tokens, width]
    A, B       views of `Lane.data`      [slots, modules rank, d_in], [slots, rank, d_out]
    G          `_gates`                  [slots, tokens, 1, rank]

No factor is copied: slots that lie near each other are read as one strided view, with the unused ones
between them. Only slots far apart (`LaneShape.gathers`) are brought together, site by site.
Numbers of a row may depend on its neighbours in the last bits, as those of any matrix product do.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.lanes import Lane, SiteFactors


@runtime_checkable
class Part(Protocol):
    """Some lanes of a batch, bound to the kernel that adds them."""

    contiguous: bool  # whether `x` and `y` must be
    dtype: torch.dtype  # of `x` and `y`

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add the branches at a patched site."""
        ...


class _Blocks:
    """The factors of the slots a lane uses."""

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self._rank, self._index = lane.factors.rank, None
        first, last = int(lane.used[0]), int(lane.used[-1])
        if lane.shape.gathers:
            self._data = lane.data
            self._index = torch.from_numpy(lane.used).to(device)
            self.places = np.searchsorted(lane.used, lane.token_slots)
        else:
            self._data = lane.data[first : last + 1]
            self.places = lane.token_slots - first
        self.count = lane.shape.blocks

    def of(self, site: SiteFactors) -> tuple[Tensor, list[Tensor]]:
        """A ``[slots, modules rank, d_in]`` of all modules, and B ``[slots, rank, d_out]`` of each."""
        region = self._data[:, site.first_a : site.stop]
        if self._index is not None:
            region = region.index_select(0, self._index)
        rows = len(site.spans) * self._rank
        A = region[:, : rows * site.d_in].view(-1, rows, site.d_in)
        Bs = []
        for span in site.spans:
            start, d_out = span.b - site.first_a, span.module.d_out
            Bs.append(region[:, start : start + self._rank * d_out].view(-1, self._rank, d_out))
        return A, Bs


def _gated(hidden: Tensor, gates: Float[Tensor, "*places 1 rank"], modules: int) -> Tensor:
    """``g * h`` for every module; exactly zero, also of NaN, where the gate is. The gate is float32."""
    split = hidden.view(*hidden.shape[:-1], modules, gates.shape[-1])
    return torch.where(gates != 0, split * gates, 0).to(hidden.dtype)


class Dense:
    """See the module's docstring."""

    contiguous = False

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self.dtype = lane.data.dtype
        self._factors, self._blocks = lane.factors.sites, _Blocks(lane, device)
        tokens = np.flatnonzero(lane.token_slots >= 0)
        gates = np.zeros((self._blocks.count, len(lane.token_slots), 1, lane.factors.rank), np.float32)
        gates[self._blocks.places[tokens], tokens, 0] = lane.token_gates[tokens]
        self._gates = torch.from_numpy(gates).to(device)

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """See `Part`."""
        factors = self._factors[site]
        A, Bs = self._blocks.of(factors)
        hidden = _gated(torch.bmm(x.expand(len(A), -1, -1), A.mT), self._gates, len(Bs))
        for place, (span, B) in enumerate(zip(factors.spans, Bs, strict=True)):
            y[:, span.module.column : span.module.column + span.module.d_out].addbmm_(hidden[:, :, place], B)


class Batched:
    """See the module's docstring."""

    contiguous = False

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self.dtype = lane.data.dtype
        self._factors, self._blocks = lane.factors.sites, _Blocks(lane, device)
        count, longest, rank = self._blocks.count, lane.shape.longest, lane.factors.rank
        tokens = np.flatnonzero(lane.token_slots >= 0)
        tokens = tokens[np.argsort(lane.token_slots[tokens], kind="stable")]
        slots = self._blocks.places[tokens]
        # Place of a token among those of its slot: its place in the order less that of the slot's first.
        _, first, counts = np.unique(slots, return_index=True, return_counts=True)
        places = slots * longest + np.arange(len(tokens)) - np.repeat(first, counts)
        sources = np.zeros(count * longest, np.int64)
        gates = np.zeros((count * longest, rank), np.float32)
        sources[places], gates[places] = tokens, lane.token_gates[tokens]
        order = np.argsort(tokens)
        self._shape = (count, longest)
        self._sources = torch.from_numpy(sources).to(device)
        self._gates = torch.from_numpy(gates.reshape(count, longest, 1, rank)).to(device)
        # Only places that hold a token are read back: padding never reaches a row.
        self._places = torch.from_numpy(places[order]).to(device)
        self._tokens = (
            None if len(tokens) == len(lane.token_slots) else torch.from_numpy(tokens[order]).to(device)
        )

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """See `Part`."""
        factors = self._factors[site]
        A, Bs = self._blocks.of(factors)
        hidden = torch.bmm(x.index_select(0, self._sources).view(*self._shape, factors.d_in), A.mT)
        hidden = _gated(hidden, self._gates, len(Bs))
        for place, (span, B) in enumerate(zip(factors.spans, Bs, strict=True)):
            branch = torch.bmm(hidden[:, :, place], B).flatten(0, 1).index_select(0, self._places)
            into = y[:, span.module.column : span.module.column + span.module.d_out]
            if self._tokens is None:
                into.add_(branch)
            else:
                into.index_add_(0, self._tokens, branch)


class Segments:
    """See the module's docstring. Shrinks as ``A x^T``: with few rank directions nearly twice as fast as
    ``x A^T`` in the CPU's matrix library.

    On CPUs the products are too thin for bfloat16, so its factors are widened site by site: with 8 rank
    directions and 64 tokens oneDNN takes 20 us for what float32 does in 5 (a Xeon with AMX).
    """

    contiguous = False

    def __init__(self, lane: Lane, device: torch.device) -> None:
        narrow = lane.data.dtype == torch.bfloat16 and device.type == "cpu"
        self.dtype = torch.float32 if narrow else lane.data.dtype
        self._factors, self._rank = lane.factors.sites, lane.factors.rank
        gates = torch.from_numpy(lane.token_gates.T.copy()).to(device)
        self._runs = [
            (lane.data[slot], slice(start, stop), gates[:, start:stop].contiguous())
            for slot, start, stop in lane.runs
        ]
        # A direction that is off may hold NaN for somebody else's sake; then zeros are written, not computed.
        self._off = [bool((lane.token_gates[start:stop] == 0).any()) for _, start, stop in lane.runs]

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """See `Part`."""
        factors, rank = self._factors[site], self._rank
        modules, d_in = len(factors.spans), factors.d_in
        for (block, tokens, gates), off in zip(self._runs, self._off, strict=True):
            region = block[factors.first_a : factors.stop].to(x.dtype)
            A = region[: modules * rank * d_in].view(-1, d_in)
            hidden = (A @ x[tokens].mT).view(modules, rank, -1)
            if off:
                hidden = torch.where(gates != 0, hidden * gates, 0).to(hidden.dtype)
            else:
                hidden.mul_(gates)
            into = y[tokens]
            for place, span in enumerate(factors.spans):
                start, column, d_out = span.b - factors.first_a, span.module.column, span.module.d_out
                B = region[start : start + rank * d_out].view(rank, d_out)
                into[:, column : column + d_out].addmm_(hidden[place].mT, B)
