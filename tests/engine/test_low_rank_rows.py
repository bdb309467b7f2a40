"""The patch table: what a batch is made of, and when it is made anew."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.engine.low_rank import rows
from persona_sdk.engine.low_rank.lanes import BoundPatch, Factors, lanes_of
from persona_sdk.engine.low_rank.rows import PatchTable
from persona_sdk.engine.low_rank.sites import Site, SiteModule
from persona_sdk.errors import EngineError

from .low_rank_support import World, added

CPU = torch.device("cpu")
WORLD = World()


@pytest.fixture
def table():
    table = PatchTable(calibrate=False)
    table.bind(3, [WORLD.patch(0, 1, (1.0,)), WORLD.patch(1, 2, (0.5,))])
    table.bind(5, [WORLD.patch(0, 2, (1.0,))])
    return table


def test_rows_without_patches_need_no_batch(table):
    assert table.batch([0, 1], [1, 1], CPU) is None
    assert table.batch([0, 3], [1, 1], CPU) is not None
    assert table.patches(0) == ()
    table.unbind(0)
    table.unbind(3)
    assert table.batch([0, 3], [1, 1], CPU) is None


def test_a_batch_is_kept_until_something_changes(table):
    first = table.batch([3, 5], [1, 1], CPU)
    assert table.batch([3, 5], [1, 1], CPU) is first
    assert table.batch([5, 3], [1, 1], CPU) is not first
    assert table.batch([3, 5], [2, 1], CPU) is not first
    assert table.batch([3, 5], [1, 1], CPU) is first
    for change in (
        lambda: table.steer(3, 1, (0.25,) * len(table.patches(3)[1].gate)),
        lambda: table.unbind(5),
        lambda: table.bind(5, [WORLD.patch(0, 3, (1.0,))]),
    ):
        before = table.batch([3, 5], [1, 1], CPU)
        change()
        assert table.batch([3, 5], [1, 1], CPU) is not before


def test_few_batches_are_kept(table):
    for length in range(1, 50):
        table.batch([3], [length], CPU)
    assert len(table._batches) <= 4


def test_an_arena_that_grew_is_read_anew():
    world = World()
    table = PatchTable(calibrate=False)
    table.bind(0, [world.patch(0, 1, (1.0,))])
    inputs = world.inputs(1)
    before = added(table.batch([0], [1], CPU), inputs)
    arena = world.arenas[0]
    old, arena.data = arena.data, torch.cat([arena.data, torch.zeros_like(arena.data)])
    old.zero_()
    after = added(table.batch([0], [1], CPU), inputs)
    assert all(map(torch.equal, before, after))


def test_steering_changes_the_gate_of_one_patch(table):
    rank = table.patches(3)[0].slot.rank
    table.steer(3, 0, (-2.0,) * rank)
    assert table.patches(3)[0].gate == (-2.0,) * rank
    assert table.patches(3)[1] == WORLD.patch(1, 2, (0.5,))
    inputs = WORLD.inputs(1)
    found = added(table.batch([3], [1], CPU), inputs)
    for one, expected in zip(found, WORLD.reference([table.patches(3)], [1], inputs), strict=True):
        torch.testing.assert_close(one.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-4)
    with pytest.raises(EngineError, match="none with number 2"):
        table.steer(3, 2, (1.0,) * rank)
    with pytest.raises(EngineError, match="rank 7"):
        table.steer(3, 0, (1.0, 2.0))


def test_a_gate_has_one_number_per_direction():
    with pytest.raises(EngineError, match="holds 3 numbers, the adapter has rank 8"):
        BoundPatch(WORLD.slot(0, 0), (1.0,) * 3)


def test_sites_nobody_patches_are_left_alone(table):
    batch = table.batch([3], [1], CPU)
    y = torch.ones(1, 4)
    batch.add(Site(99, 3, (SiteModule("elsewhere", 4, 0),)), torch.ones(1, 3), y)
    assert torch.equal(y, torch.ones(1, 4))


def test_rows_whose_gates_are_all_zero_change_nothing():
    table = PatchTable(calibrate=False)
    table.bind(0, [WORLD.patch(0, 1, (0.0,))])
    inputs = WORLD.inputs(1)
    found = added(table.batch([0], [1], CPU), inputs)
    assert all(torch.equal(one, y) for one, (_, y) in zip(found, inputs, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 3)), min_size=1, max_size=6)
)
def test_lanes_hold_every_patch_of_every_row_once(table_rows):
    bound = [[WORLD.patch(0, index, (1.0,)) for index in indices] for indices, _ in table_rows]
    lengths = [length for _, length in table_rows]
    lanes = lanes_of(Factors(WORLD.arenas[0]), bound, lengths)
    for row, (indices, length) in enumerate(table_rows):
        found = [int(lane.slots[row]) for lane in lanes if lane.slots[row] >= 0]
        assert found == (indices if length else [])
    for lane in lanes:
        assert lane.shape.tokens == sum(stop - start for _, start, stop in lane.runs)
        assert set(lane.digests) == set(lane.used.tolist())
        assert lane.shape.longest * lane.shape.slots >= lane.shape.tokens
        for slot, start, stop in lane.runs:
            assert (lane.token_slots[start:stop] == slot).all()


def test_a_long_life_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(rows, "_KEPT_DIGESTS", 50)
    table = PatchTable(calibrate=False, kernel="dense")
    arena = WORLD.arenas[0]
    for number in range(500):
        slot = type(WORLD.slot(0, 0))(arena, 0, 1, str(number))
        table.bind(0, [BoundPatch(slot, (1.0,))])
        table.batch([0], [1], CPU)
    assert len(table._finite) <= 51
    assert len(table._factors) == 1
