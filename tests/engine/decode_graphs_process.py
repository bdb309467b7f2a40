"""Runs in a process of its own, started by test_decode_graphs.py: Triton decides when it is imported whether
it interprets, and TRITON_INTERPRET=1 lets the real kernels run on CPUs.
"""

from persona_sdk.engine import Engine, EngineOptions
from persona_sdk.engine.low_rank.graphs import Eager
from persona_sdk.engine.low_rank.triton_indexed import kernels

from .graphs_support import on_graphs, without_compiled_loops
from .support import patch, random_factors, request
from .test_decode_graphs import run


def test_rows_that_join_leave_and_are_steered_get_the_ordinary_tokens(tiny, monkeypatch):
    assert kernels().INTERPRETED
    a, b = random_factors(tiny, 1, 3), random_factors(tiny, 2, 2)
    long = {"max_new_tokens": 5, "ignore_eos": True}
    requests = [
        request(tiny, (5, 60, 99), **long),
        request(tiny, (17,), (patch(a), patch(b)), (a, b), **long),
        request(tiny, (45, 45), (patch(b, (0.5, -1.0)),), (b,), **long),
    ]
    script = [[("submit", 0), ("submit", 1)], [], [("steer", 1), ("submit", 2)], [], [("cancel", 0)]]
    options = EngineOptions(max_rows=4, prefix_bytes=0)
    with Engine(tiny, options) as ordinary, Engine(tiny, options) as engine:
        expected = run(ordinary, requests, script)
        without_compiled_loops(monkeypatch)
        graphs = on_graphs(engine, Eager)
        assert run(engine, requests, script) == expected
        assert len(graphs) >= 3
        steered = expected[1][2]
        assert steered, "somebody was steered"
    with Engine(tiny, options) as engine:
        assert (
            run(engine, requests, [actions for actions in script if ("steer", 1) not in actions])[1]
            != (expected[1])
        ), "which makes a difference"
