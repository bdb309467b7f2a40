"""The engine on CUDA: the same code, the same answers. Runs only where there is a device."""

import copy

import pytest
import torch

from persona_sdk.engine import Engine, EngineOptions
from persona_sdk.engine.low_rank.graphs import Captured
from persona_sdk.models import LanguageModel

from .support import merged, patch, random_factors, request, soft_prefix

pytestmark = pytest.mark.gpu
PROMPT = (5, 60, 99, 130)


def on_cuda(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    module = copy.deepcopy(model.module).to("cuda", dtype)
    return LanguageModel.from_module(model.name, module, model.tokenizer, fingerprint=model.fingerprint)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_logits_are_those_of_merged_weights_on_the_cpu(tiny, dtype, tolerance):
    engine = Engine(on_cuda(tiny, dtype))
    factors = random_factors(tiny, 1)
    [logits] = engine.logits([request(tiny, PROMPT, (patch(factors),), (factors,))])
    with torch.inference_mode():
        expected = merged(tiny, [(factors, (1.0,) * 4)]).module(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", ["batched", "segments", "dense", "triton"])
def test_every_kernel_gives_the_logits_of_merged_weights(tiny, kernel):
    engine = Engine(on_cuda(tiny, torch.float32), EngineOptions(kernel=kernel))
    factors, other = random_factors(tiny, 1), random_factors(tiny, 2)
    rows = [
        request(tiny, PROMPT, (patch(factors), patch(other, (0.5, -1.0, 0.0, 2.0))), (factors, other)),
        request(tiny, PROMPT[:2], (patch(other),), (other,)),
        request(tiny, PROMPT),
    ]
    reference = merged(tiny, [(factors, (1.0,) * 4), (other, (0.5, -1.0, 0.0, 2.0))])
    with torch.inference_mode():
        expected = reference.module(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(engine.logits(rows)[0].cpu(), expected, atol=1e-4, rtol=1e-4)


def test_rows_of_a_mixed_batch_equal_their_solo_runs(tiny):
    engine = Engine(on_cuda(tiny, torch.float32))
    factors, (soft, vectors) = random_factors(tiny, 1), soft_prefix(tiny, 2)
    rows = [
        request(tiny, PROMPT),
        request(tiny, PROMPT[:2], (patch(factors),), (factors,), do_sample=True, seed=1),
        request(tiny, PROMPT * 2, (soft,), (vectors,)),
    ]
    assert engine.generate(rows) == [engine.generate([row])[0] for row in rows]


def mixed(tiny: LanguageModel) -> list:
    """Rows with no, one and two adapters, of two arenas."""
    factors, other = random_factors(tiny, 1), random_factors(tiny, 2, 12)
    long = {"max_new_tokens": 20, "ignore_eos": True}
    return [
        request(tiny, PROMPT, **long),
        request(tiny, PROMPT[:2], (patch(factors),), (factors,), **long),
        request(tiny, PROMPT * 2, (patch(other), patch(factors)), (other, factors), **long),
    ]


def recordings(engine: Engine) -> list:
    return [recorded for _, recorded in engine._loop.graphs._graphs._steps.values()]


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_decode_steps_are_captured_and_give_the_ordinary_tokens(tiny, kernel):
    model, rows = on_cuda(tiny, torch.float32), mixed(tiny)
    with (
        Engine(model, EngineOptions(kernel=kernel, graphs=False)) as ordinary,
        Engine(model, EngineOptions(kernel=kernel)) as engine,
    ):
        expected = [done.tokens for done in ordinary.generate(rows)]
        for _ in range(2):
            assert [done.tokens for done in engine.generate(rows)] == expected
        assert [engine.generate([row])[0].tokens for row in rows] == expected
        assert ordinary._loop.graphs is None
        assert recordings(engine)
        assert all(isinstance(recorded, Captured) for recorded in recordings(engine))


def test_a_captured_step_follows_gates_and_a_pool_that_grows(tiny):
    factors = random_factors(tiny, 1)
    model, row = on_cuda(tiny, torch.float32), request(tiny, PROMPT, (patch(factors),), (factors,))
    with Engine(model, EngineOptions(kernel="triton")) as engine, engine.bench([row]) as steps:
        loop, [running] = steps.loop, steps.rows
        pool, patches = loop.table.pool, loop.table.patches
        for gate in ((1.0,) * 4, (0.0, -1.0, 0.0, 3.0), (0.0,) * 4):
            patches.steer(running.number, 0, gate)
            found = loop.graphs.logits([running.number], [running.step()]).clone()
            graphs, loop.graphs = loop.graphs, None
            expected = loop.forward_pass([running.number], [running.step()])
            loop.graphs = graphs
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            pool.give(pool.take(2 * pool.capacity))
        assert not any(layer[0].any() for layer in (*pool.keys, *pool.values))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_decode_step_waits_for_nothing_but_its_tokens(tiny, graphs):
    model = on_cuda(tiny, torch.float32)
    options = EngineOptions(kernel="triton", graphs=graphs)
    with Engine(model, options) as engine, engine.bench(mixed(tiny)) as steps:
        numbers, new = [row.number for row in steps.rows], [row.step() for row in steps.rows]
        steps.loop.forward_pass(numbers, new)  # captures, or arranges the branches
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.loop.forward_pass(numbers, new)
        finally:
            torch.cuda.set_sync_debug_mode("default")
