"""Low-rank algebra against dense references."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_sdk.adapters import lowrank
from persona_sdk.errors import IncompatibleAdapterError, InvalidInputError
from persona_sdk.tensors import TensorBundle, low_rank_bundle, low_rank_pairs

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**16)
FAST = settings(deadline=None, max_examples=40)


def factors(d_out: int, d_in: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, d_in, generator=generator, dtype=torch.float64),
        torch.randn(d_out, rank, generator=generator, dtype=torch.float64),
    )


def dense(bundle: TensorBundle) -> dict[str, Tensor]:
    return {module: B @ A for module, A, B in low_rank_pairs(bundle)}


@FAST
@given(SIZES, SIZES, SIZES, SEEDS)
def test_apply_and_norm_agree_with_the_dense_update(d_out: int, d_in: int, rank: int, seed: int) -> None:
    A, B = factors(d_out, d_in, rank, seed)
    gate = torch.linspace(-1, 2, rank, dtype=torch.float64)
    x = torch.randn(2, 3, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    reference = B @ torch.diag(gate) @ A
    torch.testing.assert_close(lowrank.delta(A, B, gate), reference)
    torch.testing.assert_close(lowrank.apply(x, A, B, gate.tolist()), x @ reference.T)
    assert lowrank.norm(A, B) == pytest.approx(float(torch.linalg.matrix_norm(B @ A)), rel=1e-10)


@FAST
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from(["ab", "a", "b"]), st.booleans()), min_size=1, max_size=4
    ),
    SEEDS,
)
def test_concatenation_is_the_exact_sum(shape: list[tuple[int, str, bool]], seed: int) -> None:
    sizes = {"a": (6, 4), "b": (3, 7)}
    inputs, expected = [], {}
    for number, (rank, modules, gated) in enumerate(shape):
        pairs = {m: factors(*sizes[m], rank, seed + 10 * number + i) for i, m in enumerate(modules)}
        gate = (
            torch.randn(rank, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
            if gated
            else None
        )
        inputs.append((low_rank_bundle(pairs), gate))
        for module, (A, B) in pairs.items():
            expected[module] = expected.get(module, 0) + lowrank.delta(A, B, gate)
    merged = lowrank.concatenate(inputs)
    assert lowrank.rank_of(merged) == sum(rank for rank, _, _ in shape)
    assert dense(merged).keys() == expected.keys()
    for module, value in dense(merged).items():
        torch.testing.assert_close(value, expected[module], rtol=1e-12, atol=1e-12)


def test_a_truncated_merge_is_the_dense_mean_and_averaging_factors_is_not() -> None:
    (A1, B1), (A2, B2) = factors(8, 6, 2, 1), factors(8, 6, 2, 2)
    mean = (B1 @ A1 + B2 @ A2) / 2
    merged = lowrank.concatenate(
        [(low_rank_bundle({"m": (A1, B1)}), [0.5, 0.5]), (low_rank_bundle({"m": (A2, B2)}), [0.5, 0.5])]
    )
    small = lowrank.truncate_bundle(merged, 4).bundle
    torch.testing.assert_close(dense(merged)["m"], mean)
    torch.testing.assert_close(dense(small)["m"], mean)
    averaged = ((B1 + B2) / 2) @ ((A1 + A2) / 2)
    assert float(torch.linalg.matrix_norm(averaged - mean)) > 0.3 * float(torch.linalg.matrix_norm(mean))


@FAST
@given(SIZES, SIZES, SIZES, st.integers(1, 9), SEEDS)
def test_truncation_error_is_the_tail_of_the_spectrum(
    d_out: int, d_in: int, rank: int, keep: int, seed: int
) -> None:
    A, B = factors(d_out, d_in, rank, seed)
    new_a, new_b, error = lowrank.truncate(A, B, keep)
    spectrum = scipy.linalg.svdvals((B @ A).numpy())
    scale = spectrum[0]
    assert new_a.shape == (min(keep, rank), d_in)
    assert new_b.shape == (d_out, min(keep, rank))
    assert error == pytest.approx(float((spectrum[keep:] ** 2).sum() ** 0.5), abs=1e-9 * scale)
    assert float(torch.linalg.matrix_norm(B @ A - new_b @ new_a)) == pytest.approx(error, abs=1e-9 * scale)


@FAST
@given(st.integers(1, 3), SEEDS)
def test_no_other_approximation_of_that_rank_is_nearer(keep: int, seed: int) -> None:
    A, B = factors(7, 6, 5, seed)
    target = B @ A
    new_a, _, error = lowrank.truncate(A, B, keep)
    generator = torch.Generator().manual_seed(seed + 1)
    for step in (1e-3, 0.1, 1.0):
        other_a = new_a + step * torch.randn(new_a.shape, generator=generator, dtype=torch.float64)
        # the best B for that A, so the rival is as strong as it can be
        other_b = target @ torch.linalg.pinv(other_a)
        assert float(torch.linalg.matrix_norm(target - other_b @ other_a)) >= error - 1e-9


def test_truncation_beyond_the_true_rank_loses_nothing() -> None:
    A, B = factors(9, 8, 3, 0)
    doubled = lowrank.concatenate(
        [(low_rank_bundle({"m": (A, B)}), None), (low_rank_bundle({"m": (A, B)}), None)]
    )
    result = lowrank.truncate_bundle(doubled, 3)
    assert result.relative_error < 1e-12
    assert lowrank.rank_of(result.bundle) == 3
    torch.testing.assert_close(dense(result.bundle)["m"], 2 * (B @ A))


def test_reported_errors_add_up_over_modules() -> None:
    bundle = low_rank_bundle(
        {"a": factors(5, 5, 4, 0), "b": factors(6, 3, 4, 1), "zero": (torch.zeros(4, 3), torch.zeros(2, 4))}
    )
    result = lowrank.truncate_bundle(bundle, 2)
    before, after = dense(bundle), dense(result.bundle)
    whole = sum(float((before[m].double() - after[m].double()).square().sum()) for m in before) ** 0.5
    size = sum(float(before[m].double().square().sum()) for m in before) ** 0.5
    assert result.error == pytest.approx(whole, rel=1e-9)
    assert result.relative_error == pytest.approx(whole / size, rel=1e-9)
    assert result.relative_errors["zero"] == 0.0
    assert (
        lowrank.truncate_bundle(
            low_rank_bundle({"z": (torch.zeros(2, 3), torch.zeros(4, 2))}), 1
        ).relative_error
        == 0.0
    )


@FAST
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_padding_changes_the_rank_and_nothing_else(first: int, second: int, extra: int) -> None:
    bundle = low_rank_bundle({"a": factors(5, 4, first, 0), "b": factors(3, 6, second, 1)})
    padded = lowrank.pad_rank(bundle, max(first, second) + extra)
    assert lowrank.rank_of(padded) == max(first, second) + extra
    assert lowrank.rank_of(lowrank.pad_rank(bundle)) == max(first, second)
    for module, value in dense(padded).items():
        torch.testing.assert_close(value, dense(bundle)[module])


def test_results_keep_the_dtype_and_the_input_is_untouched() -> None:
    A, B = (t.float() for t in factors(5, 4, 3, 0))
    before = (A.clone(), B.clone())
    bundle = low_rank_bundle({"m": (A, B)})
    results = [
        lowrank.concatenate([(bundle, [0.5] * 3)]),
        lowrank.truncate_bundle(bundle, 2).bundle,
        lowrank.scale(bundle, 3),
    ]
    assert all(t.dtype == torch.float32 for result in results for t in result.values())
    torch.testing.assert_close(dense(results[2])["m"], 3 * (B @ A))
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])


def test_misuse_is_refused_by_name() -> None:
    bundle = low_rank_bundle({"m": factors(5, 4, 3, 0)})
    other = low_rank_bundle({"m": factors(6, 4, 3, 0)})
    with pytest.raises(InvalidInputError, match="Nothing to concatenate"):
        lowrank.concatenate([])
    with pytest.raises(IncompatibleAdapterError, match=r"5 x 4 in one adapter and 6 x 4"):
        lowrank.concatenate([(bundle, None), (other, None)])
    with pytest.raises(InvalidInputError, match="rank is 3"):
        lowrank.concatenate([(bundle, [1.0])])
    with pytest.raises(InvalidInputError, match="Cannot pad rank 3 to 2"):
        lowrank.pad_rank(bundle, 2)
    with pytest.raises(InvalidInputError, match="Rank 0"):
        lowrank.truncate_bundle(bundle, 0)
    with pytest.raises(IncompatibleAdapterError, match="no low-rank pair"):
        lowrank.rank_of({})
    with pytest.raises(IncompatibleAdapterError, match=r"ranks \[2, 3\]"):
        lowrank.rank_of(low_rank_bundle({"a": factors(2, 2, 2, 0), "b": factors(2, 2, 3, 0)}))
