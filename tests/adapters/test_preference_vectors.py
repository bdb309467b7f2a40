"""Preference vectors: completed from names, drawn, and laid out as grids."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.adapters.preferences import complete, grid, sample
from persona_sdk.errors import InvalidInputError

NAMES = ("concise", "warm", "formal")


@pytest.mark.parametrize(
    ("given_weights", "present", "expected"),
    [
        ({}, None, (1 / 3, 1 / 3, 1 / 3)),
        ({"concise": 0.7, "warm": 0.3}, None, (0.7, 0.3, 0.0)),
        ({"concise": 0.5}, None, (0.5, 0.25, 0.25)),
        ({"concise": 0.5}, (0.2, 0.6, 0.2), (0.5, 0.375, 0.125)),  # the others keep their ratio
        ({"concise": 0.5}, (1.0, 0.0, 0.0), (0.5, 0.25, 0.25)),  # none to keep
        ({"concise": 1.0}, (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
        ({"concise": 0}, (0.5, 0.5, 0.0), (0.0, 1.0, 0.0)),
        ({"concise": 2, "warm": 1, "formal": 1}, None, (0.5, 0.25, 0.25)),
        ({"concise": 3, "warm": 1}, None, (0.75, 0.25, 0.0)),  # more than 1: nothing is left for the rest
    ],
)
def test_named_weights_are_kept_and_the_others_share_the_rest(given_weights, present, expected):
    assert complete(NAMES, given_weights, present) == pytest.approx(expected)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.floats(0, 100), min_size=1),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
)
def test_the_result_is_a_point_of_the_simplex_and_completing_again_keeps_it(weights, before):
    total = sum(before)
    if len(weights) == 3 and sum(weights.values()) == 0:
        return
    made = complete(NAMES, weights, [value / total for value in before])
    assert min(made) >= 0
    assert math.fsum(made) == pytest.approx(1)
    assert complete(NAMES, dict(zip(NAMES, made, strict=True))) == made  # to the bit


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"funny": 1.0}, "no preference dimension 'funny'"),
        ({"warm": -0.1}, "warm=-0.1"),
        ({"warm": math.nan}, "warm=nan"),
        ({"warm": math.inf}, "warm=inf"),
        ({"warm": True}, "warm=True"),
        ({"warm": 1e308, "concise": 1e308}, "1e[+]308"),
        ({"warm": 10**400}, "warm=1000"),
        ({"warm": "much"}, "warm='much'"),
        (dict.fromkeys(NAMES, 0.0), "no weight above 0"),
    ],
)
def test_weights_that_cannot_be_used_are_named(weights, said):
    with pytest.raises(InvalidInputError, match=said) as caught:
        complete(NAMES, weights)
    assert caught.value.hint


@given(st.integers(2, 10), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0]))
def test_drawn_vectors_are_on_the_simplex(m, seed, vertex):
    drawn = sample(50, m, np.random.default_rng(seed), vertex=vertex)
    assert drawn.shape == (50, m)
    assert float(drawn.min()) >= 0
    torch.testing.assert_close(drawn.sum(1), torch.ones(50))
    if vertex == 1.0:
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn, sample(50, m, np.random.default_rng(seed), vertex=vertex))


def test_vertices_are_drawn_as_often_as_asked_and_evenly():
    drawn = sample(20_000, 3, np.random.default_rng(0), vertex=0.2)
    ends = drawn.amax(1) == 1
    assert float(ends.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert (drawn[ends].mean(0) - 1 / 3).abs().max() < 0.03
    inner = drawn[~ends]  # Dirichlet(1, 1, 1): mean 1/3, variance 2/36
    assert (inner.mean(0) - 1 / 3).abs().max() < 0.01
    assert (inner.var(0) - 2 / 36).abs().max() < 0.003


@given(st.integers(2, 6), st.integers(1, 5))
def test_a_grid_has_every_multiple_once_and_all_vertices(m, divisions):
    points = grid(m, divisions)
    assert len(points) == math.comb(divisions + m - 1, m - 1)
    assert len({tuple(point) for point in points.tolist()}) == len(points)
    torch.testing.assert_close(points.sum(1), torch.ones(len(points)))
    assert torch.equal((points * divisions).round(), (points * divisions).round().clamp(0, divisions))
    assert (points.amax(1) == 1).sum() == m


@pytest.mark.parametrize(("m", "count"), [(2, 11), (3, 21), (4, 20), (5, 15), (10, 55)])
def test_default_grids_end_also_with_many_dimensions(m, count):
    assert len(grid(m)) == count


def test_a_grid_without_points_is_refused():
    with pytest.raises(InvalidInputError, match="0 divisions"):
        grid(2, 0)
