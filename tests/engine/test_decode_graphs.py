"""The engine with its decode steps recorded: the ordinary answers, few recordings, one copy a step."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from persona_sdk.engine import Engine, EngineOptions, Request
from persona_sdk.engine.decode_graphs import DecodeGraphs, decode_graphs
from persona_sdk.engine.forward.batch import RowTokens
from persona_sdk.engine.generation import Generation
from persona_sdk.engine.low_rank.graphs import Eager
from persona_sdk.engine.uploads import Staged
from persona_sdk.models import LanguageModel
from persona_sdk.testing import tiny_language_model

from .graphs_support import CPU, Strict, branches_in_torch, on_graphs, without_compiled_loops
from .support import patch, random_factors, request, soft_prefix

ROOT = Path(__file__).parents[2]
OPTIONS = EngineOptions(max_rows=4, prefill_tokens=8, prefix_bytes=0)
MODELS = {name: tiny_language_model(architecture=name) for name in ("llama", "qwen2")}


@pytest.fixture(autouse=True)
def branches() -> Iterator[None]:
    with branches_in_torch():
        yield


@pytest.fixture
def device_path(monkeypatch) -> None:
    without_compiled_loops(monkeypatch)


def kinds(model: LanguageModel) -> list[Request]:
    """Requests with no, one and several adapters, of several ranks; the last one is sampled."""
    a, b, c = (random_factors(model, seed, rank) for seed, rank in [(1, 4), (2, 12), (3, 2)])
    soft, vectors = soft_prefix(model, 4)
    long = {"max_new_tokens": 9, "ignore_eos": True}
    return [
        request(model, (5, 60, 99, 130), **long),
        request(model, (17,), (patch(a), patch(b)), (a, b), **long),
        request(model, tuple(range(200, 230)), (soft, patch(c)), (vectors, c), **long),
        request(model, (45, 45, 300), (patch(a), patch(c), patch(a, (0.5, -1.0, 0.0, 2.0))), (a, c), **long),
        request(model, (9,) * 7, (patch(b),), (b,), do_sample=True, seed=3, repetition_penalty=1.3, **long),
    ]


def run(engine: Engine, requests: list[Request], script: list[list[tuple[str, int]]]) -> list[tuple]:
    """Step the loop by hand. `script` says before every step who is submitted, steered or cancelled."""
    engine.ready()
    loop, made = engine._loop, {}
    for actions in script:
        for action, number in actions:
            if action == "submit" and number not in made:
                made[number] = Generation(requests[number], lambda: setattr(loop, "stirred", True))
                loop.enqueue(made[number])
                while loop.table.arriving(requests[number]):  # or admission depends on a thread
                    time.sleep(0.001)
            elif number in made and not made[number].done:
                if action == "cancel":
                    made[number].cancel()
                elif patches := made[number].request.plan.low_rank:
                    made[number].steer({0: [0.7 * (k % 2) for k in range(patches[0].rank)]})
        loop.step()
    while not loop.idle:
        loop.step()
    results = [generation.result(0) for _, generation in sorted(made.items())]
    return [(done.tokens, done.finish_reason, done.steers) for done in results]


actions = st.tuples(st.sampled_from(["submit", "submit", "submit", "steer", "cancel"]), st.integers(0, 4))
scripts = st.lists(st.lists(actions, max_size=3), min_size=3, max_size=12)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # one is slow
@given(script=scripts)
def test_rows_that_join_leave_and_are_steered_get_the_ordinary_tokens(name, script):
    model, tape = MODELS[name], Strict()
    requests = kinds(model)
    with Engine(model, OPTIONS) as ordinary, Engine(model, OPTIONS) as engine, ExitStack() as stack:
        expected = run(ordinary, requests, script)
        without_compiled_loops(stack.enter_context(pytest.MonkeyPatch.context()))
        graphs = on_graphs(engine, tape.record)
        assert run(engine, requests, script) == expected
        pool = engine._loop.table.pool
        assert not any(layer[0].any() for layer in (*pool.keys, *pool.values))
        assert pool.used == 0
        if any(len(tokens) > 1 for tokens, _, _ in expected):
            assert tape.recorded >= len(graphs) > 0


def test_a_worker_thread_replays_too(tiny):
    with Engine(tiny, OPTIONS) as ordinary, Engine(tiny, OPTIONS) as engine:
        graphs = on_graphs(engine, Eager)
        found = engine.generate(kinds(tiny))
        assert [done.tokens for done in found] == [done.tokens for done in ordinary.generate(kinds(tiny))]
        assert len(graphs) > 0
    assert len(graphs) == 0, "closing drops them"


@pytest.mark.usefixtures("device_path")
def test_recordings_are_bounded_whoever_comes(tiny):
    """Row buckets 1, 2, 4, widths 8, 16, 32, with and without branches; and growing room, once each."""
    tape, chance = Strict(), torch.Generator().manual_seed(0)
    bundles = [random_factors(tiny, seed, 4) for seed in range(6)]
    with Engine(tiny, OPTIONS) as engine:
        on_graphs(engine, tape.record)
        engine.generate([request(tiny, (5,), (patch(b),), (b,)) for b in bundles])  # the arena is full grown
        counts = []
        for _ in range(12):
            number = int(torch.randint(1, 5, (), generator=chance))
            rows = []
            for _ in range(number):
                own = [bundles[int(n)] for n in torch.randint(6, (2,), generator=chance)][: number % 3]
                length = int(torch.randint(1, 16, (), generator=chance))
                rows.append(request(tiny, (7,) * length, tuple(map(patch, own)), tuple(own), ignore_eos=True))
            engine.generate(rows)
            counts.append(tape.recorded)
        assert counts[-1] <= 3 * 3 * 2 + 3 * 3 + 6, "the same once more for two lanes, and what came before"
        before = tape.recorded
        engine.generate(rows)
        assert tape.recorded == before


@pytest.mark.usefixtures("device_path")
def test_a_pool_or_an_arena_that_grew_is_recorded_anew(tiny):
    tape = Strict()
    factors = [random_factors(tiny, seed, 4) for seed in range(9)]
    one = request(tiny, (5, 60), (patch(factors[0]),), (factors[0],), ignore_eos=True)
    with Engine(tiny, OPTIONS) as ordinary, Engine(tiny, OPTIONS) as engine:
        graphs = on_graphs(engine, tape.record)
        [expected] = ordinary.generate([one])
        assert engine.generate([one]) == [expected]
        once = tape.recorded
        assert engine.generate([one]) == [expected]
        assert tape.recorded == once
        pool, capacity = engine._loop.table.pool, engine._loop.table.pool.capacity
        pool.give(pool.take(2 * capacity))
        assert pool.capacity > capacity
        assert engine.generate([one]) == [expected]
        assert tape.recorded == 2 * once
        slots = engine._loop.table.tiers.stats()
        engine.generate([request(tiny, (5, 6), (patch(f),), (f,), max_new_tokens=1) for f in factors])
        assert engine._loop.table.tiers.stats() != slots
        assert engine.generate([one]) == [expected]
        assert tape.recorded == 3 * once
        assert len(graphs) == once, "the old ones are gone"


@pytest.mark.usefixtures("device_path")
def test_copies_to_the_device_are_one_a_step_and_one_per_arena_when_branches_change(tiny, monkeypatch):
    sent, real = [], Staged.send
    monkeypatch.setattr(Staged, "send", lambda staged: (sent.append(staged), real(staged)))
    first, second = random_factors(tiny, 1, 4), random_factors(tiny, 2, 12)  # of two arenas
    parts = (patch(first), patch(second))
    with Engine(tiny, OPTIONS) as engine:
        graphs = on_graphs(engine, Eager)
        rows = [request(tiny, (n + 5,), parts, (first, second)) for n in range(2)]
        with engine.bench(rows) as steps:
            steps.decode()
            for _ in range(3):
                sent.clear()
                steps.decode()
                assert len(sent) == 1
            steps.loop.table.patches.steer(steps.rows[0].number, 0, (0.5,) * 4)
            sent.clear()
            steps.decode()
            assert len(sent) == len(set(map(id, sent))) == 1 + 2
        recorded = len(graphs)
        with engine.bench(rows[:1]) as steps:
            steps.decode()
            sent.clear()
            steps.decode()
            assert len(sent) == 1
        assert len(graphs) > recorded


def graphs_of(engine: Engine, **options: object) -> DecodeGraphs:
    engine.ready()
    loop = engine._loop
    options = {"reads": lambda _: True} | options
    return DecodeGraphs(loop.forward, loop.table.pool, loop.table.patches, CPU, **options)


def test_what_does_not_fit_takes_the_ordinary_pass(tiny):
    factors = random_factors(tiny, 1)
    with (
        Engine(tiny, OPTIONS) as engine,
        engine.bench([request(tiny, (5,), (patch(factors),), (factors,))]) as steps,
    ):
        [row], slots = steps.rows, steps.rows[0].table
        graphs, step = graphs_of(engine), row.step()
        assert graphs.logits([row.number], [step]) is not None
        assert graphs.logits([row.number], [step], [0]) is not None
        others = [
            ([step], []),  # a piece of a prompt of one token
            ([RowTokens([1, 2], [0, 1], slots[:2])], [0]),
            ([RowTokens([0], [0], slots[:1], torch.zeros(1, tiny.d_model))], [0]),
        ]
        for new, wanted in others:
            assert graphs.logits([row.number], new, wanted) is None
        assert len(graphs) == 1
        # Blocks that the kernel of the branches does not read: rows without any are replayed all the same.
        plain = graphs_of(engine, reads=lambda _: False)
        assert plain.logits([row.number], [step]) is None
        assert plain.logits([row.number + 1], [step]) is not None


def test_the_result_is_that_of_the_ordinary_pass_until_the_next_one(tiny):
    with Engine(tiny, OPTIONS) as engine, engine.bench([request(tiny, (5, n)) for n in range(3)]) as steps:
        new, numbers = [row.step() for row in steps.rows], [row.number for row in steps.rows]
        graphs = graphs_of(engine, record=Strict().record)
        expected = steps.loop.forward_pass(numbers, new)
        found = graphs.logits(numbers, new)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        again = graphs.logits(numbers, new[::-1])
        torch.testing.assert_close(again, expected.flip(0), atol=1e-4, rtol=1e-4)
        assert again.data_ptr() == found.data_ptr()


def test_there_are_graphs_on_devices_only_and_where_the_pass_can_be_captured(tiny):
    with Engine(tiny, OPTIONS) as engine:
        engine.ready()
        loop = engine._loop
        assert loop.graphs is None
        table, cuda = loop.table, torch.device("cuda")
        for device, options in ((CPU, OPTIONS), (cuda, EngineOptions(graphs=False))):
            assert decode_graphs(loop.forward, table.pool, table.patches, device, options) is None
        loop.forward.capturable = False
        assert decode_graphs(loop.forward, table.pool, table.patches, cuda, OPTIONS) is None


def test_the_real_kernels_give_the_ordinary_tokens_in_the_interpreter():
    pytest.importorskip("triton")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "pytest", "tests/engine/decode_graphs_process.py"]
    command += ["-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**kept, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
