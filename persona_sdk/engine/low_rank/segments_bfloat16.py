"""Prompts with bfloat16 factors on CPUs: each run's factors are widened site by site, products are float32.

    hidden = gate * (A x^T)          y += hidden^T B          for each run of neighbouring tokens of one slot

The products are too thin for bfloat16: with 8 rank directions and 64 tokens oneDNN takes 20 us for what
float32 does in 5, and widening a site's factors takes less than one of them (SmolLM2's shapes, a Xeon with
AMX). Symbols and shapes are those of `kernels.Segments`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.lanes import Lane


class SegmentsBfloat16:
    """See the module's docstring. `x` and `y` are float32."""

    contiguous = False

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self._factors, self._rank = lane.factors.sites, lane.factors.rank
        gates = torch.from_numpy(lane.token_gates.T.copy()).to(device)
        self._runs = [
            (lane.data[slot], slice(start, stop), gates[:, start:stop].contiguous())
            for slot, start, stop in lane.runs
        ]
        # A direction that is off may hold NaN for somebody else's sake; then zeros are written, not computed.
        self._off = [bool((gate == 0).any()) for _, _, gate in self._runs]

    def add(self, site: int, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """See `Part`."""
        factors, rank = self._factors[site], self._rank
        rows = len(factors.spans) * rank
        for (block, tokens, gates), off in zip(self._runs, self._off, strict=True):
            region = block[factors.first_a : factors.stop].float()
            A = region[: rows * factors.d_in].view(rows, factors.d_in)
            hidden = (A @ x[tokens].mT).view(len(factors.spans), rank, -1)
            hidden = torch.where(gates != 0, hidden * gates, 0) if off else hidden.mul_(gates)
            into = y[tokens]
            for place, span in enumerate(factors.spans):
                start, column, d_out = span.b - factors.first_a, span.module.column, span.module.d_out
                B = region[start : start + rank * d_out].view(rank, d_out)
                into[:, column : column + d_out].addmm_(hidden[place].mT, B)
