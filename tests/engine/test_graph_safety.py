"""What makes a decode step fit for a CUDA graph, checked without one: shapes, addresses, no read-back."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from persona_sdk.engine.low_rank.graphs import Eager, GraphPool, StaticBatch
from persona_sdk.engine.low_rank.lane_buffers import LaneBuffers
from persona_sdk.engine.low_rank.lanes import Factors, Lane, lanes_of
from persona_sdk.engine.low_rank.room import bucket_of
from persona_sdk.engine.low_rank.triton_indexed import TritonIndexed
from persona_sdk.errors import EngineError

from .low_rank_support import SITES, Arena, World

CPU = torch.device("cpu")
WORLD = World()
FACTORS = [Factors(arena) for arena in WORLD.arenas]
PATCHED = [set(factors.sites) for factors in FACTORS]


def lanes(rows, lengths):
    """Of all arenas; a row is a list of (arena, slot, gate)."""
    found = []
    for number, factors in enumerate(FACTORS):
        own = [[WORLD.patch(*patch) for patch in row if patch[0] == number] for row in rows]
        found += lanes_of(factors, own, lengths)
    return found


class Recorder(TorchDispatchMode):
    """Names of all operators; those of this package are not run, as they need Triton."""

    def __init__(self):
        super().__init__()
        self.names, self.run_ours = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        if function.namespace == "persona_sdk" and not self.run_ours:
            return None
        return function(*args, **(kwargs or {}))


def added(batch, tokens):
    with Recorder() as recorder:
        inputs = [(torch.zeros(tokens, s.d_in), torch.zeros(tokens, s.width)) for s in SITES]
        recorder.names.clear()
        for site, (x, y) in zip(SITES, inputs, strict=True):
            batch.add(site, x, y)
    return recorder.names


def test_a_step_is_one_operator_per_arena_and_site_whoever_is_in_it():
    batch = StaticBatch([(factors, 2) for factors in FACTORS], 8, CPU)
    expected = ["persona_sdk::low_rank_add"] * sum(map(len, PATCHED))
    for rows in (
        [[]],
        [[(0, 1, (1.0,))]] * 8,
        [[(0, n % 6, (0.5,)), (1, n % 5, (2.0,)), (1, 0, (1.0,))] for n in range(8)],
    ):
        batch.write(lanes(rows, [1] * len(rows)))
        assert added(batch, 8) == expected


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_pass_through(prompts, device):
    """Under fake tensors an operator that needs a value, or a shape that depends on one, is an error."""
    tokens = 40 if prompts else 4
    buffers = LaneBuffers(FACTORS[0], lanes=2, rows=4, tokens=tokens, prompts=prompts, device=CPU)
    with FakeTensorMode(), Recorder() as recorder:
        fake = copy.copy(buffers)
        for name, value in vars(buffers).items():
            if isinstance(value, torch.Tensor):
                setattr(fake, name, torch.empty(value.shape, dtype=value.dtype, device=device))
        fake.tiles = {
            site: torch.empty(tiles.shape, dtype=torch.int64, device=device)
            for site, tiles in buffers.tiles.items()
        }
        x, y = torch.empty(tokens, 12, device=device), torch.empty(tokens, 22, device=device)
        with pytest.raises(DataDependentOutputException):
            torch.empty((), device=device).item()  # what the mode is there to catch
        recorder.run_ours = True
        TritonIndexed(fake).add(0, x, y)
        assert y.shape == (tokens, 22)
        assert y.device.type == device
    assert recorder.names[-1] == "persona_sdk::low_rank_add"


rows_of_patches = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(0, 5),
            st.lists(st.sampled_from([0.0, 1.0, -2.5]), min_size=1, max_size=8).map(tuple),
        ),
        max_size=2,
    ),
    min_size=1,
    max_size=5,
)


@given(before=rows_of_patches, after=rows_of_patches)
def test_rows_change_in_place(before, after):
    batch = StaticBatch([(factors, 2) for factors in FACTORS], 5, CPU)
    addresses = batch.addresses
    for rows in (before, after):
        found = lanes(rows, [1] * len(rows))
        assert batch.fits(found)
        batch.write(found)
        assert batch.addresses == addresses
    for factors in FACTORS:
        own = [lane for lane in found if lane.factors is factors]
        buffers = batch.buffers(factors)
        for place in range(2):
            slots, gates = np.full(6, -1), np.zeros((6, factors.rank), np.float32)
            if place < len(own):
                slots[: len(rows)], gates[: len(rows)] = own[place].slots, own[place].gates
            used = [max((k + 1 for k in range(factors.rank) if gate[k]), default=0) for gate in gates]
            np.testing.assert_array_equal(buffers.slots[place], slots)
            np.testing.assert_array_equal(buffers.gates[place], gates)
            np.testing.assert_array_equal(buffers.used[place], np.where(slots < 0, 0, used))


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5), spare=st.integers(0, 20))
def test_segments_hold_every_token_of_its_row_once(lengths, spare):
    rows = [[(0, 1, (1.0,))]] * len(lengths)
    total = sum(lengths)
    buffers = LaneBuffers(
        FACTORS[0], lanes=1, rows=len(lengths), tokens=total + spare, prompts=True, device=CPU
    )
    own = [lane for lane in lanes(rows, lengths) if lane.factors is FACTORS[0]]
    buffers.write(own)
    row_of_token = [-1] * (total + spare)
    for row, first, count in buffers.segments.tolist():
        assert 0 <= count <= 16
        for token in range(first, first + count):
            assert row_of_token[token] == -1
            row_of_token[token] = row
    expected = np.repeat(np.arange(len(lengths)), lengths).tolist() if own else [-1] * total
    assert row_of_token == expected + [-1] * spare
    assert buffers.row_of_token.tolist()[:total] == (expected if own else [len(lengths)] * total)
    assert buffers.row_of_token.tolist()[total:] == [len(lengths)] * spare


def test_lanes_that_do_not_fit_are_refused():
    batch = StaticBatch([(FACTORS[0], 1)], 2, CPU)
    for rows, lengths in (
        ([[(0, 1, (1.0,))]] * 3, [1] * 3),  # too many rows
        ([[(0, 1, (1.0,)), (0, 2, (1.0,))]], [1]),  # too many patches
        ([[(0, 1, (1.0,))]], [2]),  # a prompt
    ):
        found = lanes(rows, lengths)
        assert not batch.fits(found)
        with pytest.raises(EngineError, match="do not fit"):
            batch.write(found)
    assert not batch.fits(lanes([[(1, 1, (1.0,))]], [1])), "another arena"


def test_an_arena_that_grew_is_seen():
    arena = Arena(WORLD.arenas[0].layout, WORLD.arenas[0].data)
    batch = StaticBatch([(Factors(arena), 1)], 2, CPU)
    before = batch.addresses
    arena.data = torch.cat([arena.data, arena.data])
    batch.write(())
    assert batch.addresses != before


@given(st.integers(1, 5000))
def test_a_bucket_is_the_least_power_of_two(rows):
    bucket = bucket_of(rows)
    assert bucket.bit_count() == 1
    assert rows <= bucket < 2 * rows


class Taped:
    """Captures by running a step once, as a graph does, and replays the values of its buffer."""

    def __init__(self, refuse=()):
        self.captured, self.refuse = [], refuse

    def record(self, step):
        self.captured.append(step)
        if step in self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Eager(step)


def test_a_step_is_captured_once_per_key_and_again_when_an_address_changes():
    buffer, tape = torch.zeros(4), Taped()
    pool = GraphPool(CPU, record=tape.record)

    def step():
        return buffer + 1

    for value in range(3):
        buffer.fill_(value)
        assert pool.run(step, (4, "adapters"), (1, 2)).tolist() == [value + 1] * 4
    assert len(tape.captured) == 1
    pool.run(step, (4, "none"), (1, 2))
    assert (len(tape.captured), len(pool)) == (2, 2)
    pool.run(step, (4, "adapters"), (1, 3))
    assert (len(tape.captured), len(pool)) == (3, 2)


def test_the_least_recently_used_capture_is_dropped():
    tape = Taped()
    pool = GraphPool(CPU, kept=2, record=tape.record)
    for key in (1, 2, 1, 4, 1, 2):
        pool.run(lambda: torch.zeros(1), key)
    assert (len(tape.captured), len(pool)) == (4, 2)
    pool.clear()
    assert len(pool) == 0


def test_a_step_that_cannot_be_captured_runs_all_the_same(caplog):
    def step():
        return torch.ones(2)

    tape = Taped(refuse=[step])
    pool = GraphPool(CPU, record=tape.record)
    assert pool.run(step, 2).tolist() == pool.run(step, 2).tolist() == [1, 1]
    assert len(tape.captured) == 1
    assert "cannot be captured" in caplog.text


@pytest.mark.gpu
def test_a_captured_step_follows_its_rows():
    device = torch.device("cuda")
    arena = Arena(WORLD.arenas[0].layout, WORLD.arenas[0].data.to(device))
    factors, pool = Factors(arena), GraphPool(device)
    batch = StaticBatch([(factors, 2)], 4, device)
    x, y = torch.randn(4, 12, device=device), torch.randn(4, 22, device=device)

    def step():
        out = y.clone()
        batch.add(SITES[0], x, out)
        return out

    for shift in range(3):
        rows = [[(0, (n + shift) % 6, (0.5, -1.0)), (0, shift, (2.0,))] for n in range(4)]
        found = [
            Lane(factors, arena.data, lane.slots, lane.gates, lane.lengths, lane.digests)
            for lane in lanes(rows, [1] * 4)
        ]
        batch.write(found)
        bound = [[WORLD.patch(*patch) for patch in row] for row in rows]
        inputs = [(x.cpu(), y.cpu()), *WORLD.inputs(4)[1:]]
        expected = WORLD.reference(bound, [1] * 4, inputs)[0]
        result = pool.run(step, (4, "adapters"), batch.addresses)
        np.testing.assert_allclose(result.double().cpu().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert len(pool) == 1
