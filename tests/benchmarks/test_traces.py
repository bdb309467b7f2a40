"""The laws a trace is drawn from, against their own formulas and against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from benchmarks.traces import TraceConfig, distinct, gaps_between, popularity, trace

MANY = 20_000


def config(**changes) -> TraceConfig:
    return TraceConfig(**{"requests": 200, "adapters": 20, "rate": 5.0} | changes)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_are_gamma_of_the_rate_and_variation(cv):
    gaps = gaps_between(np.random.default_rng(0), MANY, rate=5.0, cv=cv)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert stats.kstest(gaps, stats.gamma(1 / cv**2, scale=cv**2 / 5.0).cdf).pvalue > 0.01


def test_variation_one_is_poisson():
    gaps = gaps_between(np.random.default_rng(1), MANY, rate=2.0, cv=1.0)
    assert stats.kstest(gaps, stats.expon(scale=0.5).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("law", "exponent", "expected"),
    [
        ("uniform", 1.5, np.full(50, 1 / 50)),
        ("power", 1.0, np.full(50, 1 / 50)),
        ("power", 2.0, np.diff((np.arange(51) / 50) ** 0.5)),
        ("zipf", 1.5, stats.zipfian(1.5, 50).pmf(np.arange(1, 51))),
    ],
)
def test_popularity_follows_its_law(law, exponent, expected):
    chosen = popularity(np.random.default_rng(2), MANY, 50, law=law, exponent=exponent)
    counts = np.bincount(chosen, minlength=50)
    assert stats.chisquare(counts, expected * MANY).pvalue > 0.01


@given(
    st.integers(1, 60),
    st.integers(1, 3000),
    st.sampled_from(["uniform", "power", "zipf"]),
    st.floats(0.1, 4),
    st.integers(0, 9),
)
def test_a_trace_is_ordered_and_within_its_bounds(requests, adapters, law, exponent, seed):
    drawn = trace(
        config(
            requests=requests,
            adapters=adapters,
            law=law,
            exponent=exponent,
            seed=seed,
            prompt=(3, 7),
            output=(2, 2),
        )
    )
    assert len(drawn) == requests
    assert all(0 <= one.adapter < adapters and 3 <= one.prompt <= 7 and one.output == 2 for one in drawn)
    times = [one.time for one in drawn]
    assert times == sorted(times)
    assert times[0] >= 0


def test_lengths_are_uniform_with_both_ends():
    drawn = trace(config(requests=MANY, prompt=(4, 8), output=(1, 3)))
    for values, low, high in (([o.prompt for o in drawn], 4, 8), ([o.output for o in drawn], 1, 3)):
        counts = np.bincount(values, minlength=high + 1)[low:]
        assert counts.sum() == MANY
        assert stats.chisquare(counts).pvalue > 0.01


def test_the_same_settings_give_the_same_trace_and_another_seed_another():
    assert trace(config()) == trace(config())
    assert trace(config()) != trace(config(seed=1))


def test_the_number_of_adapters_changes_nothing_but_the_adapters():
    few, many = trace(config(adapters=5)), trace(config(adapters=2000))
    assert [(o.time, o.prompt, o.output) for o in few] == [(o.time, o.prompt, o.output) for o in many]
    assert max(o.adapter for o in few) < 5 <= max(o.adapter for o in many)


def test_distinct_adapters_in_a_window():
    same = trace(config(adapters=1))
    assert distinct(same, 32) == 1
    assert distinct(trace(config(adapters=100_000)), 32) > 31
    assert distinct(same[:3], 32) == 1


@pytest.mark.parametrize(
    "bad",
    [{"requests": 0}, {"rate": 0.0}, {"cv": -1.0}, {"prompt": (5, 4)}, {"output": (0, 4)}, {"law": "x"}],
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        config(**bad)
