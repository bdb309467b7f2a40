"""Content-addressed tensors: the only way tensors are named outside a running engine.

A *bundle* is a flat mapping from names to tensors. Its digest is the SHA-256 over name, dtype, shape and
bytes of every tensor in name order, so the same content has the same digest whatever file, device or
dictionary order it came in. Plans name tensors by digest; a `Contribution` carries them.

Low-rank bundles use one convention everywhere: ``"<module path>.A"`` with shape ``[rank, d_in]`` and
``"<module path>.B"`` with shape ``[d_out, rank]``, scale already folded into B, so that the patch adds
``B (gate * (A x))`` to the output of that module. Soft-prefix bundles hold one tensor, ``"prefix"``.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import IncompatibleAdapterError

TensorBundle: TypeAlias = Mapping[str, Tensor]
Digest: TypeAlias = str

PREFIX = "prefix"


class LazyBundle(Mapping[str, Tensor]):
    """A bundle that is made or read from a store when somebody asks for a tensor of it.

    Args:
        read: gives the whole bundle; called at every access, so it may keep what it gave or not.
    """

    def __init__(self, read: Callable[[], TensorBundle]) -> None:
        self.read = read

    def __getitem__(self, name: str) -> Tensor:
        return self.read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __len__(self) -> int:
        return len(self.read())


def present(bundle: Any) -> TensorBundle:
    """The bundle itself, or what a lazy one reads now.

    The argument is `Any`, as a runtime check of its type would read a lazy bundle, and hide why that fails.
    """
    found: TensorBundle = present(bundle.read()) if isinstance(bundle, LazyBundle) else bundle
    return found


def freeze(tensors: Mapping[str, Tensor]) -> TensorBundle:
    """Return a read-only bundle of detached, contiguous tensors."""
    return MappingProxyType({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def digest(bundle: TensorBundle) -> Digest:
    """SHA-256 (hex) of a bundle's content, independent of device and dictionary order."""
    sha = hashlib.sha256()
    for name in sorted(bundle):
        tensor = bundle[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def size_bytes(bundle: TensorBundle) -> int:
    """Bytes held by all tensors of a bundle."""
    return sum(tensor.numel() * tensor.element_size() for tensor in bundle.values())


def low_rank_bundle(
    factors: Mapping[str, tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r2"]]],
) -> TensorBundle:
    """Pack ``{module: (A, B)}`` into a bundle. Inverse of `low_rank_pairs`."""
    packed: dict[str, Tensor] = {}
    for module, (A, B) in factors.items():
        packed[f"{module}.A"], packed[f"{module}.B"] = A, B
    return freeze(packed)


def low_rank_pairs(
    bundle: TensorBundle,
) -> Iterator[tuple[str, Float[Tensor, "r d_in"], Float[Tensor, "d_out r2"]]]:
    """Yield ``(module, A, B)`` of a low-rank bundle in name order.

    Raises:
        IncompatibleAdapterError: a factor lacks its partner, or their ranks differ.
    """
    for name in sorted(bundle):
        if not name.endswith(".A"):
            if not name.endswith(".B") or f"{name[:-2]}.A" not in bundle:
                raise IncompatibleAdapterError(
                    f"Tensor {name!r} is not part of a low-rank pair.",
                    hint="Expected '<module>.A' [rank, d_in] with '<module>.B' [d_out, rank].",
                )
            continue
        module, A, B = name[:-2], bundle[name], bundle.get(f"{name[:-2]}.B")
        if B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            found = "no B" if B is None else f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise IncompatibleAdapterError(
                f"Module {module!r} has {found}.", hint="Expected A [rank, d_in] and B [d_out, rank]."
            )
        yield module, A, B
