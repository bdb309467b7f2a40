"""Digests name content and nothing else."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.errors import IncompatibleAdapterError
from persona_sdk.tensors import digest, freeze, low_rank_bundle, low_rank_pairs, size_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_digest_by_hand():
    tensor = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(b"w\0float32\0(1, 2)\0" + tensor.numpy().tobytes()).hexdigest()
    assert digest({"w": tensor}) == expected


@given(order=st.permutations(["a", "b", "c"]), dtype=st.sampled_from(DTYPES))
def test_order_views_and_strides_do_not_matter(order, dtype):
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name in order}
    strided = {name: tensors[name].T.contiguous().T for name in sorted(order)}
    assert digest(tensors) == digest(strided)


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(4)},
        {"w": torch.zeros(2, 2)},
        {"w": torch.zeros(4, dtype=torch.float64)},
        {"w": torch.tensor([0.0, 0.0, 0.0, 1e-38])},
        {"w": torch.zeros(4), "x": torch.zeros(0)},
        {},
    ],
)
def test_any_difference_changes_the_digest(other):
    assert digest({"w": torch.zeros(4)}) != digest(other)


def test_bundles_are_read_only_and_measured():
    bundle = freeze({"w": torch.zeros(3, 4, requires_grad=True)})
    assert not bundle["w"].requires_grad
    assert size_bytes(bundle) == 48
    with pytest.raises(TypeError):
        bundle["w"] = torch.ones(1)


def test_low_rank_pairs_inverts_low_rank_bundle():
    factors = {"x.y": (torch.ones(2, 3), torch.ones(5, 2)), "a": (torch.zeros(1, 1), torch.zeros(1, 1))}
    assert {m: (A.shape, B.shape) for m, A, B in low_rank_pairs(low_rank_bundle(factors))} == {
        m: (A.shape, B.shape) for m, (A, B) in factors.items()
    }


@pytest.mark.parametrize(
    "bundle",
    [
        {"m.B": torch.ones(2, 2)},
        {"m.A": torch.ones(2, 2)},
        {"m.weight": torch.ones(2, 2)},
        {"m.A": torch.ones(2, 2), "m.B": torch.ones(2, 3)},
        {"m.A": torch.ones(2), "m.B": torch.ones(2, 2)},
    ],
)
def test_broken_pairs_are_refused(bundle):
    with pytest.raises(IncompatibleAdapterError):
        list(low_rank_pairs(bundle))
