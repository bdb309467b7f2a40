"""The statistics: order of turns, which iterations are dropped, what the interval covers."""

import gc

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.timing import Timing, compare, interleave, kept, median_interval, paired_ratios, turn


def timing(switches: list[int] | None = None, **wall: list[float]) -> Timing:
    count = len(next(iter(wall.values())))
    return Timing(wall, {name: [0.0] * count for name in wall}, switches or [0] * count, (0.0, 0.0), 0.0)


def test_turns_alternate_forwards_and_backwards():
    assert [turn(["a", "b"], i) for i in range(4)] == [["a", "b"], ["b", "a"], ["a", "b"], ["b", "a"]]


def test_calls_take_turns_and_each_is_followed_by_its_restore():
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    interleave(calls, iterations=3, warmups=1, restore=lambda name: log.append(name.upper()))
    assert "".join(log) == "cCbBaA" + "aAbBcC" + "cCbBaA" + "aAbBcC"


def test_only_timed_iterations_are_recorded_and_the_collector_rests_meanwhile():
    collecting, inference = [], []

    def call() -> None:
        collecting.append(gc.isenabled())
        inference.append(torch.is_inference_mode_enabled())

    result = interleave({"one": call, "two": call}, iterations=5, warmups=2)
    assert len(collecting) == 2 * (5 + 2)
    assert not any(collecting)
    assert all(inference)
    assert gc.isenabled()
    assert [len(result.wall[name]) for name in ("one", "two")] == [5, 5] == [len(result.cpu["one"]), 5]
    assert len(result.switches) == 5


def test_the_collector_is_back_after_a_failing_call():
    with pytest.raises(ZeroDivisionError):
        interleave({"bad": lambda: 1 / 0}, iterations=1)
    assert gc.isenabled()


def test_disturbed_iterations_are_dropped_for_all_contenders_together():
    switches = [1] * 18 + [500, 900]
    assert kept(switches) == list(range(18))
    # The disturbed iterations would pull the ratio far off; they must not count for either side.
    disturbed = timing(switches, ours=[3.0] * 18 + [90.0, 90.0], base=[2.0] * 18 + [1.0, 1.0])
    assert paired_ratios(disturbed, "ours", "base") == [1.5] * 18
    assert compare([disturbed], "ours", "base").of_minima == 1.5  # the minimum of base was dropped too


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60))
def test_at_most_a_tenth_is_dropped_and_always_the_worst(switches):
    keep = kept(switches)
    dropped = set(range(len(switches))) - set(keep)
    assert len(dropped) <= np.ceil(len(switches) / 10)
    assert all(switches[bad] > switches[good] for bad in dropped for good in keep)


def test_a_quiet_run_drops_nothing():
    assert kept([0] * 9) == list(range(9))


def test_35_iterations_leave_the_31_of_a_claim():
    assert len(kept(list(range(35)))) == 31


@given(st.floats(0.2, 20), st.lists(st.floats(0.1, 10), min_size=9, max_size=40))
def test_noise_that_hits_both_alike_leaves_the_ratio(true, speed):
    ratio = compare([timing(ours=[true * s for s in speed], base=speed)], "ours", "base")
    assert ratio.median == pytest.approx(true)
    assert ratio.low == pytest.approx(true) == ratio.high
    assert not ratio.suspicious


def test_seeds_are_pooled():
    one, two = timing(ours=[1.0] * 9, base=[1.0] * 9), timing(ours=[3.0] * 10, base=[1.0] * 10)
    assert compare([one, two], "ours", "base").median == 3.0


def test_medians_and_minima_that_disagree_are_suspicious():
    # Both at the same pace but for one lucky iteration of the base model.
    lucky = timing(ours=[2.0] * 9, base=[2.0] * 8 + [1.0])
    ratio = compare([lucky], "ours", "base")
    assert (ratio.median, ratio.of_minima) == (1.0, 2.0)
    assert ratio.suspicious


def test_the_interval_covers_a_known_median_nineteen_times_in_twenty():
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        low, high = median_interval(1.5 * np.exp(0.2 * draw.standard_normal(35)), resamples=500)
        hits += low <= 1.5 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_the_interval_is_scipys_percentile_bootstrap():
    values = 1.5 + 0.2 * np.random.default_rng(2).standard_normal(35)
    theirs = scipy.stats.bootstrap((values,), np.median, method="percentile", n_resamples=10_000)
    assert median_interval(values) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)
    assert median_interval(values) == median_interval(values)
