"""SVD-LoRA conditioned on a preference vector: the algebra. The layer that is trained: `svd_layers`.

    W(λ) = W0 + c · U diag([σ, s∘λ]) Vᵀ,   c = α / k

| symbol | field              | shape                                                                   |
|--------|--------------------|-------------------------------------------------------------------------|
| U      | "<module>.U"       | [d_out, r]                                                              |
| V      | "<module>.V"       | [d_in, r]                                                               |
| σ      | "<module>.sigma"   | [k]: the part that is the same for every preference                     |
| s      | "<module>.s"       | [1], one a matrix, or [m] with a scale per dimension                    |
| λ      | ``preference``     | [m] for a batch, [rows, m] one a row; never a weight                    |
| m, p   |                    | dimensions, and directions each of them has; r = k + m p                |
| k      | ``rank``           | integer; α is divided by k, not by r                                    |

Dimension i owns the columns k + i p to k + (i + 1) p. ΔW is affine in λ, so what is served is a plain
low-rank pair with a gate that all modules share:

    A = Vᵀ,   B = c · U diag([σ, s, ..., s]),   gate = weight · [1, ..., 1, λ_1, ..., λ_m]

References: Zhong et al. 2024, Panacea, arXiv 2402.02030; the form is that of AdaLoRA, Zhang et al. 2023,
arXiv 2303.10512, without its pruning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import IncompatibleAdapterError
from persona_sdk.tensors import TensorBundle, low_rank_bundle

SIDES = ("U", "V", "sigma", "s")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that all modules of one adapter share.

    Args:
        rank: k, directions of the shared part.
        dimensions: m.
        preference_rank: p, directions of each dimension.
        scale_per_dimension: s has m entries instead of one.
        multiplier: c.
    """

    rank: int
    dimensions: int
    preference_rank: int = 1
    scale_per_dimension: bool = False
    multiplier: float = 1.0

    @property
    def total(self) -> int:
        """All directions: k + m p."""
        return self.rank + self.dimensions * self.preference_rank

    @property
    def scales(self) -> int:
        """Entries of s."""
        return self.dimensions if self.scale_per_dimension else 1


def singular_values(
    sigma: Float[Tensor, " k"], s: Float[Tensor, " scales"], preference: Float[Tensor, "*rows m"], p: int
) -> Float[Tensor, "*rows r"]:
    """``[σ, s∘λ]``, each entry of the second part p times."""
    scaled = (s * preference).repeat_interleave(p, dim=-1)
    return torch.cat([sigma.expand(*preference.shape[:-1], -1), scaled], dim=-1)


def gate(preference: Sequence[float], shape: Shape, weight: float = 1.0) -> tuple[float, ...]:
    """The plan part's gate: 1 for the shared directions, λ for the others, times the strength."""
    repeated = [value for value in preference for _ in range(shape.preference_rank)]
    return tuple(weight * value for value in [1.0] * shape.rank + repeated)


def fold(tensors: TensorBundle, shape: Shape) -> TensorBundle:
    """The low-rank bundle that is served, with c, σ and s in B."""
    ones = torch.ones(shape.dimensions)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, (U, V, sigma, s) in sides_of(tensors).items():
        values = singular_values(sigma, s, ones.to(s), shape.preference_rank)
        pairs[module] = (V.T.contiguous(), shape.multiplier * U * values)
    return low_rank_bundle(pairs)


def sides_of(tensors: TensorBundle) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``{module: (U, V, sigma, s)}``, modules in name order.

    Raises:
        IncompatibleAdapterError: a tensor of another name, or one of the four missing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        module, _, side = name.rpartition(".")
        found.setdefault(module, {})[side] = tensors[name]
    for module, sides in found.items():
        if set(sides) != set(SIDES):
            raise IncompatibleAdapterError(
                f"Module {module!r} has the tensors {sorted(sides)}.", hint=f"Expected {', '.join(SIDES)}."
            )
    return {module: tuple(sides[side] for side in SIDES) for module, sides in found.items()}  # type: ignore[misc]


def check(tensors: TensorBundle, shape: Shape) -> None:
    """Raise `IncompatibleAdapterError` unless the tensors are a whole adapter of this shape."""
    found = sides_of(tensors)
    if not found:
        raise IncompatibleAdapterError("The adapter holds no tensors.", hint="Save it again after training.")
    for module, (U, V, sigma, s) in found.items():
        shapes = tuple(tuple(side.shape) for side in (U, V, sigma, s))
        if (
            U.ndim != 2
            or V.ndim != 2
            or (U.shape[1], V.shape[1]) != (shape.total, shape.total)
            or shapes[2:] != ((shape.rank,), (shape.scales,))
        ):
            raise IncompatibleAdapterError(
                f"Module {module!r} has {dict(zip(SIDES, shapes, strict=True))}.",
                hint=f"Expected {shape.total} columns in U and V, {shape.rank} sigma and {shape.scales} s.",
            )


def initial(
    d_in: int,
    d_out: int,
    shape: Shape,
    generator: torch.Generator,
    init: Literal["normal", "orthonormal"] = "orthonormal",
    *,
    std: float = 0.02,
) -> tuple[Float[Tensor, "d_out r"], Float[Tensor, "d_in r"], Float[Tensor, " k"], Float[Tensor, " scales"]]:
    """U, V, σ and s before training; σ = s = 0, so the model is the base for every λ.

    "normal" draws entries from N(0, std²), as the paper's ports do: the norm of ``u vᵀ`` then grows with the
    width. "orthonormal" has columns of norm 1, so σ and s∘λ are singular values and one learning rate fits
    every width; where r exceeds the width, columns have norm 1 but are not orthogonal.
    """
    U = torch.randn(d_out, shape.total, generator=generator)
    V = torch.randn(d_in, shape.total, generator=generator)
    if init == "normal":
        U, V = std * U, std * V
    else:
        U, V = map(_orthonormal, (U, V))
    return U, V, torch.zeros(shape.rank), torch.zeros(shape.scales)


def orthogonality(U: Float[Tensor, "d_out r"], V: Float[Tensor, "d_in r"]) -> Float[Tensor, ""]:
    """``‖UᵀU - I‖²_F + ‖VᵀV - I‖²_F``, AdaLoRA's penalty."""
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    return (U.T @ U - eye).square().sum() + (V.T @ V - eye).square().sum()


def _orthonormal(columns: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    d, r = columns.shape
    q, _ = torch.linalg.qr(columns[:, : min(d, r)])
    more = columns[:, d:]
    return torch.cat([q, more / more.norm(dim=0, keepdim=True)], dim=1).contiguous()
