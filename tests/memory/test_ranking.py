"""Age, trust, the best rows and maximal marginal relevance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from persona_sdk.memory.ranking import best, decay, mmr, weigh

few = st.integers(1, 8)


def test_decay_halves_and_stops_at_the_floor() -> None:
    ages = np.array([0.0, 30.0, 60.0, 10_000.0, -5.0, 10_000.0])
    lives = np.array([30.0, 30.0, 30.0, 30.0, 30.0, np.inf])
    np.testing.assert_allclose(decay(ages, lives, floor=0.3), [1, 0.5, 0.3, 0.3, 1, 1])


@given(arrays(float, 4, elements=st.floats(-1, 1)), arrays(float, 4, elements=st.floats(0, 1)))
def test_a_factor_never_helps(relevance: np.ndarray, factor: np.ndarray) -> None:
    weighed = weigh(relevance, factor)
    assert (weighed <= relevance).all()
    assert (np.sign(weighed) * np.sign(relevance) >= 0).all()


@given(
    arrays(np.float32, few, elements=st.sampled_from([0.0, 0.5, 1.0, -np.inf])),
    st.integers(1, 9),
)
def test_best_is_a_stable_sort(scores: np.ndarray, k: int) -> None:
    expected = [
        row for row in sorted(range(len(scores)), key=lambda r: (-scores[r], r)) if scores[row] > -np.inf
    ]
    assert best(scores, k).tolist() == expected[:k]


def greedy(scores: np.ndarray, vectors: np.ndarray, k: int, trade_off: float) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        gains = {}
        for i in set(range(len(scores))) - set(chosen):
            alike = max((vectors[i] @ vectors[j] for j in chosen), default=0.0)
            gains[i] = trade_off * scores[i] - (1 - trade_off) * alike
        chosen.append(max(gains, key=lambda i: (round(gains[i], 6), -i)))
    return chosen


@given(st.integers(0, 10**6), few, few, st.sampled_from((0.3, 0.7, 0.9)))
@settings(deadline=None)
def test_mmr_is_the_greedy_choice_against_the_chosen(seed: int, n: int, k: int, trade_off: float) -> None:
    dice = np.random.default_rng(seed)
    vectors = dice.normal(size=(n, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = dice.uniform(size=n)
    assert mmr(scores, vectors, k, trade_off=trade_off) == greedy(scores, vectors, k, trade_off)


def test_mmr_passes_over_a_copy_but_not_over_what_all_have_in_common() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6]])
    scores = np.array([1.0, 0.99, 0.9])
    assert mmr(scores, vectors, 2, trade_off=0.5) == [0, 2]
    assert mmr(scores, vectors, 2, trade_off=1.0) == [0, 1]
    # Against all candidates instead of the chosen, row 2 would have come first.
    assert mmr(scores, vectors, 1, trade_off=0.5) == [0]


@pytest.mark.parametrize("trade_off", [0.5, 1.0])
def test_mmr_of_nothing_is_nothing(trade_off: float) -> None:
    assert mmr(np.zeros(0), np.zeros((0, 3)), 4, trade_off=trade_off) == []
