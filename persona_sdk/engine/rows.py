"""Row-bound low-rank buffers: each row of a batch carries its own factors.

    y[b] += B[b] (g[b] * (A[b] x[b]))          for every row b, in two batched matmuls

| symbol | field                | shape                                                        |
|--------|----------------------|--------------------------------------------------------------|
| A      | `RowFactors.A`       | [rows, rank, d_in], one pair per patched module              |
| B      | `RowFactors.B`       | [rows, d_out, rank]                                          |
| g      | `LowRankRows.gate`   | [rows, 1, rank], shared by all modules                       |

Several patches of one row stand side by side along the rank axis, which is their exact sum. Factors are
copied in when a row is admitted; a step gathers nothing and loops over no adapter, so its cost does not
depend on how many distinct adapters the batch holds. The gate is separate from the factors, so strength
and preferences change without touching them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import IncompatibleAdapterError
from persona_sdk.plan import LowRankPatch
from persona_sdk.tensors import Digest, TensorBundle, low_rank_pairs


@dataclass(frozen=True)
class RowFactors:
    """The factors of every row for one module. Kept as [out, rank] and passed as a transposed view:
    on CPUs that is faster than a contiguous [rank, out].
    """

    A: Float[Tensor, "rows rank d_in"]
    B: Float[Tensor, "rows d_out rank"]


class LowRankRows:
    """Low-rank buffers for a fixed number of rows.

    Args:
        shapes: ``(d_in, d_out)`` of every module that can be patched.
        rows: number of rows in the batch.
        rank: the largest sum of ranks any row needs.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rows: int,
        rank: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank = rank
        self.gate: Float[Tensor, "rows 1 rank"] = torch.zeros(rows, 1, rank, device=device, dtype=dtype)
        self.modules: dict[str, RowFactors] = {}
        self._shapes = shapes

    def admit(
        self, row: int, patches: Sequence[LowRankPatch], tensors: Mapping[Digest, TensorBundle]
    ) -> None:
        """Write the factors and gates of a row's patches, side by side along the rank axis.

        The patches have passed `check_patch`.
        """
        start = 0
        for patch in patches:
            for module, A, B in low_rank_pairs(tensors[patch.factors]):
                factors = self._factors(module)
                stop = start + A.shape[0]
                factors.A[row, start:stop].copy_(A)
                factors.B[row, :, start:stop].copy_(B)
            self.gate[row, 0, start : start + patch.rank] = torch.tensor(patch.gate)
            start += patch.rank

    def _factors(self, module: str) -> RowFactors:
        if module not in self.modules:
            d_in, d_out = self._shapes[module]
            rows, rank, like = self.gate.shape[0], self.rank, self.gate
            self.modules[module] = RowFactors(
                like.new_zeros(rows, rank, d_in), like.new_zeros(rows, d_out, rank)
            )
        return self.modules[module]


def check_patch(patch: LowRankPatch, bundle: TensorBundle, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `IncompatibleAdapterError` unless every factor fits the module it names."""
    for module, A, B in low_rank_pairs(bundle):
        expected = shapes.get(module)
        if expected is None:
            raise IncompatibleAdapterError(
                f"{patch.origin!r} patches {module!r}, which this model does not have.",
                hint=f"Modules here look like {next(iter(shapes), 'none')!r}.",
            )
        if (A.shape[1], B.shape[0]) != expected or A.shape[0] > patch.rank:
            raise IncompatibleAdapterError(
                f"{patch.origin!r} has A {tuple(A.shape)} and B {tuple(B.shape)} for {module!r}, plan rank "
                f"{patch.rank}.",
                hint=f"This model expects d_in, d_out = {expected} and a rank of at most the plan's.",
            )


def add_low_rank(
    x: Float[Tensor, "rows tokens d_in"],
    y: Float[Tensor, "rows tokens d_out"],
    factors: RowFactors,
    gate: Float[Tensor, "rows 1 rank"],
) -> Float[Tensor, "rows tokens d_out"]:
    """``y + B (gate * (A x))`` row by row, written into `y` where its precision allows."""
    x = x.to(gate.dtype)
    if x.shape[1] == 1:
        # A decode step reads every factor once, so memory bandwidth is all: matrix times vector streams A
        # at about twice the rate of vector times transposed matrix (measured on an AVX-512 CPU, float32).
        hidden = torch.bmm(factors.A, x.transpose(1, 2)).transpose(1, 2).mul_(gate)
    else:
        hidden = torch.bmm(x, factors.A.transpose(1, 2)).mul_(gate)
    if y.dtype == gate.dtype:
        return y.baddbmm_(hidden, factors.B.transpose(1, 2))
    return y + torch.bmm(hidden, factors.B.transpose(1, 2)).to(y.dtype)
