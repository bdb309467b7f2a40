"""Flat blocks: every factor where its layout says, zeros where it has none, and bundles that do not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persona_sdk.engine.low_rank.blocks import (
    RANK_CLASSES,
    BlockLayout,
    check_bundle,
    host_tensor,
    layout_of,
    padded_rank,
    shapes_of,
)
from persona_sdk.engine.low_rank.sites import Site, SiteModule
from persona_sdk.errors import IncompatibleAdapterError
from persona_sdk.tensors import TensorBundle, low_rank_bundle

SITES = (
    Site(0, 6, (SiteModule("q", 6, 0), SiteModule("k", 2, 6), SiteModule("v", 2, 8))),
    Site(1, 5, (SiteModule("down", 7, 0),)),
)
SHAPES = shapes_of(SITES)


def bundle(modules: tuple[str, ...], rank: int, seed: int = 0) -> TensorBundle:
    generator = torch.Generator().manual_seed(seed)
    return low_rank_bundle(
        {
            name: (
                torch.randn(rank, SHAPES[name][0], generator=generator),
                torch.randn(SHAPES[name][1], rank, generator=generator),
            )
            for name in modules
        }
    )


def unpack(layout: BlockLayout, block: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a block by the offsets alone."""
    found = {}
    for site, spans in zip(layout.sites, layout.spans, strict=True):
        for span in spans:
            A = block[span.a : span.a + layout.rank * site.d_in].view(layout.rank, site.d_in)
            B = block[span.b : span.b + layout.rank * span.module.d_out].view(layout.rank, span.module.d_out)
            found[span.module.path] = (A, B.T)
    return found


@given(
    modules=st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
    rank=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_every_factor_stands_where_the_layout_says_and_padding_is_zero(
    modules: set[str], rank: int, seed: int
) -> None:
    factors = bundle(tuple(sorted(modules)), rank, seed)
    layout = layout_of(SITES, factors, rank)
    found = unpack(layout, layout.pack(factors))
    assert set(found) == modules
    for name, (A, B) in found.items():
        assert torch.equal(A[:rank], factors[f"{name}.A"])
        assert torch.equal(B[:, :rank], factors[f"{name}.B"])
        assert not A[rank:].any()
        assert not B[:, rank:].any()
    assert sum(A.numel() + B.numel() for A, B in found.values()) == layout.size


@given(modules=st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), rank=st.integers(1, 20))
def test_spans_cover_the_block_without_overlap(modules: set[str], rank: int) -> None:
    layout = BlockLayout(rank, SITES, frozenset(modules))
    covered = torch.zeros(layout.size, dtype=torch.int64)
    for A, B in unpack(layout, covered).values():
        A += 1
        B += 1
    assert (covered == 1).all()


def test_the_as_of_a_site_stand_together() -> None:
    layout = BlockLayout(8, SITES, frozenset({"q", "v"}))
    q, v = layout.spans[0]
    assert v.a == q.a + 8 * 6
    assert q.b == v.a + 8 * 6
    assert layout.spans[1] == ()


def test_modules_a_bundle_does_not_patch_are_zero() -> None:
    layout = BlockLayout(8, SITES, frozenset({"q", "down"}))
    found = unpack(layout, layout.pack(bundle(("q",), 3)))
    assert found["q"][0].any()
    assert not any(factor.any() for factor in found["down"])


@given(st.integers(1, 1000))
def test_ranks_are_padded_to_classes(rank: int) -> None:
    padded = padded_rank(rank)
    assert padded >= rank
    assert padded in RANK_CLASSES or padded % RANK_CLASSES[-1] == 0
    assert padded < 2 * max(rank, RANK_CLASSES[0]) or padded == RANK_CLASSES[0]


def test_blocks_made_in_a_pass_can_be_overwritten_outside() -> None:
    with torch.inference_mode():
        factors = bundle(("q",), 2)
        block = layout_of(SITES, factors, 2).pack(factors)
    block.zero_()
    assert not block.is_inference()
    assert not host_tensor(3, torch.float32, pinned=False).is_inference()


def test_factors_that_are_being_trained_are_packed() -> None:
    factors = {name: tensor.requires_grad_() for name, tensor in bundle(("q",), 2).items()}
    assert not layout_of(SITES, factors, 2).pack(factors).requires_grad


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (low_rank_bundle({"x": (torch.ones(2, 6), torch.ones(6, 2))}), r"patches 'x', which this model"),
        (low_rank_bundle({"q": (torch.ones(2, 5), torch.ones(6, 2))}), r"A \(2, 5\) and B \(6, 2\) for 'q'"),
        (low_rank_bundle({"q": (torch.ones(5, 6), torch.ones(6, 5))}), r"for 'q', plan rank 4"),
        ({"q.A": torch.ones(2, 6)}, r"'q' has no B"),
        ({"q.B": torch.ones(6, 2)}, r"not part of a low-rank pair"),
        ({"prefix": torch.ones(2, 6)}, r"not part of a low-rank pair"),
        ({"q.A": torch.ones(6), "q.B": torch.ones(6, 2)}, r"A \(6,\) and B"),
        (
            {"q.A": torch.ones(2, 6, dtype=torch.int8), "q.B": torch.ones(6, 2, dtype=torch.int8)},
            r"torch.int8",
        ),
        ({}, r"patches no module"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused_by_name(factors: TensorBundle, said: str) -> None:
    with pytest.raises(IncompatibleAdapterError, match=said):
        check_bundle("d" * 64, 4, factors, SHAPES)


def test_a_bundle_that_fits_passes() -> None:
    check_bundle("d" * 64, 4, bundle(("q", "down"), 3), SHAPES)
