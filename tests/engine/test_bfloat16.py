"""bfloat16 on CPUs: its bits in compiled loops, its kernels, and whole rows beside their float32 selves."""

import copy
from typing import no_type_check

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.engine import Engine, EngineOptions, table
from persona_sdk.engine.compiled import compiled
from persona_sdk.engine.forward.attention import decode_attention
from persona_sdk.engine.forward.norms import rms_norm
from persona_sdk.engine.low_rank import indexed
from persona_sdk.engine.low_rank.rows import PatchTable
from persona_sdk.engine.stored import numbers, rounded, widened
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import freeze

from .low_rank_support import SITES, World, added
from .support import patch, random_factors, request

CPU = torch.device("cpu")
EPSILON = torch.finfo(torch.bfloat16).eps


@no_type_check
def _copy(x, out):
    for place in range(x.shape[0]):
        out[place] = rounded(widened(x[place]), out)


@pytest.fixture(scope="module")
def copying():
    loop = compiled(_copy)
    assert loop is not None
    return loop


@given(numbers_=st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_rounding_and_widening_are_torchs(copying, numbers_):
    x = torch.tensor(numbers_, dtype=torch.float32)
    found, back = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x))
    copying(x.numpy(), numbers(found))
    copying(numbers(found), back.numpy())
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x.isnan(), back.isnan())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 2**16))
def test_rms_norm_is_the_formula_rounded_once(rows, width, seed):
    torch.manual_seed(seed)
    x, weight = (10 * torch.randn(rows, width)).bfloat16(), torch.randn(width).bfloat16()
    x[0, 0] = float("nan")
    out = rms_norm(x, weight, 1e-5)
    expected = x.double() / (x.double().pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * EPSILON, atol=1e-6, equal_nan=True)
    assert out[0].isnan().all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**16))
def test_decode_attention_is_that_of_the_widened_numbers(rows, repeat, longest, seed):
    torch.manual_seed(seed)
    kv_heads, dim = 2, 8
    lengths = torch.randint(1, longest + 1, (rows,))
    pools = [torch.randn(40, kv_heads, dim).bfloat16() for _ in range(2)]
    tables = torch.randperm(39)[: rows * longest].view(rows, longest) + 1
    qkv = torch.randn(rows, (repeat + 2) * kv_heads * dim).bfloat16()
    cos, sin = torch.randn(rows, dim), torch.randn(rows, dim)
    step = decode_attention(dim, dim, repeat)
    assert step is not None

    def attended(dtype):
        keys, values = (pool.to(dtype, copy=True) for pool in pools)
        out = torch.empty(rows, repeat * kv_heads * dim, dtype=dtype)
        arrays = [numbers(t) for t in (qkv.to(dtype), cos, sin, keys, values, tables, lengths)]
        step(*arrays, 0.3, kv_heads, numbers(out))
        return out.float(), keys.float(), values.float()

    for found, expected in zip(attended(torch.bfloat16), attended(torch.float32), strict=True):
        torch.testing.assert_close(found, expected, rtol=2 * EPSILON, atol=4 * EPSILON)


# Low-rank kernels

WORLD = World(torch.bfloat16)
gates = st.lists(st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-3, 3, width=32), min_size=1, max_size=4)
patches = st.builds(WORLD.patch, st.integers(0, 1), st.integers(0, 5), gates.map(tuple))
rows_of_patches = st.lists(st.lists(patches, max_size=3), min_size=1, max_size=6)


def batch_of(rows, lengths, kernel):
    patch_table = PatchTable(calibrate=False, kernel=kernel)
    for number, bound in enumerate(rows):
        patch_table.bind(number, bound)
    return patch_table.batch(range(len(rows)), lengths, CPU)


def run(rows, lengths, kernel, inputs):
    batch = batch_of(rows, lengths, kernel)
    return [y.clone() for _, y in inputs] if batch is None else added(batch, inputs)


def inputs_of(tokens, seed=0):
    return [(x.bfloat16(), y.bfloat16()) for x, y in WORLD.inputs(tokens, seed=seed)]


@pytest.mark.parametrize("kernel", ["indexed", "batched", "segments"])
@settings(max_examples=30, deadline=None)
@given(rows=rows_of_patches, data=st.data())
def test_a_kernel_is_the_dense_formula(kernel, rows, data):
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    inputs = inputs_of(sum(lengths), seed=data.draw(st.integers(0, 99)))
    for found, expected in zip(
        run(rows, lengths, kernel, inputs), WORLD.reference(rows, lengths, inputs), strict=True
    ):
        # y is rounded once for every patch of a row, at most three: relative to the sums on the way.
        size = 300 * max((abs(g) for one in rows for patch in one for g in patch.gate), default=1.0)
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=2 * EPSILON, atol=EPSILON * size)


def parts_of(kernel):
    batch = batch_of([[WORLD.patch(0, 1, (1.0,))], [WORLD.patch(0, 2, (1.0,))]], [1, 1], kernel)
    return {part for parts in batch._parts.values() for part in parts}


def test_sums_are_float32_where_the_kernel_can():
    assert {part.dtype for kernel in ("indexed", "segments") for part in parts_of(kernel)} == {torch.float32}


def test_without_numba_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(indexed, "kernel", lambda *_: None)
    assert {type(part).__name__ for part in parts_of("indexed")} == {"Batched"}


@settings(max_examples=30, deadline=None)
@given(rows=rows_of_patches)
def test_a_row_of_a_decode_step_is_bit_for_bit_what_it_is_alone(rows):
    inputs = inputs_of(len(rows))
    together = run(rows, [1] * len(rows), "indexed", inputs)
    for number, row in enumerate(rows):
        one = slice(number, number + 1)
        alone = run([row], [1], "indexed", [(x[one], y[one]) for x, y in inputs])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("kernel", ["indexed", "batched", "segments"])
def test_nan_in_a_factor_stays_with_its_row_and_gates_of_zero_read_nothing(kernel):
    world = World(torch.bfloat16)
    layout, data = world.arenas[0].layout, world.arenas[0].data
    for spans, site in zip(layout.spans, SITES, strict=True):
        for span in spans:  # direction 0 of A
            data[0, span.a : span.a + site.d_in] = float("nan")
    rows = [
        [world.patch(0, 0, (1.0,))],
        [world.patch(0, 0, (0.0, 1.0, 1.0, 1.0))],
        [world.patch(0, 1, (1.0,))],
    ]
    for found in run(rows, [1, 1, 1], kernel, inputs_of(3)):
        assert found[0].isnan().all()
        assert found[1:].isfinite().all()


# Whole rows

TOLERANCE = 0.05  # of the largest logit


@pytest.fixture(scope="module")
def half(tiny):
    module = copy.deepcopy(tiny.module).to(torch.bfloat16)
    return LanguageModel.from_module("half", module, tiny.tokenizer, fingerprint=tiny.fingerprint)


@pytest.fixture(params=["float32", "bfloat16"])
def engines(request, tiny, half, monkeypatch):
    """A float32 and a bfloat16 engine, the latter with its branches in each precision."""
    with monkeypatch.context() as patched:
        patched.setattr(table, "branch_dtype", lambda *_, **__: getattr(torch, request.param))
        narrow = Engine(half)
        narrow.ready()
    with Engine(tiny) as wide, narrow:
        yield wide, narrow


def personas(model, count, length=20, stored=torch.float32):
    factors = [
        freeze({name: t.to(stored).float() for name, t in random_factors(model, seed).items()})
        for seed in range(count)
    ]
    return [
        request(
            model,
            tuple(3 + (7 * row + place) % 200 for place in range(length + row)),
            (patch(one),),
            (one,),
        )
        for row, one in enumerate(factors)
    ]


def test_logits_of_rows_with_adapters_are_near_those_of_float32(engines, tiny):
    wide, narrow = engines
    for expected, found in zip(wide.logits(personas(tiny, 4)), narrow.logits(personas(tiny, 4)), strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


def test_a_row_in_a_batch_is_near_the_row_alone(engines, tiny):
    _, narrow = engines
    rows = personas(tiny, 5)
    for row, together in zip(rows, narrow.logits(rows), strict=True):
        [alone] = narrow.logits([row])
        assert float((together - alone).abs().max() / alone.abs().max()) < TOLERANCE


def test_rows_generate_tokens_from_keys_and_values_in_bfloat16(engines, tiny):
    _, narrow = engines
    rows = personas(tiny, 3)
    completions = narrow.generate(rows)
    for completion in completions:
        assert completion.error is None
        assert all(0 <= token < tiny.module.config.vocab_size for token in completion.tokens)
        assert len(completion.tokens) > 1
    with narrow.reserved(rows) as (loop, _):
        assert loop.table.pool.dtype == torch.bfloat16


def test_adapters_may_be_bfloat16_beside_a_float32_base(tiny):
    options = EngineOptions(branch_precision="bfloat16")
    with Engine(tiny) as wide, Engine(tiny, options) as mixed:
        rows = personas(tiny, 5)
        together = mixed.logits(rows)
        assert mixed.branch_precision == "bfloat16"
        for row, expected, found in zip(rows, wide.logits(rows), together, strict=True):
            assert 0 < float((found - expected).abs().max() / expected.abs().max()) < 0.01
            [alone] = mixed.logits([row])  # in float32 sums, a row is the row alone
            assert torch.equal(found.argmax(-1), alone.argmax(-1))
        alone = [mixed.generate([row])[0].tokens for row in rows]
        assert [completion.tokens for completion in mixed.generate(rows)] == alone
        # Factors that bfloat16 holds exactly lose nothing.
        exact = personas(tiny, 5, stored=torch.bfloat16)
        for expected, found in zip(wide.logits(exact), mixed.logits(exact), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
