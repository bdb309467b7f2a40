"""The engine's promises: base when empty, a row in a batch is that row alone, greedy parity."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from persona_sdk.adapters import lowrank
from persona_sdk.engine import Engine, EngineOptions, table
from persona_sdk.errors import (
    CompositionError,
    IncompatibleAdapterError,
    InvalidInputError,
    PromptTooLongError,
)
from persona_sdk.models import LanguageModel
from persona_sdk.plan import DecodingRule, LowRankPatch, Scorer
from persona_sdk.tensors import digest, freeze, low_rank_bundle, low_rank_pairs
from persona_sdk.testing import tiny_language_model

from .support import merged, patch, random_factors, request, soft_prefix

PROMPTS = [(5, 60, 99, 130), (17,), (200, 201, 202, 203, 204, 205, 206), (45, 45, 300)]


@pytest.fixture(scope="module")
def engine(tiny: LanguageModel):
    engine = Engine(tiny)
    yield engine
    engine.close()


def hf_greedy(model: LanguageModel, prompt: tuple[int, ...], **options: object) -> tuple[int, ...]:
    out = model.module.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        **options,
    )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_empty_plan_is_transformers_generate(engine, tiny, prompt, penalty):
    [completion] = engine.generate([request(tiny, prompt, repetition_penalty=penalty)])
    assert completion.tokens == hf_greedy(tiny, prompt, repetition_penalty=penalty)


def test_empty_plan_logits_are_the_base_models(engine, tiny):
    with torch.inference_mode():
        expected = tiny.module(torch.tensor([PROMPTS[2]])).logits[0]
    general = Engine(tiny, EngineOptions(fused=False))
    for made in (engine, general):
        [logits] = made.logits([request(tiny, PROMPTS[2])])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    general.close()


def test_zero_gate_is_the_base_model(engine, tiny):
    factors = random_factors(tiny, 1)
    [logits] = engine.logits([request(tiny, PROMPTS[0], (patch(factors, (0.0,) * 4),), (factors,))])
    [base] = engine.logits([request(tiny, PROMPTS[0])])
    torch.testing.assert_close(logits, base, atol=1e-6, rtol=0)


@settings(max_examples=25)
@given(data=st.data())
def test_a_row_in_a_mixed_batch_is_the_row_alone_with_merged_weights(engine, tiny, data):
    requests, references = [], []
    for row in range(data.draw(st.integers(2, 5))):
        prompt = data.draw(st.sampled_from(PROMPTS))
        seeds = data.draw(st.lists(st.integers(0, 9), max_size=3, unique=True))
        bundles = [random_factors(tiny, seed, rank=data.draw(st.sampled_from([1, 3, 8]))) for seed in seeds]
        gates = [tuple(data.draw(st.floats(-1, 1, width=32)) for _ in range(patch(b).rank)) for b in bundles]
        parts = tuple(patch(b, g) for b, g in zip(bundles, gates, strict=True))
        requests.append(request(tiny, prompt, parts, tuple(bundles), seed=row))
        references.append(merged(tiny, list(zip(bundles, gates, strict=True))))
    for row, (logits, reference) in enumerate(zip(engine.logits(requests), references, strict=True)):
        with torch.inference_mode():
            expected = reference.module(torch.tensor([requests[row].prompt])).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_modules_of_one_patch_may_have_different_ranks(engine, tiny):
    def uneven(seed: int) -> dict:
        full = random_factors(tiny, seed, rank=6)
        cut = {}
        for index, (path, A, B) in enumerate(low_rank_pairs(full)):
            rank = 1 + (index + seed) % 6
            cut[path] = (A[:rank], B[:, :rank])
        return low_rank_bundle(cut)

    bundles = [uneven(1), uneven(2)]
    gates = [(0.5, -1.0, 2.0, 1.0, 0.3, 0.7), (1.0, 0.2, 0.4, -0.6, 0.8, 1.5)]
    parts = tuple(
        LowRankPatch(factors=digest(b), rank=6, gate=g, origin="uneven")
        for b, g in zip(bundles, gates, strict=True)
    )
    [logits] = engine.logits([request(tiny, PROMPTS[0], parts, tuple(bundles))])
    padded = [(lowrank.pad_rank(b, 6), g) for b, g in zip(bundles, gates, strict=True)]
    with torch.inference_mode():
        expected = merged(tiny, padded).module(torch.tensor([PROMPTS[0]])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branches", [torch.float32, torch.bfloat16])
def test_a_bfloat16_base_has_branches_in_the_precision_that_was_measured(tiny, branches, monkeypatch):
    monkeypatch.setattr(table, "branch_dtype", lambda *_, **__: branches)
    module = copy.deepcopy(tiny.module).to(torch.bfloat16)
    model = LanguageModel.from_module("bf16", module, tiny.tokenizer, fingerprint=tiny.fingerprint)
    engine = Engine(model)
    factors = random_factors(tiny, 1)
    row = request(tiny, PROMPTS[0], (patch(factors),), (factors,))
    [logits] = engine.logits([row])
    with torch.inference_mode():
        expected = merged(tiny, [(factors, (1.0,) * 4)]).module(torch.tensor([PROMPTS[0]])).logits[0]
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)
    with engine.reserved([row]) as (_, [admitted]):
        assert [slot.arena.data.dtype for slot in admitted.slots] == [branches]
    engine.close()


@pytest.mark.parametrize("fused", [True, False])
def test_only_the_general_pass_waits_for_whoever_has_the_model(fused):
    model = tiny_language_model()
    engine = Engine(model, EngineOptions(fused=fused))
    expected = engine.generate([request(model, PROMPTS[0])])
    held, release = threading.Event(), threading.Event()

    def train() -> None:
        with model.lock:
            held.set()
            release.wait(10)

    trainer = threading.Thread(target=train)
    trainer.start()
    held.wait(10)
    generation = engine.submit(request(model, PROMPTS[0]))
    if fused:
        assert generation.result(10) == expected[0]
    else:
        with pytest.raises(TimeoutError):
            generation.result(0.3)
    release.set()
    assert generation.result(10) == expected[0]
    trainer.join()
    engine.close()


def mixed_rows(tiny):
    a, b, c = (random_factors(tiny, seed, rank) for seed, rank in [(1, 4), (2, 8), (3, 2)])
    soft, vectors = soft_prefix(tiny, 4)
    other, more = soft_prefix(tiny, 5, length=7)
    ban = DecodingRule(bias=((7, 4.0), (9, -float("inf"))), origin="ban")
    return [
        request(tiny, PROMPTS[0]),
        request(tiny, PROMPTS[1], (patch(a), patch(b)), (a, b)),
        request(tiny, PROMPTS[2], (soft, patch(c), ban), (vectors, c), do_sample=True, seed=3),
        request(tiny, PROMPTS[3], (soft, other), (vectors, more), do_sample=True, temperature=3.0, top_k=0),
        request(tiny, PROMPTS[0], (patch(c),), (c,), do_sample=True, top_p=0.7, repetition_penalty=1.3),
    ]


def test_tokens_of_every_row_equal_its_solo_run(engine, tiny):
    rows = mixed_rows(tiny)
    assert engine.generate(rows) == [engine.generate([row])[0] for row in rows]
    assert engine.generate(rows[::-1]) == engine.generate(rows)[::-1]


def test_a_short_sampled_row_beside_a_long_greedy_one(engine, tiny):
    rows = [
        request(tiny, PROMPTS[0], max_new_tokens=100, ignore_eos=True),
        request(tiny, PROMPTS[1], max_new_tokens=5, do_sample=True, ignore_eos=True),
    ]
    assert [len(completion.tokens) for completion in engine.generate(rows)] == [100, 5]


def test_same_seed_same_tokens_and_another_seed_differs(engine, tiny):
    def run(seed: int) -> tuple[int, ...]:
        row = request(tiny, PROMPTS[0], do_sample=True, temperature=2.0, seed=seed)
        return engine.generate([row])[0].tokens

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(5)}) > 1


def test_soft_prefix_equals_inputs_embeds(engine, tiny):
    soft, bundle = soft_prefix(tiny, 1)
    [logits] = engine.logits([request(tiny, PROMPTS[0], (soft,), (bundle,))])
    with torch.inference_mode():
        tokens = tiny.module.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
        embeddings = torch.cat([bundle["prefix"][None], tokens], dim=1)
        expected = tiny.module(inputs_embeds=embeddings).logits[0, soft.length :]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_streams_interleave_and_leave_the_base_untouched(engine, tiny):
    factors = random_factors(tiny, 1)
    patched, plain = request(tiny, PROMPTS[0], (patch(factors),), (factors,)), request(tiny, PROMPTS[0])
    expected = [engine.generate([patched])[0].tokens, engine.generate([plain])[0].tokens]
    streams = [engine.stream([patched]), engine.stream([plain])]
    seen: list[list[int]] = [[], []]
    for _ in range(3):
        for stream, tokens in zip(streams, seen, strict=True):
            tokens.append(next(stream).token)
        assert hf_greedy(tiny, PROMPTS[0]) == expected[1]  # direct use of the model meanwhile
    assert [tuple(tokens) for tokens in seen] == [tokens[:3] for tokens in expected]
    streams[0].close()
    assert engine.generate([plain])[0].tokens == expected[1]


def test_end_token_and_should_stop_end_a_row(engine, tiny):
    tokens = engine.generate([request(tiny, PROMPTS[0])])[0].tokens
    stop_at = request(tiny, PROMPTS[0])
    stop_at = type(stop_at)(prompt=stop_at.prompt, plan=stop_at.plan, should_stop=lambda seen: len(seen) == 3)
    assert engine.generate([stop_at])[0] == engine.generate([stop_at, request(tiny, PROMPTS[2])])[0]
    assert engine.generate([stop_at])[0].tokens == tokens[:3]
    end = DecodingRule(bias=((2, 1000.0),), origin="end now")
    assert engine.generate([request(tiny, PROMPTS[0], (end,))])[0].tokens == (2,)
    assert len(engine.generate([request(tiny, PROMPTS[0], (end,), ignore_eos=True)])[0].tokens) == 12


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def ops_of_one_decode_step(engine: Engine, model: LanguageModel, distinct: int, rows: int = 8) -> int:
    bundles = [random_factors(model, seed) for seed in range(distinct)]
    parts = [(patch(bundles[row % distinct]),) if distinct else () for row in range(rows)]
    with engine.bench([request(model, PROMPTS[0], part, tuple(bundles)) for part in parts]) as steps:
        steps.decode()  # kernels are chosen
        with CountOps() as ops:
            steps.decode()
    return ops.count


def test_ops_of_a_step_are_bounded_whatever_the_number_of_distinct_adapters(engine, tiny):
    base, *counts = (ops_of_one_decode_step(engine, tiny, distinct) for distinct in (0, 1, 2, 8))
    sites = 4 * len(tiny.module.model.layers)
    assert base > 20  # the counter sees the step
    # Kernels may differ with the number of adapters; none of them loops over adapters.
    assert max(counts) <= base + 24 * sites


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma"])
def test_other_architectures(family):
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    shared = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    module = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shared)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, **shared)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**shape, **shared)),
    }[family]()
    for parameter in module.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model = LanguageModel.from_module(family, module, tiny_language_model().tokenizer)
    engine = Engine(model)
    factors = random_factors(model, 1)
    rows = [request(model, PROMPTS[0], (patch(factors),), (factors,)), request(model, PROMPTS[2])]
    reference = merged(model, [(factors, (1.0,) * 4)])
    with torch.inference_mode():
        expected = reference.module(torch.tensor([PROMPTS[0]])).logits[0]
    torch.testing.assert_close(engine.logits(rows)[0], expected, atol=1e-5, rtol=1e-5)
    assert engine.generate(rows)[1].tokens == hf_greedy(model, PROMPTS[2])
    assert engine.generate(rows)[0].tokens == hf_greedy(reference, PROMPTS[0])


def test_closing_takes_the_hooks_off():
    model = tiny_language_model()
    with Engine(model, EngineOptions(fused=False)) as engine:
        engine.generate([request(model, PROMPTS[0])])
        assert any(module._forward_hooks for module in model.module.modules())
    assert not any(module._forward_hooks for module in model.module.modules())


class TestBadInput:
    def test_plan_of_another_base(self, engine, tiny):
        with pytest.raises(IncompatibleAdapterError, match="base model"):
            engine.generate([request(tiny_language_model(seed=1), PROMPTS[0])])

    def test_part_it_cannot_execute(self, engine, tiny):
        scorer = Scorer(module="0" * 64, candidates=2, origin="taste")
        with pytest.raises(CompositionError, match="cannot execute a 'scorer'"):
            engine.stream([request(tiny, PROMPTS[0], (scorer,))])

    def test_missing_tensors(self, engine, tiny):
        factors = random_factors(tiny, 1)
        with pytest.raises(CompositionError, match="does not carry the tensors"):
            engine.generate([request(tiny, PROMPTS[0], (patch(factors),))])

    def test_factors_that_do_not_fit_fail_the_check_and_the_row_alone(self, engine, tiny):
        path, A, _ = next(low_rank_pairs(random_factors(tiny, 1)))
        plain = request(tiny, PROMPTS[0])
        for bundle, message in [
            (low_rank_bundle({"model.nothing": (torch.ones(2, 4), torch.ones(4, 2))}), r"model\.nothing"),
            (low_rank_bundle({path: (torch.ones(2, 4), torch.ones(4, 2))}), "d_in, d_out"),
            (freeze({f"{path}.A": A}), "no B"),
        ]:
            part = LowRankPatch(factors=digest(bundle), rank=4, gate=(1.0,) * 4, origin="broken")
            broken = request(tiny, PROMPTS[0], (part,), (bundle,))
            with pytest.raises(IncompatibleAdapterError, match=message):
                engine.check(broken)
            failed, fine = engine.generate([broken, plain])
            assert isinstance(failed.error, IncompatibleAdapterError)
            assert failed.finish_reason == "error"
            assert fine == engine.generate([plain])[0]

    def test_soft_prefix_of_another_width(self, engine, tiny):
        soft, _ = soft_prefix(tiny, 1)
        narrow = freeze({"prefix": torch.ones(soft.length, 5)})
        part = type(soft)(vectors=digest(narrow), length=soft.length, origin="narrow")
        with pytest.raises(IncompatibleAdapterError, match="narrow"):
            engine.generate([request(tiny, PROMPTS[0], (part,), (narrow,))])

    @pytest.mark.parametrize("prompt", [(), (384,), (-1,)])
    def test_prompt_outside_the_vocabulary(self, engine, tiny, prompt):
        with pytest.raises(InvalidInputError):
            engine.generate([request(tiny, prompt)])

    def test_prompt_too_long(self, engine, tiny):
        with pytest.raises(PromptTooLongError, match="do not fit"):
            engine.generate([request(tiny, (5,) * tiny.context_length)])

    def test_no_requests(self, engine):
        assert engine.generate([]) == []
        assert engine.logits([]) == []
