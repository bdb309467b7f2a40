"""The figure of the memory benchmark has a panel for what was measured and nothing else."""

import pytest

from benchmarks.harness import Result
from benchmarks.plots import PLOTS, png

RETRIEVERS = [
    {"retriever": "dense", "recall@10": 0.4, "R@10 from": 0.38, "to": 0.43},
    {"retriever": "ours", "recall@10": 0.7, "R@10 from": 0.68, "to": 0.72},
]
PUBLISHED = [
    {"rank of": "1 of 2", "model": "ours, small", "recall@5": 0.6, "recall@10": 0.7, "recall@50": 0.9}
]
CURVE = [
    {"memory": m, "prompt": p, "kept / computed": 0.2 + p / m / 100} for m in (64, 512) for p in (16, 64)
]
TABLES = {
    "recall: LoCoMo, eight conversations": RETRIEVERS,
    "recall: LoCoMo beside published encoders": PUBLISHED,
    "memory as keys and values: first token": CURVE,
    "recall: REALTALK": RETRIEVERS,
    "memory: storage": [{"memories": 1}],
}


def result(tables):
    return Result(name="memory", command="x", commit="0" * 40, machine={}, versions={}, tables=tables)


@pytest.mark.parametrize("count", range(4))
def test_a_panel_for_each_part(count):
    figure = PLOTS["memory"](result(dict(list(TABLES.items())[:count])))
    titled = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titled) == count
    assert all(title.split(":")[0] for title in titled)


def test_the_figure_is_drawn_the_same_twice():
    assert png(result(TABLES)) == png(result(TABLES)) != png(result({}))
