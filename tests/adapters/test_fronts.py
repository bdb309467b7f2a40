"""Metrics of Pareto fronts against values made by hand, inclusion-exclusion, Monte Carlo and scipy."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import KDTree

from persona_sdk.adapters.dominance import measure_hypervolume, non_dominated_points
from persona_sdk.adapters.fronts import (
    Front,
    hypervolume,
    hypervolume_estimate,
    inner_product,
    non_dominated,
    ranges,
    rank_ceilings,
    rank_correlations,
    score,
    spacing,
    sparsity,
)
from persona_sdk.errors import AdapterError, InvalidInputError


def points(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def simplex_grid(m: int, steps: int) -> torch.Tensor:
    whole = itertools.product(range(steps + 1), repeat=m)
    return points(*(row for row in whole if sum(row) == steps)) / steps


def random_front(n: int, m: int, seed: int = 0) -> torch.Tensor:
    """Points on a sphere, none of which dominates another."""
    made = torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
    return made / made.norm(dim=1, keepdim=True)


def by_inclusion_exclusion(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Σ over subsets S of (-1)^(|S|+1) times the volume that all points of S dominate."""
    above = (values - reference).clamp_min(0)
    subsets = (
        s for size in range(1, len(above) + 1) for s in itertools.combinations(range(len(above)), size)
    )
    return sum((-1) ** (len(s) + 1) * float(above[list(s)].amin(0).prod()) for s in subsets)


NUMBERS = st.integers(0, 12)  # whole numbers: ties and twins are common, sums are exact


@st.composite
def value_tables(draw, least: int = 1):
    m = draw(st.integers(2, 4))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=m, max_size=m), min_size=least, max_size=7))
    return points(*rows)


class TestHypervolume:
    def test_of_one_point_is_its_box(self):
        assert hypervolume(points((1, 1)), (0, 0)) == 1.0

    def test_of_a_staircase(self):
        assert hypervolume(points((1, 3), (2, 2), (3, 1)), (0, 0)) == 6.0

    @given(value_tables())
    def test_equals_inclusion_exclusion(self, values):
        reference = torch.full(values.shape[1:], 3.0, dtype=torch.float64)
        assert hypervolume(values, reference) == pytest.approx(by_inclusion_exclusion(values, reference))

    @pytest.mark.parametrize("m", [3, 5, 10])
    def test_equals_inclusion_exclusion_for_points_on_a_sphere(self, m):
        values, reference = random_front(11, m), torch.zeros(m, dtype=torch.float64)
        assert hypervolume(values, reference) == pytest.approx(
            by_inclusion_exclusion(values, reference), rel=1e-9
        )

    @pytest.mark.parametrize("m", [3, 5])
    def test_lies_in_the_interval_of_a_plain_monte_carlo(self, m):
        values = random_front(30, m)
        draws = torch.rand(200_000, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        share = float((draws[:, None] <= values).all(2).any(1).double().mean())
        assert hypervolume(values, [0.0] * m) == pytest.approx(share, abs=4 * math.sqrt(share / len(draws)))

    @given(value_tables(), st.randoms())
    def test_does_not_depend_on_the_order_of_points_nor_on_twins(self, values, random):
        order = list(range(len(values))) * 2
        random.shuffle(order)
        reference = [0.0] * values.shape[1]
        assert hypervolume(values[order], reference) == hypervolume(values, reference)

    @given(value_tables(), st.data())
    def test_a_dominated_point_adds_nothing_and_another_one_adds(self, values, data):
        m = values.shape[1]
        new = points(data.draw(st.lists(NUMBERS.map(lambda x: x + 1), min_size=m, max_size=m)))
        before, after = (hypervolume(v, [0.0] * m) for v in (values, torch.cat([values, new])))
        covered = bool((values >= new).all(1).any())
        assert (after == pytest.approx(before)) if covered else (after > before + 0.5)

    def test_points_that_do_not_exceed_the_reference_add_nothing(self):
        inside = points((2, 2))
        outside = points((9, 0), (0.5, 9), (1, 9), (-1, -1))  # the third only reaches it
        assert hypervolume(torch.cat([inside, outside]), (1, 1)) == hypervolume(inside, (1, 1)) == 1.0
        assert hypervolume(outside, (1, 1)) == 0.0

    @given(value_tables())
    def test_moves_and_scales_with_the_objectives(self, values):
        m = values.shape[1]
        moved = hypervolume(values * 4 - 7, [-7.0] * m)
        assert moved == pytest.approx(4**m * hypervolume(values, [0.0] * m))

    def test_half_precision_is_measured_in_double(self):
        assert hypervolume(torch.tensor([[0.5, 2.0]]), torch.zeros(2)) == 1.0

    def test_is_estimated_only_where_the_exact_one_is_out_of_reach(self):
        few, many = random_front(20, 10), random_front(65, 10)
        assert measure_hypervolume(few, [0.0] * 10)[1] is None
        assert measure_hypervolume(random_front(200, 6), [0.0] * 6)[1] is None
        value, interval = measure_hypervolume(many, [0.0] * 10)
        assert interval is not None
        assert interval[0] < value < interval[1]
        # dominated points do not count towards the limit
        assert measure_hypervolume(torch.cat([few, *[few * 0.5] * 9]), [0.0] * 10)[1] is None


class TestEstimate:
    @pytest.mark.parametrize("m", [3, 8])
    def test_its_intervals_hold_the_exact_value_about_as_often_as_they_say(self, m):
        values = random_front(20, m)
        exact = hypervolume(values, [0.0] * m)
        intervals = [hypervolume_estimate(values, [0.0] * m, seed)[1:] for seed in range(40)]
        held = sum(low <= exact <= high for low, high in intervals)
        assert stats.binomtest(held, 40, 0.95).pvalue > 0.001
        assert max(high - low for low, high in intervals) < 0.05 * exact

    def test_one_seed_gives_one_value_and_another_seed_another(self):
        values = random_front(8, 4)
        first = hypervolume_estimate(values, [0.0] * 4, 3)
        assert (
            first == hypervolume_estimate(values, [0.0] * 4, 3) != hypervolume_estimate(values, [0.0] * 4, 4)
        )

    def test_of_nothing_above_the_reference_is_nothing(self):
        assert hypervolume_estimate(random_front(5, 4), [1.0] * 4) == (0.0, 0.0, 0.0)


class TestDominance:
    @given(value_tables())
    def test_is_its_definition(self, values):
        def dominated(x):
            return any(bool((y >= x).all() and (y > x).any()) for y in values)

        assert non_dominated(values).tolist() == [not dominated(x) for x in values]

    def test_twins_both_stay_in_the_mask_and_once_among_the_points(self):
        values = points((2, 1), (1, 2), (2, 1), (0, 0))
        assert non_dominated(values).tolist() == [True, True, True, False]
        assert non_dominated_points(values).tolist() == [[1, 2], [2, 1]]


class TestSpread:
    def test_equally_spaced_points_on_a_line_have_spacing_zero(self):
        line = points(*((j, 10 - 2 * j) for j in range(6)))
        assert spacing(line) == 0.0
        assert sparsity(line) == pytest.approx((1 + 4) / 2)

    def test_sparsity_by_hand(self):
        # steps 1, 3 in the first objective and 2, 1 in the second; the last point is dominated
        assert sparsity(points((0, 3), (1, 1), (4, 0), (0, 0))) == pytest.approx((1 + 9 + 4 + 1) / (2 * 2))

    def test_sparsity_of_two_dimensions_is_the_squared_distance_along_the_front(self):
        front = random_front(15, 2)
        walked = front[front[:, 0].argsort()].diff(dim=0).square().sum(1)
        assert sparsity(front) == pytest.approx(float(walked.sum()) / (2 * 14))

    @pytest.mark.parametrize("m", [2, 3, 5, 10])
    def test_spacing_equals_scipy_nearest_neighbours(self, m):
        front = random_front(40, m)
        nearest = KDTree(front.numpy()).query(front.numpy(), k=2)[0][:, 1]
        assert spacing(front) == pytest.approx(nearest.std(), rel=1e-9)

    def test_small_distances_far_from_zero_keep_their_digits(self):
        x = torch.cumsum(torch.arange(1, 40, dtype=torch.float64), 0) * 1e-6
        front = torch.stack([1e3 + x, 1e3 - x], 1)
        nearest = 2**0.5 * 1e-6 * torch.tensor([2.0, *range(2, 40)], dtype=torch.float64)
        assert spacing(front) == pytest.approx(float(nearest.std(correction=0)), rel=1e-4)

    @given(value_tables(), st.randoms())
    def test_neither_depends_on_order_twins_or_dominated_points(self, values, random):
        order = list(range(len(values))) * 2
        random.shuffle(order)
        below = values[:1] - 1
        other = torch.cat([below, values[order]])
        assert (sparsity(other), spacing(other)) == (sparsity(values), spacing(values))

    def test_a_collapsed_front_looks_perfect_but_for_its_ranges(self):
        collapsed = points(*[(2, 2, 2)] * 5)
        assert (sparsity(collapsed), spacing(collapsed), ranges(collapsed)) == (0.0, 0.0, (0.0, 0.0, 0.0))

    def test_ranges_are_over_all_points(self):
        assert ranges(points((0, 5), (4, 4), (3, -1))) == (4.0, 6.0)


class TestFollowing:
    @pytest.mark.parametrize("m", [2, 3, 5])
    def test_rank_correlations_equal_scipy(self, m):
        preferences = simplex_grid(m, 3)
        values = random_front(len(preferences), m)
        table = stats.spearmanr(preferences.numpy(), values.numpy()).statistic[:m, m:]
        assert rank_correlations(preferences, values) == pytest.approx(tuple(np.diag(table)))

    def test_any_rising_function_of_the_weight_is_followed_perfectly(self):
        preferences = simplex_grid(3, 5)
        assert rank_correlations(preferences, preferences**3 - 4) == pytest.approx((1.0, 1.0, 1.0))
        assert rank_correlations(preferences, -preferences) == pytest.approx((-1.0, -1.0, -1.0))

    def test_a_constant_objective_follows_nothing(self):
        preferences = simplex_grid(2, 4)
        values = torch.stack([torch.full((5,), 0.3, dtype=torch.float64), preferences[:, 1]], 1)
        assert rank_correlations(preferences, values) == pytest.approx((0.0, 1.0))
        assert rank_correlations(preferences[:1], values[:1]) == (0.0, 0.0)

    @pytest.mark.parametrize(("m", "steps"), [(2, 10), (3, 5), (5, 2), (10, 2)])
    def test_the_ceiling_is_what_an_untied_follower_reaches(self, m, steps):
        preferences = simplex_grid(m, steps)
        other_weights = 1e-3 * random_front(len(preferences), m)
        reached = rank_correlations(preferences, preferences + other_weights)
        assert rank_ceilings(preferences) == pytest.approx(reached)

    def test_inner_product_is_the_mean_of_the_weighed_values(self):
        assert inner_product(points((1, 0), (0.5, 0.5)), points((3, 9), (2, 4))) == 3.0


class TestFront:
    def front(self) -> Front:
        return Front(("helpful", "harmless"), simplex_grid(2, 2), points((1, 3), (2, 2), (3, 1)))

    def test_scores_of_a_small_front(self):
        scores = score(self.front(), (0, 0))
        assert scores.as_dict() == {
            "reference": (0.0, 0.0),
            "points": 3,
            "non_dominated": 3,
            "outside": 0,
            "hypervolume": 6.0,
            "hypervolume_interval": None,
            "inner_product": pytest.approx((3 + 2 + 3) / 3),
            "sparsity": 1.0,
            "spacing": 0.0,
            "ranges": (2.0, 2.0),
            "rank_correlations": pytest.approx((1.0, 1.0)),
            "rank_ceilings": (1.0, 1.0),
        }

    def test_points_outside_of_the_reference_are_counted(self):
        assert (score(self.front(), (1, 0)).outside, score(self.front(), (1, 0)).hypervolume) == (1, 3.0)
        assert (score(self.front(), (5, 5)).outside, score(self.front(), (5, 5)).hypervolume) == (3, 0.0)

    @pytest.mark.parametrize("m", [2, 3, 5, 10])
    def test_every_number_of_dimensions_is_scored_and_survives_json(self, m):
        preferences = torch.cat([torch.eye(m), torch.full((1, m), 1 / m)])  # in float32, as callers have it
        front = Front(tuple(f"d{i}" for i in range(m)), preferences, preferences.double().sqrt())
        again = Front.from_dict(json.loads(json.dumps(front.as_dict(), allow_nan=False)))
        assert torch.equal(again.values, front.values)
        assert torch.equal(again.preferences, front.preferences)
        scores = score(again, [-0.1] * m)
        assert scores == score(front, torch.full((m,), -0.1, dtype=torch.float64))
        assert scores.rank_correlations == pytest.approx((1.0,) * m)
        json.dumps(scores.as_dict(), allow_nan=False)

    def test_keeps_copies(self):
        values = points((1, 3), (2, 2), (3, 1))
        front = Front(("a", "b"), simplex_grid(2, 2), values)
        values.zero_()
        assert score(front, (0, 0)).hypervolume == 6.0

    @pytest.mark.parametrize(
        ("names", "preferences", "values", "message"),
        [
            (("a", "a"), [[1, 0]], [[1, 1]], "different names"),
            (("a", ""), [[1, 0]], [[1, 1]], "different names"),
            (("a",), [[1]], [[1]], "two or more"),
            (("a", "b", "c"), [[1, 0]], [[1, 1]], "one column for every dimension"),
            (("a", "b"), [[1, 0], [0, 1]], [[1, 1]], "one row for every preference"),
            (("a", "b"), [[0.7, 0.7]], [[1, 1]], "not on the simplex"),
            (("a", "b"), [[1.5, -0.5]], [[1, 1]], "not on the simplex"),
            (("a", "b"), [[1, 0]], [[1, math.nan]], "NaN"),
            (("a", "b"), [[1, math.inf]], [[1, 1]], "NaN or infinity"),
            (("a", "b"), [], [], "finite"),
            (("a", "b"), [1, 0], [1, 1], "one row"),
            (("a", "b"), [[1, 0], [1]], [[1, 1], [1, 1]], "Not a front"),
            ("ab", [[1, 0]], [[1, 1]], "names is"),
            ((1, 2), [[1, 0]], [[1, 1]], "names is"),
            (("a", "b"), "text", [[1, 1]], "Not a front"),
        ],
    )
    def test_bad_fronts_are_refused(self, names, preferences, values, message):
        names = list(names) if isinstance(names, tuple) else names
        with pytest.raises(InvalidInputError, match=message):
            Front.from_dict({"names": names, "preferences": preferences, "values": values})

    @pytest.mark.parametrize("data", [None, [], {}, {"names": ["a", "b"]}, "front"])
    def test_what_is_no_front_is_refused(self, data):
        with pytest.raises(InvalidInputError, match="Expected the lists names, preferences and values"):
            Front.from_dict(data)

    @pytest.mark.parametrize("reference", [(0,), (0, 0, 0), (0, math.nan)])
    def test_a_reference_that_does_not_fit_is_refused(self, reference):
        with pytest.raises(InvalidInputError, match="one finite number for every objective"):
            hypervolume(points((1, 2)), reference)

    def test_values_that_are_not_numbers_are_refused(self):
        with pytest.raises(InvalidInputError, match="NaN"):
            hypervolume(points((1, math.nan)), (0, 0))

    def test_without_moocore_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "moocore", None)
        with pytest.raises(AdapterError, match=r"moocore\. pip install 'persona-sdk\[pareto\]'"):
            score(self.front(), (0, 0))
