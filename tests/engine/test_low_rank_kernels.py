"""Every kernel is the dense formula; the compiled one touches nothing but what it needs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from persona_sdk.engine.low_rank.rows import PatchTable

from .low_rank_support import SITES, World, added

CPU = torch.device("cpu")
KERNELS = ("indexed", "batched", "dense", "segments")
WORLD = World()

gates = st.lists(
    st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-3, 3, width=32, allow_subnormal=False),
    min_size=1,
    max_size=4,
).map(tuple)
patches = st.builds(WORLD.patch, st.integers(0, 1), st.integers(0, 5), gates)
rows = st.lists(st.lists(patches, max_size=4), min_size=1, max_size=7)


def table_of(rows, kernel):
    table = PatchTable(calibrate=False, kernel=kernel)
    for number, bound in enumerate(rows):
        table.bind(number, bound)
    return table


def run(rows, lengths, kernel, inputs):
    batch = table_of(rows, kernel).batch(range(len(rows)), lengths, CPU)
    return [y.clone() for _, y in inputs] if batch is None else added(batch, inputs)


def scale(rows, lengths, inputs):
    """Bounds the terms of the sum, so that cancellation does not count as an error."""
    most = max((abs(g) for patches in rows for patch in patches for g in patch.gate), default=1.0)
    return 300 * max(most, 1.0)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(rows=rows, data=st.data())
def test_a_kernel_is_the_dense_formula(kernel, rows, data):
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    inputs = WORLD.inputs(sum(lengths), seed=data.draw(st.integers(0, 99)))
    for found, expected in zip(
        run(rows, lengths, kernel, inputs), WORLD.reference(rows, lengths, inputs), strict=True
    ):
        np.testing.assert_allclose(
            found.double().numpy(), expected, rtol=1e-5, atol=1e-7 * scale(rows, lengths, inputs)
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_that_was_asked_for_runs(kernel):
    table = table_of([[WORLD.patch(0, 1, (1.0,))], [WORLD.patch(0, 2, (1.0,))]], kernel)
    batch = table.batch([0, 1], [1, 1], CPU)
    assert {type(part).__name__.lower() for parts in batch._parts.values() for part in parts} == {kernel}


@settings(max_examples=40, deadline=None)
@given(rows=rows, data=st.data())
def test_a_row_is_bit_for_bit_what_it_is_alone(rows, data):
    lengths = data.draw(st.lists(st.integers(1, 3), min_size=len(rows), max_size=len(rows)))
    inputs = WORLD.inputs(sum(lengths))
    together = run(rows, lengths, "indexed", inputs)
    start = 0
    for row, length in zip(rows, lengths, strict=True):
        tokens = slice(start, start + length)
        alone = run([row], [length], "indexed", [(x[tokens], y[tokens]) for x, y in inputs])
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one, all_rows[tokens])
        start += length


def test_a_row_adds_its_patches_in_its_own_order_wherever_they_stand():
    one, other = WORLD.patch(0, 1, (0.3,)), WORLD.patch(0, 4, (1.7, -0.2))
    inputs = WORLD.inputs(1)
    moved = World()
    for source, target in ((1, 5), (4, 2)):
        moved.arenas[0].data[target] = WORLD.arenas[0].data[source]
    elsewhere = [
        type(one)(type(one.slot)(moved.arenas[0], target, patch.slot.rank, ""), patch.gate)
        for patch, target in ((one, 5), (other, 2))
    ]
    first, second = (run([bound], [1], "indexed", inputs) for bound in ([one, other], elsewhere))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_the_rows_that_use_them(kernel, bad):
    world = World()
    world.arenas[0].data[1] = bad
    world.arenas[0].data[3] = bad  # between the slots in use, and used by nobody
    rows = [[world.patch(0, 2, (1.0,))], [world.patch(0, 1, (1.0,))], [world.patch(0, 4, (0.5,))], []]
    lengths, inputs = [2, 1, 1, 1], world.inputs(5)
    found = run(rows, lengths, kernel, inputs)
    clean = [0, 1, 3, 4]
    for one, (_, y), expected in zip(found, inputs, world.reference(rows, lengths, inputs), strict=True):
        assert not one[2].isfinite().any()
        np.testing.assert_allclose(one[clean].double().numpy(), expected[clean], rtol=1e-5, atol=1e-4)
        assert torch.equal(one[4], y[4])


@pytest.mark.parametrize("kernel", KERNELS)
def test_directions_with_gate_zero_are_not_read(kernel):
    world = World()
    layout, data = world.arenas[0].layout, world.arenas[0].data
    for spans, site in zip(layout.spans, SITES, strict=True):
        for span in spans:  # direction 0 of A
            data[0, span.a : span.a + site.d_in] = float("nan")
    found = run([[world.patch(0, 0, (0.0, 1.0, 1.0, 1.0))]], [1], kernel, world.inputs(1))
    # direction 4 has gate zero too: the gate repeats every four directions
    assert all(one.isfinite().all() for one in found)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_less_precise_output_is_rounded_once(kernel, dtype):
    rows = [
        [WORLD.patch(0, 1, (1.0,)), WORLD.patch(0, 2, (0.5,)), WORLD.patch(1, 2, (2.0,))],
        [WORLD.patch(0, 5, (1.0,))],
    ]
    inputs = [(x.to(dtype), y.to(dtype)) for x, y in WORLD.inputs(3)]
    for found, expected in zip(
        run(rows, [2, 1], kernel, inputs), WORLD.reference(rows, [2, 1], inputs), strict=True
    ):
        assert found.dtype == dtype
        unit = torch.finfo(dtype).eps
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0.51 * unit, atol=1e-3 * unit * 300)


@pytest.mark.parametrize("kernel", ["batched", "dense", "segments"])
def test_factors_in_bfloat16(kernel):
    world = World(torch.bfloat16)
    rows = [[world.patch(0, 1, (1.0,))], [world.patch(0, 2, (0.5,))]]
    inputs = [(x.bfloat16(), y.bfloat16()) for x, y in world.inputs(3)]
    for found, expected in zip(
        run(rows, [2, 1], kernel, inputs), world.reference(rows, [2, 1], inputs), strict=True
    ):
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_that_are_not_contiguous(kernel):
    rows = [[WORLD.patch(0, 1, (1.0,))], [WORLD.patch(0, 3, (-1.0,))]]
    inputs = WORLD.inputs(2)
    strided = [(x.T.contiguous().T, torch.cat([y, y], dim=1)[:, : y.shape[1]]) for x, y in inputs]
    batch = table_of(rows, kernel).batch([0, 1], [1, 1], CPU)
    for site, (x, y) in zip(SITES, strided, strict=True):
        batch.add(site, x, y)
    for (_, found), expected in zip(strided, WORLD.reference(rows, [1, 1], inputs), strict=True):
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-4)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            t.numel()
            for t in (result if isinstance(result, tuple | list) else [result])
            if hasattr(t, "numel")
        ]
        self.calls.append((func.overloadpacket.__name__, sum(sizes)))
        return result


def operators(kernel, slots):
    rows = [[WORLD.patch(0, index, (1.0,))] for index in slots]
    inputs = WORLD.inputs(len(rows))
    batch = table_of(rows, kernel).batch(range(len(rows)), [1] * len(rows), CPU)
    with Operators() as seen:
        for site, (x, y) in zip(SITES, inputs, strict=True):
            batch.add(site, x, y)
    return seen.calls


@pytest.mark.parametrize("kernel", ["indexed", "batched", "dense"])
def test_operators_of_a_decode_step_do_not_grow_with_the_adapters(kernel):
    one, six = operators(kernel, [0] * 6), operators(kernel, range(6))
    assert [name for name, _ in one] == [name for name, _ in six]


def test_the_compiled_kernel_computes_nothing_in_torch():
    calls = operators("indexed", range(6))
    assert {name for name, _ in calls} <= {"detach"}  # a view, from numpy()
    assert len(calls) <= 2 * len(SITES)


def test_no_factor_is_gathered_for_slots_that_lie_together():
    copies = {"index_select", "gather", "index", "clone", "copy_", "contiguous", "_to_copy", "cat"}
    for kernel in ("batched", "dense"):
        largest = max([0, *(size for name, size in operators(kernel, range(6)) if name in copies)])
        assert largest <= 6 * 33  # activations: six tokens, the widest module
