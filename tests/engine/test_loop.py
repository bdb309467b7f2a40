"""One loop for everybody: any arrival order, leaving, steering, reuse, and every fault stays with its row."""

import asyncio
import gc
import threading
import time
from collections import UserDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.engine import Engine, EngineOptions, Request
from persona_sdk.engine.prefix.keys import composition_key
from persona_sdk.errors import (
    BudgetError,
    CompositionError,
    CorruptBlobError,
    DeviceMemoryError,
    EngineError,
    EngineStoppedError,
    IncompatibleAdapterError,
    NumericalError,
    QueueFullError,
)
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, DecodingRule, KVPrefix
from persona_sdk.tensors import digest, freeze, low_rank_bundle, low_rank_pairs, size_bytes

from .support import patch, random_factors, request, soft_prefix

PROMPTS = [(5, 60, 99, 130), (17,), tuple(range(200, 240)), (45, 45, 300)]


@pytest.fixture(scope="module")
def engine(tiny: LanguageModel):
    with Engine(tiny, EngineOptions(max_rows=3, prefill_tokens=8)) as engine:
        yield engine


@pytest.fixture(scope="module")
def solo(tiny: LanguageModel):
    """An engine of one row that keeps nothing: what a request gets alone."""
    with Engine(tiny, EngineOptions(max_rows=1, prefill_tokens=512, prefix_bytes=0)) as engine:
        yield engine


def kinds(tiny: LanguageModel) -> list[Request]:
    """One request of every composition there is."""
    a, b, c = (random_factors(tiny, seed, rank) for seed, rank in [(1, 4), (2, 8), (3, 2)])
    soft, vectors = soft_prefix(tiny, 4)
    other, more = soft_prefix(tiny, 5, length=7)
    rule = DecodingRule(bias=((7, 4.0), (9, -float("inf"))), origin="ban")
    long = {"max_new_tokens": 20, "ignore_eos": True}
    return [
        request(tiny, PROMPTS[0]),
        request(tiny, PROMPTS[1], (patch(a), patch(b)), (a, b), **long),
        request(tiny, PROMPTS[2], (soft, patch(c), rule), (vectors, c), do_sample=True, seed=3),
        request(tiny, PROMPTS[3], (soft, other), (vectors, more), do_sample=True, temperature=3.0, top_k=0),
        request(tiny, PROMPTS[0], (patch(c, (0.5, -1.0)),), (c,), do_sample=True, top_p=0.7, **long),
        request(tiny, PROMPTS[2], (patch(a, (0.3,) * 4),), (a,), repetition_penalty=1.4),
    ]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_row_gets_what_it_gets_alone_whatever_arrives_and_leaves_when(engine, solo, tiny, data):
    choices = kinds(tiny)
    requests = []
    for _ in range(data.draw(st.integers(2, 9))):
        chosen = data.draw(st.sampled_from(choices))
        options = chosen.plan.options.model_copy(
            update={
                "max_new_tokens": data.draw(st.integers(1, 15)),
                "temperature": data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            }
        )
        requests.append(
            replace(
                chosen,
                plan=replace(chosen.plan, options=options),
                seed=data.draw(st.integers(0, 5)),
                scope=(data.draw(st.sampled_from("xyz")),),
                keep_prefix=data.draw(st.booleans()),
            )
        )
    generations = []
    for each in requests:
        generations.append(engine.submit(each))
        action = data.draw(st.sampled_from(["go on", "wait", "cancel one"]))
        if action == "wait":
            next(iter(generations[-1].tokens), None)
            time.sleep(0.002)
        elif action == "cancel one":
            data.draw(st.sampled_from(generations)).cancel()
    for generation, each in zip(generations, requests, strict=True):
        completion = generation.result(60)
        [alone] = solo.generate([replace(each, keep_prefix=False)])
        if completion.finish_reason == "cancelled":
            assert completion.tokens == alone.tokens[: len(completion.tokens)]
        else:
            assert (completion.tokens, completion.finish_reason) == (alone.tokens, alone.finish_reason)


def nothing_is_held(engine: Engine) -> bool:
    loop = engine._loop
    return loop is None or (loop.idle and loop.table.pool.used == 0 and loop.table.tiers.stats().held == 0)


def test_everything_is_given_back(engine, tiny):
    engine.generate(kinds(tiny))
    assert nothing_is_held(engine)


@pytest.mark.parametrize("stage", ["waiting", "prefill", "decode"])
def test_cancelling_frees_everything_at_every_stage(tiny, stage):
    with Engine(tiny, EngineOptions(max_rows=1, prefill_tokens=1)) as engine:
        long = request(tiny, tuple(range(100, 300)), max_new_tokens=200, ignore_eos=True)
        first = engine.submit(long)
        generation = engine.submit(request(tiny, PROMPTS[0])) if stage == "waiting" else first
        if stage == "prefill":
            while generation.admitted is None:
                time.sleep(0.001)
        elif stage == "decode":
            next(iter(generation))  # leaving the iterator cancels, too
        generation.cancel()
        completion = generation.result(10)
        assert completion.finish_reason == "cancelled"
        assert len(completion.tokens) < 200
        first.cancel()
        first.result(10)
        assert nothing_is_held(engine)


def test_dropping_a_stream_ends_its_rows(engine, tiny):
    long = request(tiny, PROMPTS[0], max_new_tokens=400, ignore_eos=True)
    stream = engine.stream([long, long])
    next(stream)
    del stream
    gc.collect()
    until = time.monotonic() + 10
    while not nothing_is_held(engine) and time.monotonic() < until:
        time.sleep(0.01)
    assert nothing_is_held(engine)


def test_a_long_prompt_is_computed_in_chunks_between_the_tokens_of_others(tiny):
    with Engine(tiny, EngineOptions(prefill_tokens=4)) as engine:
        running = engine.submit(request(tiny, PROMPTS[0], max_new_tokens=300, ignore_eos=True))
        while len(running.tokens) < 3:
            time.sleep(0.001)
        at = len(running.tokens)
        late = engine.submit(request(tiny, tuple(range(100, 300)), max_new_tokens=1))
        late.result(30)
        # 200 tokens in chunks of 4: the others made about 50 tokens meanwhile, not one.
        assert len(running.tokens) - at >= 40
        running.cancel()


def test_async_tokens_and_results_come_from_the_same_loop(engine, solo, tiny):
    requests = kinds(tiny)[:3]

    async def all_of_them() -> list[tuple[int, ...]]:
        async def read(each: Request) -> tuple[int, ...]:
            return tuple([token async for token in engine.submit(each)])

        return list(await asyncio.gather(*map(read, requests)))

    assert asyncio.run(all_of_them()) == [completion.tokens for completion in solo.generate(requests)]


def test_cancelling_the_waiting_task_cancels_the_row(engine, tiny):
    async def run() -> str:
        generation = engine.submit(request(tiny, PROMPTS[0], max_new_tokens=400, ignore_eos=True))
        task = asyncio.create_task(generation.aresult())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return generation.result(10).finish_reason

    assert asyncio.run(run()) == "cancelled"


class TestSteering:
    def test_a_new_gate_holds_from_the_next_token_on(self, engine, solo, tiny):
        factors = random_factors(tiny, 1, scale=0.6)
        options = {"max_new_tokens": 400, "ignore_eos": True}
        weak = request(tiny, PROMPTS[0], (patch(factors, (0.0,) * 4),), (factors,), **options)
        generation = engine.submit(weak)
        for index, _ in enumerate(generation):
            if index == 5:
                generation.steer({0: (1.0,) * 4})
        completion = generation.result(10)
        [steer] = completion.steers
        assert steer.gates == {0: (1.0,) * 4}
        assert 5 <= steer.token < 400
        [unsteered] = solo.generate([weak])
        assert completion.tokens[: steer.token] == unsteered.tokens[: steer.token]
        assert completion.tokens != unsteered.tokens
        # The same by hand: keys and values up to there under the old gate, everything after under the new.
        with solo.reserved([replace(weak, keep_prefix=False)]) as (loop, [row]):
            while row.remaining:
                logits = loop.forward_pass([row.number], [row.chunk(row.remaining)])
                row.past += row.remaining
            for token in completion.tokens:
                if len(row.tokens) == steer.token:
                    loop.table.patches.steer(row.number, 0, (1.0,) * 4)
                if row.tokens:
                    logits = loop.forward_pass([row.number], [row.step()])
                    row.past += 1
                assert int(logits.argmax()) == token
                row.tokens.append(token)

    def test_a_steer_before_the_first_token_waits_for_the_prompt(self, tiny):
        factors = random_factors(tiny, 1, scale=0.6)
        options = {"max_new_tokens": 20, "ignore_eos": True}
        row = request(tiny, tuple(range(100, 150)), (patch(factors),), (factors,), **options)
        with Engine(tiny, EngineOptions(prefill_tokens=7)) as engine:
            completions = []
            for _ in range(2):  # with a cold and with a warm prefix cache
                generation = engine.submit(row)
                generation.steer({0: (-1.0,) * 4})
                completions.append(generation.result(10))
        assert completions[0].steers[0].token >= 1
        assert {c.steers[0].token for c in completions} == {1}
        assert completions[0].tokens == completions[1].tokens

    def test_neighbours_and_shared_factors_do_not_notice(self, engine, solo, tiny):
        factors = random_factors(tiny, 2)
        row = request(tiny, PROMPTS[0], (patch(factors),), (factors,), max_new_tokens=40, ignore_eos=True)
        steered, neighbour = engine.submit(row), engine.submit(row)
        steered.steer({0: (-1.0,) * 4})
        assert neighbour.result(10).tokens == solo.generate([row])[0].tokens
        steered.result(10)

    @pytest.mark.parametrize("gates", [{1: (1.0,) * 4}, {0: (1.0,)}, {0: (float("nan"),) * 4}])
    def test_gates_that_cannot_be(self, engine, tiny, gates):
        factors = random_factors(tiny, 1)
        generation = engine.submit(request(tiny, PROMPTS[0], (patch(factors),), (factors,)))
        with pytest.raises(CompositionError):
            generation.steer(gates)

    def test_a_complete_reply(self, engine, tiny):
        factors = random_factors(tiny, 1)
        generation = engine.submit(request(tiny, PROMPTS[0], (patch(factors),), (factors,)))
        generation.result(10)
        with pytest.raises(EngineError, match="complete"):
            generation.steer({0: (1.0,) * 4})


class TestKeptPrefixes:
    def test_a_second_request_reuses_the_first_ones_keys_and_values(self, tiny, solo):
        factors = random_factors(tiny, 1)
        row = request(tiny, tuple(range(100, 150)), (patch(factors),), (factors,))
        longer = replace(row, prompt=(*row.prompt, 7, 8, 9))
        with Engine(tiny) as engine:
            first, second, third = (engine.generate([each])[0] for each in (row, row, longer))
        assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 48, 48)
        assert first.tokens == second.tokens == solo.generate([row])[0].tokens
        assert third.tokens == solo.generate([longer])[0].tokens

    def test_another_composition_reuses_nothing(self, tiny):
        factors, other = random_factors(tiny, 1), random_factors(tiny, 2)
        prompt = tuple(range(100, 150))
        with Engine(tiny) as engine:
            engine.generate([request(tiny, prompt, (patch(factors),), (factors,))])
            for parts, bundles in [
                ((), ()),
                ((patch(other),), (other,)),
                ((patch(factors, (1.0, 1.0, 1.0, 0.5)),), (factors,)),
                ((patch(factors), patch(other)), (factors, other)),
            ]:
                assert engine.generate([request(tiny, prompt, parts, bundles)])[0].cached_tokens == 0

    def test_forgetting_a_scope_drops_what_was_kept_for_it(self, tiny):
        row = replace(request(tiny, tuple(range(100, 150))), scope=("alice", "nurses"))
        with Engine(tiny) as engine:
            engine.generate([row])
            engine.forget("nurses")
            assert engine.generate([row])[0].cached_tokens == 0
            engine.forget("bob")
            assert engine.generate([row])[0].cached_tokens == 48

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_kv_prefix_stands_for_the_tokens_it_was_computed_from(self, tiny, solo, fused):
        factors = random_factors(tiny, 1)
        row = request(tiny, tuple(range(100, 130)), (patch(factors),), (factors,))
        head, tail = replace(row, prompt=row.prompt[:20]), replace(row, prompt=row.prompt[20:])
        with Engine(tiny, EngineOptions(fused=fused)) as engine:
            bundle = freeze(engine.keys_values(head))
            under = composition_key(row.plan)
            part = KVPrefix(cache=digest(bundle), length=20, origin="notes", composition=under)
            plan = replace(tail.plan, parts=(*tail.plan.parts, part))
            short = replace(tail, plan=plan, tensors={**tail.tensors, part.cache: bundle})
            assert engine.generate([short])[0].tokens == solo.generate([row])[0].tokens


class TestFaults:
    def fine(self, engine: Engine, tiny: LanguageModel, solo: Engine) -> None:
        """Everybody else is served as ever, and nothing is held."""
        rows = kinds(tiny)
        assert [c.tokens for c in engine.generate(rows)] == [c.tokens for c in solo.generate(rows)]
        assert nothing_is_held(engine)

    def test_a_full_queue(self, tiny):
        with Engine(tiny, EngineOptions(max_rows=1, queue_limit=2)) as engine:
            row = request(tiny, PROMPTS[0], max_new_tokens=300, ignore_eos=True)
            generations = [engine.submit(row)]
            while generations[0].admitted is None:
                time.sleep(0.001)
            generations += [engine.submit(row), engine.submit(row)]
            with pytest.raises(QueueFullError) as caught:
                engine.submit(row)
            assert caught.value.retryable
            for generation in generations:
                generation.cancel()

    def test_a_request_larger_than_the_budget(self, tiny, solo):
        with Engine(tiny, EngineOptions(kv_bytes=40_000)) as engine:
            [huge, small] = engine.generate(
                [request(tiny, PROMPTS[0], max_new_tokens=400), request(tiny, PROMPTS[0])]
            )
            assert isinstance(huge.error, BudgetError)
            assert small.tokens == solo.generate([request(tiny, PROMPTS[0])])[0].tokens

    def test_requests_that_fit_only_one_after_another_all_run(self, tiny, solo):
        rows = [request(tiny, PROMPTS[0], max_new_tokens=100, ignore_eos=True, seed=n) for n in range(5)]
        with Engine(tiny, EngineOptions(kv_bytes=130 * 2 * 2 * 2 * 8 * 4)) as engine:
            alone = [solo.generate([row])[0].tokens for row in rows]
            assert [completion.tokens for completion in engine.generate(rows)] == alone

    def test_idle_adapters_make_room_and_what_can_never_fit_together_is_told_so(self, tiny, solo):
        small = [random_factors(tiny, seed, 8) for seed in range(6)]
        large = [random_factors(tiny, seed, 16) for seed in (7, 8)]
        block = size_bytes(small[0])
        with Engine(tiny, EngineOptions(device_bytes=4 * block, prefix_bytes=0)) as engine:
            for factors in small:  # fill the device with idle adapters of one layout
                engine.generate([request(tiny, PROMPTS[0], (patch(factors),), (factors,))])
            both = request(tiny, PROMPTS[0], (patch(small[5]), patch(large[0])), (small[5], large[0]))
            assert engine.submit(both).result(20).tokens == solo.generate([both])[0].tokens
            bundles = (*large, small[0])
            never = request(tiny, PROMPTS[0], tuple(map(patch, bundles)), bundles)
            assert isinstance(engine.submit(never).result(20).error, BudgetError)
            assert engine.submit(both).result(20).error is None

    def test_a_kv_prefix_of_another_shape_fails_its_row_alone(self, engine, solo, tiny):
        plan = CompositionPlan(tiny.fingerprint)
        bundle = freeze({"keys": torch.zeros(1, 4, 2, 8), "values": torch.zeros(1, 4, 2, 8)})
        part = KVPrefix(cache=digest(bundle), length=4, origin="odd", composition=composition_key(plan))
        failed, plain = engine.generate(
            [request(tiny, PROMPTS[0], (part,), (bundle,)), request(tiny, PROMPTS[0])]
        )
        assert isinstance(failed.error, IncompatibleAdapterError)
        assert plain.tokens == solo.generate([request(tiny, PROMPTS[0])])[0].tokens
        self.fine(engine, tiny, solo)

    def test_more_rows_than_there_are(self, engine, tiny):
        with pytest.raises(DeviceMemoryError, match="room for 3 of 4 rows"):
            engine.logits([request(tiny, PROMPTS[0])] * 4)
        assert nothing_is_held(engine)

    def test_an_adapter_that_cannot_be_read_at_admission(self, engine, solo, tiny):
        class Broken(UserDict):
            def __getitem__(self, key):
                raise CorruptBlobError("The blob does not match its hash.", hint="Restore the store.")

        factors = random_factors(tiny, 9)
        row = request(tiny, PROMPTS[0], (patch(factors),), (factors,))
        object.__setattr__(row, "tensors", Broken({digest(factors): factors}))
        [failed, plain] = engine.generate([row, request(tiny, PROMPTS[0])])
        assert isinstance(failed.error, CorruptBlobError)
        assert plain.tokens == solo.generate([request(tiny, PROMPTS[0])])[0].tokens
        self.fine(engine, tiny, solo)

    def test_nan_in_one_row_ends_that_row_alone(self, engine, solo, tiny):
        broken = low_rank_bundle(
            {path: (A * float("nan"), B) for path, A, B in low_rank_pairs(random_factors(tiny, 1))}
        )
        rows = [request(tiny, PROMPTS[0], (patch(broken),), (broken,)), *kinds(tiny)]
        [failed, *others] = engine.generate(rows)
        assert isinstance(failed.error, NumericalError)
        assert failed.tokens == ()
        assert [c.tokens for c in others] == [c.tokens for c in solo.generate(rows[1:])]
        self.fine(engine, tiny, solo)

    def test_should_stop_that_raises(self, engine, solo, tiny):
        row = replace(request(tiny, PROMPTS[0]), should_stop=lambda tokens: 1 / 0)
        [failed] = engine.generate([row])
        assert "ZeroDivisionError" in str(failed.error)
        self.fine(engine, tiny, solo)

    @pytest.mark.parametrize("death", [RuntimeError("broken"), SystemExit(1)])
    def test_a_worker_that_dies_fails_its_rows_and_is_replaced(self, tiny, solo, monkeypatch, death):
        with Engine(tiny) as engine:
            self.fine(engine, tiny, solo)
            loop = engine._loop
            assert loop is not None
            real = loop.forward

            def die(*_args, **_options):
                raise death

            monkeypatch.setattr(loop, "forward", die)
            completions = engine.generate(kinds(tiny))
            assert all(isinstance(c.error, EngineStoppedError) and c.error.retryable for c in completions)
            monkeypatch.setattr(loop, "forward", real)
            self.fine(engine, tiny, solo)

    def test_a_device_without_memory_for_keys_and_values(self, tiny, solo, monkeypatch):
        with Engine(tiny) as engine:
            self.fine(engine, tiny, solo)
            real = torch.Tensor.new_zeros

            def full(tensor, *shape, **options):
                if len(shape) == 3 and shape[0] > 100:
                    raise torch.OutOfMemoryError("full")
                return real(tensor, *shape, **options)

            monkeypatch.setattr(torch.Tensor, "new_zeros", full)
            rows = [request(tiny, tuple([5] * 400), max_new_tokens=100, seed=n) for n in range(4)]
            completions = engine.generate(rows)
            failed = [c for c in completions if c.error is not None]
            assert failed
            assert len(failed) < len(rows)  # those that fit went on
            assert {c.error.code for c in failed if c.error} == {"device_memory"}
            monkeypatch.undo()
            self.fine(engine, tiny, solo)

    def test_closing_ends_what_runs_and_refuses_what_comes(self, tiny):
        engine = Engine(tiny)
        generation = engine.submit(request(tiny, PROMPTS[0], max_new_tokens=400, ignore_eos=True))
        next(stream := iter(generation))
        engine.close()
        assert isinstance(generation.result(10).error, EngineStoppedError)
        with pytest.raises(EngineStoppedError):
            list(stream)
        with pytest.raises(EngineStoppedError, match="closed"):
            engine.submit(request(tiny, PROMPTS[0]))


def test_an_idle_engine_holds_no_thread(tiny, monkeypatch):
    monkeypatch.setattr("persona_sdk.engine.engine._LINGER", 0.05)
    with Engine(tiny) as engine:
        engine.generate([request(tiny, PROMPTS[0])])
        until = time.monotonic() + 10
        while engine._worker is not None and time.monotonic() < until:
            time.sleep(0.01)
        assert not [t for t in threading.enumerate() if t is engine._worker]
        assert engine.generate([request(tiny, PROMPTS[0])])[0].tokens  # and starts again


def test_plans_of_one_batch_may_differ_in_everything(engine, tiny):
    plan = CompositionPlan(tiny.fingerprint)
    assert engine.generate([Request(prompt=(5,), plan=plan)])[0].finish_reason in ("stop", "length")
