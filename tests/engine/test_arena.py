"""Arenas: slots that stay where they are while the arena grows and shrinks, and memory that runs out."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from persona_sdk.engine import pages
from persona_sdk.engine.low_rank.arena import Arena, Slot
from persona_sdk.engine.low_rank.blocks import BlockLayout, layout_of
from persona_sdk.engine.low_rank.sites import single_sites
from persona_sdk.errors import DeviceMemoryError, EngineError
from persona_sdk.tensors import low_rank_bundle

SITES = single_sites({"a": (4, 6)})
LAYOUT = BlockLayout(8, SITES, frozenset({"a"}))


def arena() -> Arena:
    return Arena(LAYOUT, torch.device("cpu"), torch.float32)


class Slots(RuleBasedStateMachine):
    """Against a dictionary of what every taken slot holds."""

    def __init__(self) -> None:
        super().__init__()
        self.arena, self.held, self.mark = arena(), {}, 0.0

    @rule(room=st.integers(1, 6))
    def take(self, room: int) -> None:
        before = self.arena.slots
        index = self.arena.take(before + room)
        assert index not in self.held
        assert self.arena.slots <= max(before + room, before)
        assert self.arena.slots <= max(2 * before, 1)
        self.mark += 1
        self.arena.write(index, torch.full((LAYOUT.size,), self.mark))
        self.held[index] = self.mark

    @precondition(lambda self: self.held)
    @rule(data=st.data(), erase=st.booleans())
    def give(self, data: st.DataObject, erase: bool) -> None:
        index = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[index]
        self.arena.give(index, erase=erase)
        assert erase != bool(self.arena.data[index].any())

    @rule(more=st.integers(0, 3))
    def shrink(self, more: int) -> None:
        least = max(self.held, default=-1) + 1
        self.arena.shrink(min(least + more, self.arena.slots))

    @invariant()
    def taken_slots_hold_what_was_written(self) -> None:
        for index, mark in self.held.items():
            assert (self.arena.data[index] == mark).all()
        assert self.arena.free == self.arena.slots - len(self.held)
        assert self.arena.bytes == self.arena.data.numel() * 4


Slots.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestSlots = Slots.TestCase


def test_growth_doubles_and_stops_at_the_limit() -> None:
    slots = arena()
    sizes = []
    for _ in range(11):
        slots.take(11)
        sizes.append(slots.slots)
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]
    with pytest.raises(EngineError, match="11 slots, all taken"):
        slots.take(11)


def test_slots_in_use_are_not_cut_off() -> None:
    slots = arena()
    for _ in range(4):
        slots.take(4)
    slots.give(1, erase=True)
    with pytest.raises(EngineError, match="in use"):
        slots.shrink(2)
    assert slots.slots == 4


def test_memory_left_behind_holds_nothing() -> None:
    slots = arena()
    slots.write(slots.take(9), torch.ones(LAYOUT.size))
    small = slots.data
    slots.take(9)
    assert slots.data is not small
    assert not small.any()
    assert slots.data[0].all()


def test_new_slots_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "empty", lambda *shape, **options: torch.full(shape, 7.0))
    slots = arena()
    slots.write(slots.take(1), torch.ones(LAYOUT.size))
    slots.take(4)
    slots.take(4)
    assert slots.slots == 4
    assert (slots.data[0] == 1).all()
    assert not slots.data[1:].any()


def test_a_new_adapter_leaves_nothing_of_the_former_one() -> None:
    slots = arena()
    large = low_rank_bundle({"a": (torch.ones(8, 4), torch.ones(6, 8))})
    small = low_rank_bundle({"a": (torch.full((2, 4), 5.0), torch.full((6, 2), 5.0))})
    assert layout_of(SITES, large, 8) == layout_of(SITES, small, 2)
    index = slots.take(1)
    slots.write(index, LAYOUT.pack(large))
    slots.give(index, erase=False)
    assert slots.take(1) == index
    slots.write(index, LAYOUT.pack(small))
    assert not (slots.data[index] == 1).any()
    assert int((slots.data[index] == 5).sum()) == 2 * (4 + 6)
    assert int((slots.data[index] == 0).sum()) == 6 * (4 + 6)


def test_out_of_memory_grows_by_one_and_then_fails_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = arena()
    for _ in range(4):
        slots.take(9)
    real, limit = pages.empty, 5

    def empty(count: int, *rest: int, **options: object) -> torch.Tensor:
        if count > limit:
            raise torch.OutOfMemoryError("not enough memory")
        return real(count, *rest, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(pages, "empty", empty)
    assert slots.take(9) == 4
    assert slots.slots == 5
    with pytest.raises(DeviceMemoryError, match="beside 5 of its kind") as caught:
        slots.take(9)
    assert caught.value.retryable
    slots.give(2, erase=False)
    assert slots.take(9) == 2


def test_arenas_made_in_a_pass_can_be_erased_outside() -> None:
    with torch.inference_mode():
        slots = arena()
        slots.write(slots.take(1), torch.ones(LAYOUT.size))
    slots.give(0, erase=True)
    assert not slots.data.any()


def test_slots_are_equal_only_to_themselves() -> None:
    slots = arena()
    assert Slot(slots, 0, 2, "d") != Slot(slots, 0, 2, "d")
    assert len({Slot(slots, 0, 2, "d"), Slot(slots, 0, 2, "d")}) == 2
