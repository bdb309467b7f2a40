"""The floor against numbers worked out by hand, published ratios, and operations counted by torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import Ours, random_factors, step_inputs
from benchmarks.floor import Rates, Shape, bytes_ratio, flops_ratio, roofline_ratio


def llama(hidden: int, keys: int, inner: int, layers: int, vocab: int) -> Shape:
    linears = {
        f"{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in {
            "q": (hidden, hidden),
            "k": (hidden, keys),
            "v": (hidden, keys),
            "o": (hidden, hidden),
            "gate": (hidden, inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
        }.items()
    }
    return Shape.of(linears, vocab=vocab, d_model=hidden)


SMOLLM2 = llama(576, 192, 1536, 30, 49152)


def test_smollm2_by_hand():
    # A layer: 2·576² + 2·576·192 + 3·576·1536 weights; sides 2·1152 + 2·768 + 3·2112.
    assert Shape(blocks=30 * 3_538_944, head=28_311_552, kappa=30 * 10_176) == SMOLLM2
    # One adapter of rank 16 is 4,884,480 numbers; a step reads 134,479,872.
    assert bytes_ratio(SMOLLM2, rank=16, copies=1) == pytest.approx(1 + 4_884_480 / 134_479_872)
    assert bytes_ratio(SMOLLM2, rank=16, copies=32) == pytest.approx(2.16228, abs=1e-5)
    assert flops_ratio(SMOLLM2, rank=16, rows=32, tokens=1) == pytest.approx(1.036321, abs=1e-6)
    # In a prefill only the last token of a row meets the head, so the branch weighs more.
    assert flops_ratio(SMOLLM2, rank=16, rows=8, tokens=32) == pytest.approx(
        1 + 256 * 4_884_480 / (256 * 106_168_320 + 8 * 28_311_552)
    )


@pytest.mark.parametrize(
    ("shape", "percent"),
    [
        (llama(4096, 4096, 11008, 32, 32000), 0.61),  # Llama-2-7B, all linears, rank 16
        (llama(4096, 1024, 14336, 32, 128256), 0.56),  # Llama-3.1-8B
        (llama(896, 128, 4864, 24, 151936), 1.8),  # Qwen2.5-0.5B
    ],
)
def test_known_models(shape, percent):
    assert 100 * (bytes_ratio(shape, rank=16, copies=1) - 1) == pytest.approx(percent, rel=0.03)


@pytest.mark.parametrize(("rows", "tokens"), [(4, 1), (3, 5)])
def test_operations_are_those_torch_counts(tiny, rows, tokens):
    # The compiled kernel does the same products where torch cannot count them.
    ours = Ours(tiny, [random_factors(tiny.linear_shapes(), rank=8, seed=0)], kernel="segments")
    inputs = step_inputs(torch.randint(384, (rows, tokens)))

    def in_place_addmm(_y, a, b, out_shape=None, **_):  # torch counts only the other form
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: in_place_addmm}

    def counted(adapter: int) -> dict[str, int]:
        with (
            torch.no_grad(),
            ours.assigned([adapter] * rows) as forward,
            FlopCounterMode(display=False, custom_mapping=in_place) as count,
        ):
            forward(**inputs)
        return {str(op): flops for op, flops in count.get_flop_counts()["Global"].items()}

    base, patched = counted(-1), counted(0)
    ours.engine.close()
    branch = sum(patched.values()) - sum(base.values())
    linears = base["aten.mm"] + base.get(
        "aten.bmm", 0
    )  # attention has an op of its own, the floor leaves it out
    shape = Shape.of(tiny.linear_shapes(), vocab=384, d_model=tiny.d_model)
    assert 1 + branch / linears == pytest.approx(flops_ratio(shape, rank=8, rows=rows, tokens=tokens))


def test_roofline_takes_the_slower_of_memory_and_arithmetic():
    shape = Shape(blocks=10_000, head=1_000, kappa=100)
    step = {"rank": 10, "rows": 4, "tokens": 1, "base_seconds": 2.0}
    # 5 adapters of 1000 numbers: 20,000 bytes; 4 rows of 1000 multiply-adds: 8,000 operations.
    slow_memory = Rates(bytes_per_second=20_000, flops_per_second=80_000)
    assert roofline_ratio(shape, slow_memory, distinct=5, **step) == pytest.approx(1 + 1 / 2)
    slow_arithmetic = Rates(bytes_per_second=200_000, flops_per_second=4_000)
    assert roofline_ratio(shape, slow_arithmetic, distinct=5, **step) == pytest.approx(1 + 2 / 2)
