"""Decode steps at fixed addresses: the ordinary pass's numbers, nobody else's slots, nothing read back."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from persona_sdk.engine.forward.architectures import Norm, blocks_of
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.fused import FusedForward
from persona_sdk.engine.forward.general import GeneralForward
from persona_sdk.engine.forward.pool import SCRATCH, TokenPool
from persona_sdk.engine.forward.static_decode import StaticDecode
from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.engine.low_rank.graphs import StaticBatch
from persona_sdk.engine.low_rank.lanes import Factors
from persona_sdk.errors import EngineError
from persona_sdk.testing import tiny_language_model

from .graphs_support import CPU, Tape, branches_in_torch, without_compiled_loops
from .low_rank_support import Arena

ROWS, WIDTH = 4, 16
MODELS = {name: tiny_language_model(architecture=name) for name in ("llama", "qwen2")}
BLOCKS = {name: blocks_of(model.module) for name, model in MODELS.items()}
FORWARDS = {name: FusedForward(blocks) for name, blocks in BLOCKS.items()}


def filled_pool(forward: FusedForward) -> TokenPool:
    """Every slot but the reserved ones holds some former row's numbers, some of them NaN."""
    pool = TokenPool(forward.layers, device=CPU, dtype=torch.float32, budget_bytes=2**22)
    generator = torch.Generator().manual_seed(0)
    for layer in (*pool.keys, *pool.values):
        layer[2:] = torch.randn(layer[2:].shape, generator=generator)
        layer[900:] = torch.nan
    return pool


@st.composite
def decode_rows(draw: st.DrawFn) -> list[RowTokens]:
    """Rows with slots of their own, anywhere."""
    lengths = draw(st.lists(st.integers(1, WIDTH), min_size=1, max_size=ROWS))
    slots = np.random.default_rng(draw(st.integers(0, 99))).permutation(np.arange(2, 900))
    rows, start = [], 0
    for length in lengths:
        table = slots[start : start + length]
        rows.append(RowTokens([draw(st.integers(0, 383))], [length - 1], table))
        start += length
    return rows


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(decode_rows(), min_size=1, max_size=3))
def test_a_step_is_the_ordinary_pass_and_leaves_all_else_alone(name, compiled, steps):
    forward = FORWARDS[name]
    ours, theirs = filled_pool(forward), filled_pool(forward)
    inputs = StaticDecode(ROWS, WIDTH, CPU)
    address = inputs.state.data_ptr()
    with pytest.MonkeyPatch.context() as monkeypatch, torch.inference_mode():
        if not compiled:
            without_compiled_loops(monkeypatch)
        for rows in steps:
            before = [layer.clone() for layer in (*ours.keys, *ours.values)]
            inputs.write(rows)
            found = forward(inputs.batch(), ours, None)[: len(rows)]
            torch.testing.assert_close(found, forward(pack(rows, CPU), theirs, None), atol=1e-4, rtol=1e-4)
            written = [row.table[-1] for row in rows]
            after, expected = (*ours.keys, *ours.values), (*theirs.keys, *theirs.values)
            for own, other, former in zip(after, expected, before, strict=True):
                torch.testing.assert_close(own[written], other[written], atol=1e-4, rtol=1e-4)
                assert not own[0].any(), "the zero slot"
                untouched = np.setdiff1d(np.arange(len(own)), [*written, SCRATCH])
                torch.testing.assert_close(own[untouched], former[untouched], equal_nan=True, atol=0, rtol=0)
    assert inputs.state.data_ptr() == address


def test_the_batch_looks_the_same_whoever_is_in_it():
    inputs = StaticDecode(4, 8, CPU)
    seen = []
    for rows in (
        [],
        [RowTokens([5], [0], np.array([9]))],
        [RowTokens([n], [n], np.arange(n + 1) + 10 * n + 2) for n in range(4)],
        [RowTokens([6], [1], np.array([7, 8]))],  # nothing is left of those before
    ):
        inputs.write(rows)
        batch = inputs.batch()
        tensors = [batch.tokens, batch.positions, batch.slots, batch.tables]
        seen.append((batch.lengths, batch.seen, batch.wanted, batch.vectors, [t.data_ptr() for t in tensors]))
        assert batch.is_decode
        free = slice(len(rows), None)
        assert not batch.tokens[free].any()
        assert not batch.positions[free].any()
        assert (batch.slots[free] == SCRATCH).all()
        assert (batch.tables[free] == torch.tensor([SCRATCH, *[0] * 7])).all()
        for place, row in enumerate(rows):
            assert batch.slots[place] == row.table[row.positions[0]]
            assert batch.tables[place].tolist() == [*row.table, *[0] * (8 - len(row.table))]
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize(
    "rows",
    [
        [RowTokens([1], [0], np.array([2]))] * 3,
        [RowTokens([1], [4], np.arange(2, 7))],
        [RowTokens([1, 2], [0, 1], np.arange(2, 4))],
        [RowTokens([0], [0], np.array([2]), torch.zeros(1, 32))],
    ],
    ids=["rows", "positions", "tokens", "vectors"],
)
def test_rows_that_do_not_fit_are_refused(rows):
    inputs = StaticDecode(2, 4, CPU)
    assert not inputs.fits(rows)
    with pytest.raises(EngineError, match="do not fit"):
        inputs.write(rows)


def arena(forward: FusedForward) -> Arena:
    paths = frozenset(module.path for site in forward.sites for module in site.modules)
    layout = BlockLayout(4, forward.sites, paths)
    return Arena(layout, torch.zeros(3, layout.size))


def faked(value, device):
    """A copy of a structure whose tensors are fake ones on a device."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, dict):
        return {key: faked(own, device) for key, own in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(faked(own, device) for own in value)
    return value


def fake_module(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """The same module over fake tensors."""
    made = copy.copy(module)
    made._parameters = faked(dict(module._parameters), device)
    made._buffers = faked(dict(module._buffers), device)
    return made


def fake_forward(name: str, device: str) -> FusedForward:
    """The pass of a model whose weights stand on a device that need not be there."""
    blocks = BLOCKS[name]

    def part(value):
        if isinstance(value, torch.nn.Module) and list(value.parameters()):
            return fake_module(value, device)
        return Norm(faked(value.weight, device), value.epsilon) if isinstance(value, Norm) else value

    def parts(value):
        return replace(value, **{key: part(own) for key, own in vars(value).items()})

    rotary = fake_module(blocks.rotary, device)
    return FusedForward(replace(parts(blocks), rotary=rotary, layers=tuple(map(parts, blocks.layers))))


class Indexing(TorchFunctionMode):
    """``x[...]`` by operators: Python's own asks for the device, which this torch was not built for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        tensor, index = args
        index = list(index) if isinstance(index, tuple) else [index]
        places = [place for place, part in enumerate(index) if part is Ellipsis]
        for place in places:
            named = sum(part is not None for part in index) - 1
            index[place : place + 1] = [slice(None)] * (tensor.ndim - named)
        axis = 0
        for part in index:
            if part is None:
                tensor = tensor.unsqueeze(axis)
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, axis, part.start, part.stop)
            elif isinstance(part, int):
                tensor, axis = tensor.select(axis, part), axis - 1
            else:
                assert axis == 0, "as the pool is read"
                tensor = torch.ops.aten.index(tensor, [part])
            axis += 1
        return tensor


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_pass_through_a_whole_step(name, device, monkeypatch):
    """Under fake tensors an operator that needs a value, or a shape that depends on one, is an error."""
    without_compiled_loops(monkeypatch)
    monkeypatch.setattr("persona_sdk.packed.can_pack", lambda _: False)
    factors = Factors(arena(FORWARDS[name]))
    inputs, branches = StaticDecode(ROWS, WIDTH, CPU), StaticBatch([(factors, 2)], ROWS, CPU)
    with FakeTensorMode(), Indexing(), torch.no_grad():
        with pytest.raises(DataDependentOutputException):
            torch.empty((), device=device).item()  # what the mode is there to catch
        forward = fake_forward(name, device)
        pool = TokenPool(forward.layers, device=torch.device(device), dtype=torch.float32, budget_bytes=2**22)
        inputs.state = faked(inputs.state, device)
        buffers = branches.buffers(factors)
        for key, value in vars(buffers).items():
            if isinstance(value, torch.Tensor) or key == "tiles":
                setattr(buffers, key, faked(value, device))
        # The operator's shape function stands for the kernels.
        out = forward(inputs.batch(), pool, branches)
        assert out.shape == (ROWS, 384)
        assert out.device.type == device


def test_a_step_is_the_same_operators_numbers_and_addresses_whoever_is_in_it(monkeypatch):
    without_compiled_loops(monkeypatch)
    forward = FORWARDS["llama"]
    pool, factors = filled_pool(forward), Factors(arena(forward))
    inputs, branches = StaticDecode(ROWS, WIDTH, CPU), StaticBatch([(factors, 2)], ROWS, CPU)
    tapes = []
    with branches_in_torch(), torch.inference_mode():
        for rows in (
            [],
            [RowTokens([7], [0], np.array([5]))],
            [RowTokens([n], [3 * n], np.arange(3 * n + 1) + 20 * n + 2) for n in range(4)],
        ):
            inputs.write(rows)
            with Tape() as tape:
                forward(inputs.batch(), pool, branches)
            tapes.append(tape.lines)
    assert tapes[0] == tapes[1] == tapes[2]
    assert sum(name == "persona_sdk::low_rank_add" for name, _ in tapes[0]) == len(forward.sites)


def test_a_pass_that_reads_positions_back_says_so(tiny):
    assert FORWARDS["llama"].capturable
    module = copy.deepcopy(tiny.module)
    module.model.rotary_emb.rope_type = "dynamic"
    assert not FusedForward(blocks_of(module)).capturable
    general = GeneralForward(tiny)
    assert not general.capturable
    general.close()
