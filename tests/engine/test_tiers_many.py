"""Tiers under any order of operations, and under thousands of adapters."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from persona_sdk.engine.low_rank.arena import Slot
from persona_sdk.tensors import TensorBundle

from .tiers_support import BLOCK, FILE, arenas, bundle, digest, everything, holds, settle, take, tiers, traces

KINDS = [(3, "a"), (8, "a"), (12, "a"), (2, "ab")]  # three arenas
MEMBERS = st.integers(0, 11)


def member(number: int) -> tuple[int, TensorBundle]:
    rank, modules = KINDS[number % len(KINDS)]
    return rank, bundle(number, rank, modules)


class TierMachine(RuleBasedStateMachine):
    """Against a list of what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(os.environ["TIER_TEST_FOLDER"])
        self.tiers = tiers(device=7, host=4, disk=5, folder=self.folder)
        self.held: list[tuple[int, Slot, int]] = []
        self.gone: set[int] = set()  # dropped, and not asked for since

    @rule(number=MEMBERS)
    def acquire(self, number: int) -> None:
        rank, factors = member(number)
        before = self.tiers.resident(digest(number))
        slot = self.tiers.acquire(digest(number), rank, lambda: factors)
        self.gone.discard(number)
        if slot is None:
            assert not before
            assert self.held
        else:
            assert (slot.rank, slot.digest) == (rank, digest(number))
            self.held.append((number, slot, slot.index))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, slot, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.tiers.release(slot)

    @rule(number=MEMBERS)
    def prefetch(self, number: int) -> None:
        rank, factors = member(number)
        self.tiers.prefetch(digest(number), rank, lambda: factors)
        self.gone.discard(number)
        settle(self.tiers)

    @rule(numbers=st.sets(MEMBERS, max_size=4))
    def drop(self, numbers: set[int]) -> None:
        self.tiers.drop([digest(number) for number in numbers])
        self.gone |= numbers

    @rule()
    def clear(self) -> None:
        self.tiers.clear()
        self.gone = set(range(12))

    @invariant()
    def held_slots_hold_their_adapters(self) -> None:
        for number, slot, index in self.held:
            assert slot.index == index
            assert holds(slot, member(number)[1])
        assert self.tiers.stats().held == len({slot for _, slot, _ in self.held})
        places = {(id(slot.arena), slot.index) for _, slot, _ in self.held}
        assert len(places) == self.tiers.stats().held

    @invariant()
    def users_are_counted(self) -> None:
        for resident in self.tiers._slots._holders.values():
            assert resident.users == sum(slot is resident.slot for _, slot, _ in self.held)

    @invariant()
    def budgets_hold(self) -> None:
        settle(self.tiers)
        stats, options = self.tiers.stats(), self.tiers.options
        device = sum(arena.data.numel() * 4 for arena in arenas(self.tiers))
        host = sum(block.data.numel() * 4 for block in self.tiers._host._blocks.values())
        disk = sum(path.stat().st_size for path in self.folder.iterdir())
        assert device == stats.device.bytes <= options.device_bytes
        assert host == stats.host.bytes <= options.host_bytes
        assert disk == stats.disk.bytes <= options.disk_bytes
        ahead = [block for block in self.tiers._host._blocks.values() if block.ahead]
        assert self.tiers._host.ahead_bytes == sum(block.bytes for block in ahead)

    @invariant()
    def every_slot_is_free_or_somebody_s(self) -> None:
        slots = sum(arena.slots for arena in arenas(self.tiers))
        free = sum(arena.free for arena in arenas(self.tiers))
        assert slots - free == self.tiers.stats().device.count

    @invariant()
    def the_forgotten_is_gone(self) -> None:
        held = {number for number, _, _ in self.held}
        left = everything(self.tiers, self.folder)
        for number in self.gone - held:
            assert not self.tiers.resident(digest(number))
            assert not any(trace in left for trace in traces(member(number)[1]))

    def teardown(self) -> None:
        self.tiers.close()
        assert not list(self.folder.iterdir())


def test_any_order_of_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIER_TEST_FOLDER", str(tmp_path))
    case = TierMachine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    case("runTest").runTest()


def calls(work: Callable[[], None]) -> int:
    """Python functions entered by this thread."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def longest(thing: object, seen: set[int]) -> int:
    """Length of the longest container that belongs to the tiers."""
    if id(thing) in seen or isinstance(thing, str | bytes | Tensor | type):
        return 0
    seen.add(id(thing))
    if isinstance(thing, Mapping):
        below = [*thing, *thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset):
        below = [*thing]
    elif type(thing).__module__.startswith("persona_sdk"):
        return max((longest(item, seen) for item in vars(thing).values()), default=0)
    else:
        return 0
    return max([len(thing), *(longest(item, seen) for item in below)], default=0)


@pytest.mark.parametrize(("adapters", "disk"), [(10_000, 0), (3_000, 128)])
def test_ten_thousand_adapters_cost_what_a_thousand_do(tmp_path: Path, adapters: int, disk: int) -> None:
    device, host, part = 32, 64, adapters // 10
    large = tiers(device, host, disk, folder=tmp_path)
    one = bundle(1)

    def touch(numbers: range) -> None:
        for number in numbers:
            large.release(take(large, number, lambda: one))

    known, work = [], []
    for start in range(0, adapters, part):
        work.append(calls(lambda start=start: touch(range(start, start + 30))) if start else 0)  # type: ignore[misc]
        touch(range(start + 30 * (start > 0), start + part))
        settle(large)
        known.append(longest(large, set()))
        stats = large.stats()
        assert stats.device.bytes == device * BLOCK
        assert stats.host.bytes == host * BLOCK
        assert stats.disk.bytes <= disk * FILE
        assert stats.disk.bytes > (disk - 1) * FILE or start == 0
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == stats.disk.bytes
    assert max(known) <= max(host, disk) + 8
    assert known[-1] == known[2]
    assert max(work[1:]) <= 1.1 * min(work[1:])  # the worker writes more or less of the files
    assert large.stats().loads == adapters
    large.close()
