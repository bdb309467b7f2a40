"""Room for lanes in captured steps: always enough, seldom another, nothing kept for ever."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.engine.low_rank.lanes import Factors, Lane
from persona_sdk.engine.low_rank.room import LaneRoom

from .low_rank_support import World

WORLD = World()
FACTORS = [Factors(arena) for arena in WORLD.arenas]
NONE = np.zeros(0, np.int64)


def lanes(counts):
    """As many lanes of every arena."""
    return [
        Lane(factors, factors.arena.data, NONE, np.zeros((0, factors.rank), np.float32), NONE, {})
        for factors, count in zip(FACTORS, counts, strict=True)
        for _ in range(count)
    ]


counts = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any)


@given(steps=st.lists(counts, min_size=1, max_size=30))
def test_there_is_room_for_every_step_and_it_changes_with_powers_of_two_only(steps):
    room, seen = LaneRoom(), []
    for step in steps:
        held = room.holding(lanes(step))
        found = {id(factors): count for factors, count in held}
        for factors, count in zip(FACTORS, step, strict=True):
            assert found.get(id(factors), 0) >= count
        assert [factors.order for factors, _ in held] == sorted(factors.order for factors, _ in held)
        assert all(count.bit_count() == 1 and count <= 16 for _, count in held)
        if not any(held is before for before in seen):
            seen.append(held)
    assert len(seen) <= 2 * 5, "five powers of two hold up to nine lanes, of two arenas"
    assert room.holding(lanes(steps[-1])) is room.holding(lanes(steps[-1]))


def test_an_arena_nobody_needs_for_long_is_let_go_of():
    room = LaneRoom(idle=3)
    both = room.holding(lanes((1, 3)))
    for _ in range(3):
        assert room.holding(lanes((1, 0))) is both
    assert room.holding(lanes((1, 0))) == ((FACTORS[0], 1),)
    assert room.holding(lanes((0, 1))) == ((FACTORS[1], 1), (FACTORS[0], 1))


def test_arenas_that_patch_different_modules_have_different_orders():
    assert len({factors.order for factors in FACTORS}) == len(FACTORS)
    layout = WORLD.arenas[0].layout
    twin = Factors(SimpleNamespace(layout=layout, data=WORLD.arenas[0].data))
    assert twin.order == FACTORS[0].order
