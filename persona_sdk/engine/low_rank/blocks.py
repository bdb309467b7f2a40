"""Flat blocks: all factors of one adapter in one contiguous tensor, so that a load is one copy.

    block:  | site 0: A_q A_k A_v  B_q B_k B_v | site 1: A B | ...        A [rank, d_in], B [rank, d_out]

    symbol   field                                              shape in the block
    A        block[span.a :][: rank * d_in]                     [rank, d_in]
    B        block[span.b :][: rank * d_out], transposed        [rank, d_out]

Every adapter of one `BlockLayout` has its factors at the same offsets, so a kernel finds them by slot
number alone. The A's of a site stand together: modules that share their input share one shrink. B is kept
transposed so that its rows are contiguous. Ranks are padded with zeros to the layout's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.sites import Site, SiteModule
from persona_sdk.errors import IncompatibleAdapterError
from persona_sdk.tensors import TensorBundle, low_rank_pairs

RANK_CLASSES = (8, 16, 32, 64)


def padded_rank(rank: int) -> int:
    """The smallest rank class that holds `rank`; above the largest, multiples of it."""
    top = RANK_CLASSES[-1]
    return next((size for size in RANK_CLASSES if size >= rank), -(-rank // top) * top)


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
    def places(self) -> Mapping[str, tuple[int, Span]]:
        """d_in and span of every patched module, by path."""
        return {
            span.module.path: (site.d_in, span)
            for site, spans in zip(self.sites, self.spans, strict=True)
            for span in spans
        }

    @cached_property
    def size(self) -> int:
        """Numbers in one block."""
        return self.rank * sum(d_in + span.module.d_out for d_in, span in self.places.values())

    def pack(
        self, bundle: TensorBundle, dtype: torch.dtype = torch.float32, *, pinned: bool = False
    ) -> Float[Tensor, " size"]:
        """The flat block of a bundle; zeros for modules of this layout that it does not patch.

        With `pinned` in page-locked memory.
        """
        block = host_tensor(self.size, dtype, pinned=pinned)
        if len(bundle) != 2 * len(self.places):
            block.zero_()
        with torch.no_grad():
            for path, A, B in low_rank_pairs(bundle):
                d_in, span = self.places[path]
                self._write(block, span.a, d_in, A)
                self._write(block, span.b, span.module.d_out, B.T)
        return block

    def _write(
        self, block: Float[Tensor, " size"], offset: int, width: int, factor: Float[Tensor, "r width"]
    ) -> None:
        """A factor and the zeros that pad it; together the factors of all modules cover the block."""
        rows = block[offset : offset + self.rank * width].view(self.rank, width)
        rows[: factor.shape[0]].copy_(factor)
        rows[factor.shape[0] :].zero_()


def host_tensor(size: int, dtype: torch.dtype, *, pinned: bool) -> Float[Tensor, " size"]:
    """Memory for a block, not yet written to.

    Never an inference tensor: blocks made while a pass runs are overwritten outside of one.
    """
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, pin_memory=pinned)


def layout_of(sites: Sequence[Site], bundle: TensorBundle, rank: int) -> BlockLayout:
    """The layout a bundle belongs to: its modules, and the smallest rank class that holds `rank`."""
    modules = frozenset(path for path, _, _ in low_rank_pairs(bundle))
    return BlockLayout(padded_rank(rank), tuple(sites), modules)


def shapes_of(sites: Iterable[Site]) -> Mapping[str, tuple[int, int]]:
    """``(d_in, d_out)`` of every module, by path."""
    return {module.path: (site.d_in, module.d_out) for site in sites for module in site.modules}


def check_bundle(digest: str, rank: int, bundle: TensorBundle, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `IncompatibleAdapterError` unless a bundle is pairs of factors that fit the modules they name."""
    name, empty = f"Adapter {digest[:12]!r}", True
    for module, A, B in low_rank_pairs(bundle):
        empty = False
        expected = shapes.get(module)
        if expected is None:
            raise IncompatibleAdapterError(
                f"{name} patches {module!r}, which this model does not have.",
                hint=f"Modules here look like {next(iter(shapes), 'none')!r}.",
            )
        if (A.shape[1], B.shape[0]) != expected or A.shape[0] > rank:
            raise IncompatibleAdapterError(
                f"{name} has A {tuple(A.shape)} and B {tuple(B.shape)} for {module!r}, plan rank {rank}.",
                hint=f"This model expects d_in, d_out = {expected} and a rank of at most the plan's.",
            )
        if not (A.is_floating_point() and B.is_floating_point()):
            raise IncompatibleAdapterError(
                f"{name} has A {A.dtype} and B {B.dtype} for {module!r}.",
                hint="Expected floating point factors; dequantize them first.",
            )
    if empty:
        raise IncompatibleAdapterError(
            f"{name} patches no module.", hint="Leave it out of the plan, or save it again."
        )
