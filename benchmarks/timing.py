"""Timing on a machine that is not quiet: contenders take turns, and only ratios within a turn are trusted.

Two runs of the same code minutes apart differ by a factor of two on a shared machine, while the ratio of
two contenders timed back to back repeats to a few percent. So every iteration times all contenders, in
an order that alternates (A B C, C B A, ...), and the statistic is the median of the per-iteration ratios.

| rule     | what                                                                                         |
|----------|----------------------------------------------------------------------------------------------|
| dropped  | iterations whose involuntary context switches exceed the 90th percentile, for all contenders |
| interval | bootstrap percentile, 95 %, of the median                                                     |
| sanity   | ratio of the two minima; a median more than 20 % away from it is flagged                      |
"""

import gc
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

CLAIM = 31  # iterations below which a ratio is a smoke test, not a claim
DISAGREEMENT = 0.2


@dataclass(frozen=True)
class Timing:
    """Raw measurements, one entry an iteration. JSON-able by `dataclasses.asdict`.

    Args:
        wall: seconds of each contender.
        cpu: CPU seconds of the calling thread, likewise.
        switches: involuntary context switches, all contenders together.
        load: one-minute load average before and after.
        steal: share of the machine's CPU time that the hypervisor gave to others meanwhile.
    """

    wall: Mapping[str, list[float]]
    cpu: Mapping[str, list[float]]
    switches: list[int]
    load: tuple[float, float]
    steal: float


@dataclass(frozen=True)
class Ratio:
    """Median of per-iteration ratios with its 95 % interval, and the ratio of the minima beside it."""

    median: float
    low: float
    high: float
    of_minima: float

    @property
    def suspicious(self) -> bool:
        """Whether median and minima tell different stories, so that the run should be repeated."""
        return abs(self.median / self.of_minima - 1) > DISAGREEMENT


def turn(names: Sequence[str], iteration: int) -> list[str]:
    """Order of the contenders in one iteration: forwards in even ones, backwards in odd ones."""
    return list(names) if iteration % 2 == 0 else list(reversed(names))


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    iterations: int,
    warmups: int = 3,
    restore: Callable[[str], None] = lambda name: None,
) -> Timing:
    """Time all calls in turns. `restore` is run after each call, outside the clock.

    Garbage collection is off while the clock runs, and everything happens in inference mode.
    """
    names = list(calls)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    switches = [0] * iterations
    load, ticks = os.getloadavg()[0], _cpu_ticks()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            for iteration in range(-warmups, iterations):
                for name in turn(names, iteration):
                    switched = _involuntary_switches()
                    wall_start, cpu_start = time.perf_counter(), time.thread_time()
                    calls[name]()
                    wall_stop, cpu_stop = time.perf_counter(), time.thread_time()
                    if iteration >= 0:
                        wall[name].append(wall_stop - wall_start)
                        cpu[name].append(cpu_stop - cpu_start)
                        switches[iteration] += _involuntary_switches() - switched
                    restore(name)
    finally:
        if collecting:
            gc.enable()
    return Timing(wall, cpu, switches, (load, os.getloadavg()[0]), _steal_between(ticks, _cpu_ticks()))


def kept(switches: Sequence[int]) -> list[int]:
    """Iterations that were not disturbed: those at or below the 90th percentile of switches."""
    limit = np.quantile(switches, 0.9)
    return [iteration for iteration, count in enumerate(switches) if count <= limit]


def paired_ratios(timing: Timing, numerator: str, denominator: str) -> list[float]:
    """Per-iteration ratio of two contenders over the kept iterations."""
    above, below = timing.wall[numerator], timing.wall[denominator]
    return [above[i] / below[i] for i in kept(timing.switches)]


def compare(timings: Sequence[Timing], numerator: str, denominator: str) -> Ratio:
    """Ratio of two contenders over one or several timings (seeds) of the same cell."""
    ratios = [ratio for timing in timings for ratio in paired_ratios(timing, numerator, denominator)]
    low, high = median_interval(ratios)
    fastest = [
        min(timing.wall[name][i] for timing in timings for i in kept(timing.switches))
        for name in (numerator, denominator)
    ]
    return Ratio(float(np.median(ratios)), low, high, fastest[0] / fastest[1])


def median_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of the median; the same values always give the same interval."""
    draws = np.random.default_rng(seed).choice(np.asarray(values, float), (resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(draws, axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _involuntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _cpu_ticks() -> list[int]:
    """The first line of /proc/stat: user nice system idle iowait irq softirq steal. Empty elsewhere."""
    stat = Path("/proc/stat")
    return [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]] if stat.exists() else []


def _steal_between(before: Sequence[int], after: Sequence[int]) -> float:
    spent = [b - a for a, b in zip(before, after, strict=True)]
    total = sum(spent)
    return spent[7] / total if len(spent) == 8 and total else 0.0
