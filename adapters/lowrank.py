"""Pure low-rank algebra: what can be done to ``B diag(g) A`` without ever forming a dense matrix.

    delta       ΔW = B diag(g) A                                        the only dense one, for references
    apply       Δy = B (g ∘ (A x))
    concatenate Σᵢ Bᵢ diag(gᵢ) Aᵢ = [B₁ diag(g₁), B₂ diag(g₂), ...] [A₁; A₂; ...]     exact, rank Σ rᵢ
    truncate    B = Q_B R_B,  Aᵀ = Q_A R_A,  R_B R_Aᵀ = U S Vᵀ  ->  B' = Q_B U_k √S_k,  A' = √S_k V_kᵀ Q_Aᵀ
                the best rank-k approximation (Eckart–Young); its error is the tail √(Σ_{i>k} S_i²)

    symbol  argument  shape
    A       A         [rank, d_in]
    B       B         [d_out, rank], scale folded in
    g       gate      [rank]; absent means all ones

Averaging A's and B's apart is not a merge: (ΣB)(ΣA) has cross terms that no adapter asked for.

Bundles follow `persona_sdk.tensors`. One rank holds for all modules of a bundle, because a plan part has
one gate; `pad_rank` brings mixed ranks to that form, and a module that only some inputs of `concatenate`
name gets zero blocks for the others. Spectra are computed in float64 and results returned in the dtype
of the input.

Reference: Eckart & Young 1936; concatenation as in FLoRA (Wang et al. 2024, arXiv 2409.05976).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import IncompatibleAdapterError, InvalidInputError
from persona_sdk.tensors import TensorBundle, low_rank_bundle, low_rank_pairs

# The axis is anonymous because one call may take gates of several ranks; `_gated` checks each length.
Gate: TypeAlias = Sequence[float] | Float[Tensor, " _"]


def delta(
    A: Float[Tensor, "rank d_in"], B: Float[Tensor, "d_out rank"], gate: Gate | None = None
) -> Float[Tensor, "d_out d_in"]:
    """The dense update ``B diag(gate) A``; for tests and exports, never needed to serve."""
    return _gated(B, gate) @ A


def apply(
    x: Float[Tensor, "*batch d_in"],
    A: Float[Tensor, "rank d_in"],
    B: Float[Tensor, "d_out rank"],
    gate: Gate | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """What a low-rank patch adds to a linear map's output for the input `x`."""
    return (x @ A.T) @ _gated(B, gate).T


def norm(A: Float[Tensor, "rank d_in"], B: Float[Tensor, "d_out rank"]) -> float:
    """Frobenius norm of ``B A``, from its small core."""
    return float(torch.linalg.matrix_norm(_core(A, B)[1]))


def truncate(
    A: Float[Tensor, "rank d_in"], B: Float[Tensor, "d_out rank"], rank: int
) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, "d_out k"], float]:
    """The best approximation of ``B A`` with ``k = min(rank, A's rank)``, and its Frobenius error.

    Singular values are shared evenly by both factors, which keeps them in range in half precision.
    """
    _require_rank(rank)
    q_b, core, q_a = _core(A, B)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    k, available = min(rank, A.shape[0]), min(rank, s.shape[0])
    root = s[:available].sqrt()
    new_a, new_b = A.new_zeros(k, A.shape[1]), B.new_zeros(B.shape[0], k)
    new_a[:available] = (root[:, None] * (vh[:available] @ q_a.T)).to(A)
    new_b[:, :available] = ((q_b @ u[:, :available]) * root).to(B)
    return new_a, new_b, float(s[available:].square().sum().sqrt())


def rank_of(bundle: TensorBundle) -> int:
    """The one rank of all modules of a low-rank bundle.

    Raises:
        IncompatibleAdapterError: the bundle is empty, unpaired, has rank 0, or its ranks differ.
    """
    ranks = {A.shape[0] for _, A, _ in low_rank_pairs(bundle)}
    if len(ranks) != 1 or 0 in ranks:
        found = f"ranks {sorted(ranks)}" if ranks else "no low-rank pair"
        raise IncompatibleAdapterError(
            f"The bundle has {found}.", hint="Expected one rank of at least 1; see lowrank.pad_rank."
        )
    return int(ranks.pop())


def modules_of(bundle: TensorBundle) -> tuple[str, ...]:
    """Paths of the modules a low-rank bundle updates, sorted."""
    return tuple(module for module, _, _ in low_rank_pairs(bundle))


def pad_rank(bundle: TensorBundle, rank: int | None = None) -> TensorBundle:
    """Bring every module to `rank` (the largest in the bundle if None) with zero rows and columns."""
    pairs = list(low_rank_pairs(bundle))
    largest = max((A.shape[0] for _, A, _ in pairs), default=0)
    target = largest if rank is None else rank
    if target < largest:
        raise InvalidInputError(
            f"Cannot pad rank {largest} to {target}.",
            hint="Padding only grows; use truncate_bundle to shrink.",
        )
    return low_rank_bundle({module: _padded(A, B, 0, target) for module, A, B in pairs})


def scale(bundle: TensorBundle, factor: float) -> TensorBundle:
    """Multiply the update of every module by `factor`."""
    return low_rank_bundle({module: (A, B * factor) for module, A, B in low_rank_pairs(bundle)})


def concatenate(inputs: Sequence[tuple[TensorBundle, Gate | None]]) -> TensorBundle:
    """The exact sum of gated updates, as one bundle of rank ``Σ rank_i``; gates end up in B.

    Args:
        inputs: ``(bundle, gate)`` pairs; a gate of None is all ones.

    Raises:
        InvalidInputError: no inputs.
        IncompatibleAdapterError: two inputs have different shapes for one module.
    """
    if not inputs:
        raise InvalidInputError("Nothing to concatenate.", hint="Pass at least one (bundle, gate) pair.")
    bundles = [pad_rank(bundle) for bundle, _ in inputs]
    ranks = [rank_of(bundle) for bundle in bundles]
    total, start = sum(ranks), 0
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    for bundle, rank, (_, gate) in zip(bundles, ranks, inputs, strict=True):
        for module, A, B in low_rank_pairs(bundle):
            new_a, new_b = _padded(A, _gated(B, gate), start, total)
            old_a, old_b = merged.get(module, (new_a * 0, new_b * 0))
            if old_a.shape != new_a.shape or old_b.shape != new_b.shape:
                raise IncompatibleAdapterError(
                    f"Module {module!r} is {old_b.shape[0]} x {old_a.shape[1]} in one adapter and "
                    f"{new_b.shape[0]} x {new_a.shape[1]} in another.",
                    hint="Concatenate adapters of one base model only.",
                )
            merged[module] = (old_a + new_a, old_b + new_b)
        start += rank
    return low_rank_bundle(merged)


@dataclass(frozen=True)
class Truncation:
    """A truncated bundle and what it cost.

    Args:
        bundle: the factors of the smaller rank.
        errors: absolute Frobenius error per module.
        norms: Frobenius norm of each module's update before truncation.
    """

    bundle: TensorBundle
    errors: dict[str, float]
    norms: dict[str, float]

    @property
    def error(self) -> float:
        """Frobenius error over all modules together."""
        return math.hypot(*self.errors.values())

    @property
    def relative_error(self) -> float:
        """`error` over the norm of the whole update; 0 where there was nothing to lose."""
        whole = math.hypot(*self.norms.values())
        return self.error / whole if whole else 0.0

    @property
    def relative_errors(self) -> dict[str, float]:
        """Relative error per module."""
        return {name: self.errors[name] / size if size else 0.0 for name, size in self.norms.items()}


def truncate_bundle(bundle: TensorBundle, rank: int) -> Truncation:
    """The best approximation of every module's update within `rank` directions each."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for module, A, B in low_rank_pairs(pad_rank(bundle)):
        new_a, new_b, errors[module] = truncate(A, B, rank)
        factors[module], norms[module] = (new_a, new_b), norm(A, B)
    return Truncation(low_rank_bundle(factors), errors, norms)


def _gated(B: Float[Tensor, "d_out rank"], gate: Gate | None) -> Float[Tensor, "d_out rank"]:
    if gate is None:
        return B
    vector = torch.as_tensor(gate, dtype=B.dtype, device=B.device)
    if vector.shape != B.shape[1:]:
        raise InvalidInputError(
            f"The gate has shape {tuple(vector.shape)} and the rank is {B.shape[1]}.",
            hint="The gate holds one number per rank direction.",
        )
    return B * vector


def _core(
    A: Float[Tensor, "rank d_in"], B: Float[Tensor, "d_out rank"]
) -> tuple[Float[Tensor, "d_out m"], Float[Tensor, "m n"], Float[Tensor, "d_in n"]]:
    """``B A = Q_B core Q_Aᵀ`` with orthonormal Q's; the core has the singular values of ``B A``."""
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().T)
    return q_b, r_b @ r_a.T, q_a


def _padded(
    A: Float[Tensor, "rank d_in"], B: Float[Tensor, "d_out rank"], start: int, total: int
) -> tuple[Float[Tensor, "total d_in"], Float[Tensor, "d_out total"]]:
    """Place a pair at rows ``start:start + rank`` of a pair of rank `total`."""
    rank = A.shape[0]
    wide_a, wide_b = A.new_zeros(total, A.shape[1]), B.new_zeros(B.shape[0], total)
    wide_a[start : start + rank], wide_b[:, start : start + rank] = A, B
    return wide_a, wide_b


def _require_rank(rank: int) -> None:
    if rank < 1:
        raise InvalidInputError(f"Rank {rank} is not possible.", hint="A rank is at least 1.")
