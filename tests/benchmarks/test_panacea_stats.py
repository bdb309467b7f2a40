"""Statistics of the panacea benchmark against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import panacea_stats
from benchmarks.panacea_stats import (
    drawn_means,
    draws,
    excess,
    hypervolume,
    hypervolumes,
    margin_errors,
    means,
    paired,
    vertex_values,
    with_all,
    worst_rank_correlation,
)
from persona_sdk.adapters.preferences import grid

GRID = grid(2).double().numpy()
Z = np.array([-3.0, -3.0])


def mixture_front(preferences):
    """The closed form of disjoint styles, as nats above the vertices; weights are cut at 0.001."""
    return np.log(np.clip(preferences, 1e-3, 1.0))


def compare(ours, theirs, z, how="difference", n=1000):
    """Hypervolumes of two methods, paired over prompts."""
    counts = with_all(ours[0].shape[1], n)
    return paired(hypervolumes(ours, z, counts), hypervolumes(theirs, z, counts), how)


def spread(points, prompts=40, noise=0.0, seed=0):
    """Values of prompts whose means are `points`, with noise that all points share."""
    shared = np.random.default_rng(seed).normal(size=(1, prompts, points.shape[1])) * noise
    return points[:, None, :] + shared - shared.mean(axis=1, keepdims=True)


def staircase(points, z):
    """The area of a front of two dimensions, by sorting."""
    area, above = 0.0, z[1]
    for x, y in sorted(map(tuple, points), reverse=True):
        if x > z[0] and y > above:
            area += (x - z[0]) * (y - above)
            above = y
    return area


def test_the_mixture_of_two_disjoint_styles_has_717_of_9():
    assert hypervolume(mixture_front(GRID), Z) == pytest.approx(7.17, abs=0.005)
    assert hypervolume(mixture_front(GRID), Z) == pytest.approx(staircase(mixture_front(GRID), Z), abs=1e-9)


def test_so_has_calibrated_dpo_on_opposed_pairs():
    logits = np.log(np.clip(GRID[:, :1], 1e-3, None)) - np.log(np.clip(GRID[:, 1:], 1e-3, None))
    front = -np.logaddexp(0, -np.concatenate([logits, -logits], axis=1))
    assert hypervolume(front, Z) == pytest.approx(7.17, abs=0.01)


def test_from_far_away_even_one_model_for_all_preferences_has_nine_tenths():
    blind = np.full((11, 2), -math.log(2))
    shares = [hypervolume(blind, z) / hypervolume(mixture_front(GRID), z) for z in (Z, Z - 17)]
    assert shares[0] == pytest.approx(0.74, abs=0.01)
    assert shares[1] > 0.9


def test_values_at_vertices_are_those_of_the_own_dimension():
    values = np.array([[[-30.0, np.nan], [-20.0, -8.0]], [[-1.0, np.nan], [-2.0, -3.0]]])
    assert vertex_values(np.eye(2), values).tolist() == [-25.0, -3.0]
    assert vertex_values(np.eye(2)[::-1], values).tolist() == [-1.5, -8.0]


@given(seed=st.integers(0, 1000))
def test_drawn_means_are_those_of_the_drawn_prompts(seed):
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(3, 12, 2))
    values[:, draw.random(12) < 0.3, 0] = np.nan
    values[:, 0, 0] = 0.0
    counts = draws(12, 5, seed) + np.eye(12, dtype=int)[:1]
    assert (counts.sum(axis=1) == 13).all()
    for count, found in zip(counts, drawn_means(values, counts), strict=True):
        chosen = np.repeat(np.arange(12), count)
        assert np.allclose(found, np.nanmean(values[:, chosen], axis=1))
    assert np.allclose(means(values), np.nanmean(values, axis=1))


def test_draws_follow_the_seed_and_are_with_replacement():
    assert np.array_equal(draws(30, 10, 1), draws(30, 10, 1))
    assert not np.array_equal(draws(30, 10, 1), draws(30, 10, 2))
    assert draws(30).max() > 1
    assert draws(30).shape == (1000, 30)


def test_a_paired_difference_is_sharper_than_what_it_is_of():
    better, worse = mixture_front(GRID), mixture_front(GRID) - 0.1
    ours, theirs = ([spread(points, noise=1.0)] for points in (better, worse))
    found = compare(ours, theirs, Z)
    exact = hypervolume(better, Z) - hypervolume(worse, Z)
    assert found.value == pytest.approx(exact)
    assert 0 < found.low < exact < found.high
    alone = hypervolumes(ours, Z, draws(40))
    assert found.high - found.low < 0.3 * np.ptp(np.quantile(alone, [0.025, 0.975]))
    apart = compare(ours, [spread(worse, noise=1.0, seed=1)], Z)  # other noise: not paired
    assert apart.high - apart.low > 3 * (found.high - found.low)


def test_equal_methods_do_not_differ_and_have_the_ratio_1():
    runs = [spread(mixture_front(GRID), noise=0.5, seed=seed) for seed in range(3)]
    same = compare(runs, runs, Z, n=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    ratio = compare(runs, runs, Z, how="ratio", n=50)
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)


def test_seeds_are_averaged():
    runs = [spread(mixture_front(GRID) - off) for off in (0.0, 0.2)]
    apart = [hypervolume(means(values), Z) for values in runs]
    (found,) = hypervolumes(runs, Z, np.ones((1, 40), dtype=int))
    assert found == pytest.approx(np.mean(apart))


def test_a_ratio_to_nothing_is_0():
    assert paired(np.ones(4), np.zeros(4), "ratio").value == 0


def test_all_prompts_stand_before_their_draws():
    assert (with_all(5, 3)[0] == 1).all()
    assert np.array_equal(with_all(5, 3)[1:], draws(5, 3))


def test_the_worst_rank_correlation_is_the_least_of_all():
    front = mixture_front(GRID)
    assert worst_rank_correlation(GRID, [spread(front)]) == pytest.approx(1)
    turned = front.copy()
    turned[:, 1] = turned[::-1, 1]
    assert worst_rank_correlation(GRID, [spread(front), spread(turned)]) == pytest.approx(-1)
    assert worst_rank_correlation(GRID, [spread(np.zeros_like(front))]) == 0


def test_the_excess_of_the_mixture_is_minus_log_lambda():
    vertices = np.array([-10.0, -25.0])
    found = excess(GRID, spread(mixture_front(GRID) + vertices, noise=2.0))
    assert np.allclose(found, -mixture_front(GRID))
    assert found[5] == pytest.approx([math.log(2)] * 2)


@given(slope=st.floats(0.2, 2.0))
def test_margins_against_the_logit(slope):
    weights = GRID[:, 0]
    clipped = np.clip(weights, 1e-6, 1 - 1e-6)
    margins = slope * (np.log(clipped) - np.log1p(-clipped))
    found = margin_errors(weights, np.stack([margins - 1, margins + 1], axis=1))
    assert found.slope == pytest.approx(slope)
    assert np.allclose(found.relative, abs(slope - 1), atol=1e-5)
    assert len(found.weights) == 8  # neither the vertices nor the centre
    assert found.margins[list(found.weights.round(1)).index(0.7)] == pytest.approx(slope * 0.847, abs=2e-3)


def test_vertices_and_the_centre_have_no_logit_to_compare_with():
    with pytest.raises(ValueError, match="No weight"):
        margin_errors(np.array([0.0, 0.5, 1.0]), np.zeros((3, 4)))


def test_the_number_of_draws_is_as_the_issue_says():
    assert panacea_stats.DRAWS == 1000
