"""Fusion: the equation, its invariances, and when words are heard."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from persona_sdk.memory.fusion import fuse, gated, neighbours

ALONE = np.full(5, -1)
finite = st.floats(-1, 1, width=32)
scores = arrays(np.float32, 5, elements=finite)
shares = arrays(np.float32, 5, elements=st.floats(0, 1, width=32))


def chain(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(-1, n - 1), np.append(np.arange(1, n), -1)


def by_the_formula(
    cos: np.ndarray, lexical: np.ndarray, visible: np.ndarray, weight: float, around: float, least: float
) -> list[float]:
    shown = [i for i in range(len(cos)) if visible[i]]
    low, high = min(cos[i] for i in shown), max(cos[i] for i in shown)
    span = max(high - low, least)
    f = [(cos[i] - low) / span + weight * lexical[i] for i in range(len(cos))]
    mean = sum(f[i] for i in shown) / len(shown)
    total = []
    for i in range(len(cos)):
        beside = [j for j in (i - 1, i + 1) if 0 <= j < len(cos) and visible[j]]
        total.append(low + span * (f[i] + around * sum(f[j] - mean for j in beside)))
    return total


@given(scores, shares, arrays(bool, 5), st.sampled_from((0.0, 0.7, 2.0)), st.sampled_from((0.0, 0.3)))
def test_the_sum_is_the_formula(
    cos: np.ndarray, lexical: np.ndarray, visible: np.ndarray, weight: float, around: float
) -> None:
    assume(visible.any())
    parts = fuse(
        cos, lexical, visible, *chain(5), lexical_weight=weight, neighbour_weight=around, least_span=0.3
    )
    expected = by_the_formula(cos, lexical, visible, weight, around, 0.3)
    np.testing.assert_allclose(parts.total, expected, atol=1e-4)


@given(scores, shares)
def test_none_hidden_is_all_visible(cos: np.ndarray, lexical: np.ndarray) -> None:
    one, two = (fuse(cos, lexical, visible, *chain(5)).total for visible in (None, np.ones(5, bool)))
    np.testing.assert_array_equal(one, two)


@given(scores, scores, shares)
def test_what_is_hidden_changes_nobody_elses_score(
    cos: np.ndarray, other: np.ndarray, lexical: np.ndarray
) -> None:
    visible = np.array([True, True, False, True, True])
    changed = np.where(visible, cos, other)
    totals = [fuse(of, lexical * visible, visible, *chain(5)).total[visible] for of in (cos, changed)]
    np.testing.assert_array_equal(*totals)


@given(scores)
def test_without_words_and_neighbours_a_score_is_its_cosine(cos: np.ndarray) -> None:
    np.testing.assert_array_equal(fuse(cos, np.zeros_like(cos), None, ALONE, ALONE).total, cos)


def test_words_are_heard_as_far_as_they_cover_the_query() -> None:
    bm25 = np.array([4.0, 2.0, 0.0], np.float32)
    for best in (1.0, 0.25):
        heard = gated(bm25, np.array([best, best / 2, 0.0], np.float32))
        np.testing.assert_allclose(heard, [best, best / 4, 0.0])
    assert not gated(np.zeros(3, np.float32), np.zeros(3, np.float32)).any()


def test_a_missing_neighbour_counts_as_average() -> None:
    f = np.array([1.0, 3.0, 2.0], np.float32)
    np.testing.assert_allclose(neighbours(f, *chain(3), 2.0), [1.0, -1.0, 1.0])
    alone = np.full(3, -1)
    assert not neighbours(f, alone, alone, 2.0).any()
