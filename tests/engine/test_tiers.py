"""Tiers: an adapter comes from the nearest one, budgets hold, and what fails leaves nothing behind."""

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from persona_sdk.engine import pages
from persona_sdk.errors import (
    BudgetError,
    CorruptBlobError,
    DeviceMemoryError,
    EngineError,
    IncompatibleAdapterError,
)
from persona_sdk.tensors import TensorBundle, low_rank_bundle

from .tiers_support import BLOCK, arenas, bundle, digest, holds, never, take, tiers, use


def test_an_adapter_comes_from_the_nearest_tier(tmp_path: Path) -> None:
    with_disk = tiers(device=1, host=1, disk=4, folder=tmp_path)
    use(with_disk, 1)
    assert with_disk.resident(digest(1))
    take(with_disk, 1, never)
    with_disk.release(take(with_disk, 1, never))
    assert with_disk.stats().device.hits == 2
    with_disk.close()

    staged = tiers(device=1, host=2, disk=4, folder=tmp_path)
    use(staged, 1, 2)
    assert holds(take(staged, 1, never), bundle(1))
    assert staged.stats().host.hits == 1
    staged.close()

    staged = tiers(device=1, host=1, disk=4, folder=tmp_path)
    use(staged, 1, 2, 3)
    assert holds(take(staged, 1, never), bundle(1))
    assert staged.stats().disk.hits == 1
    assert staged.stats().loads == 3


def test_without_host_memory_the_disk_comes_next(tmp_path: Path) -> None:
    staged = tiers(device=1, host=0, disk=4, folder=tmp_path)
    use(staged, 1, 2)
    assert holds(take(staged, 1, never), bundle(1))
    assert staged.stats().host.bytes == 0


def test_without_other_tiers_it_is_loaded_again() -> None:
    bare = tiers(device=1, host=0)
    use(bare, 1, 2, 1)
    assert bare.stats().loads == 3


def test_acquiring_in_a_pass_and_dropping_outside_works() -> None:
    small = tiers()
    with torch.inference_mode():
        use(small, 1, 2, 3, 4)
    small.drop([digest(number) for number in range(5)])
    assert not any(arena.data.any() for arena in arenas(small))


def test_the_slot_of_a_smaller_adapter_keeps_nothing_of_the_one_before() -> None:
    single = tiers(device=1, host=0)
    first = bundle(1, rank=8)
    slot = single.acquire(digest(1), 8, lambda: first)
    assert slot is not None
    single.release(slot)
    second = bundle(2, rank=1)
    slot = single.acquire(digest(2), 1, lambda: second)
    assert slot is not None
    assert holds(slot, second)
    assert int((slot.arena.data[slot.index] != 0).sum()) == 4 + 6


def test_an_updated_adapter_takes_another_slot_and_the_old_one_goes_when_released() -> None:
    small = tiers(device=2)
    old = take(small, 1)
    new = take(small, 2)
    assert (old.arena, old.index) != (new.arena, new.index)
    small.drop([digest(1)])
    assert holds(old, bundle(1))
    assert not small.resident(digest(1))
    small.release(old)
    assert not old.arena.data[old.index].any()
    assert holds(new, bundle(2))


def test_one_adapter_under_two_plan_ranks_has_a_slot_of_each_rank() -> None:
    small = tiers()
    three, five = take(small, 1), small.acquire(digest(1), 5, lambda: bundle(1))
    assert five is not None
    assert (three.rank, five.rank) == (3, 5)
    small.drop([digest(1)])
    for slot in (three, five):
        assert holds(slot, bundle(1))
        small.release(slot)
    assert not any(arena.data.any() for arena in arenas(small))


def test_when_all_slots_are_held_the_request_waits_and_nothing_is_loaded_twice() -> None:
    small = tiers(device=2, host=0)
    held = [take(small, 1), take(small, 2)]
    loads: list[int] = []

    def load() -> TensorBundle:
        loads.append(1)
        return bundle(3)

    for _ in range(5):
        assert small.acquire(digest(3), 3, load) is None
    assert len(loads) == 1
    assert [holds(slot, bundle(number)) for slot, number in zip(held, (1, 2), strict=True)] == [True, True]
    small.release(held[0])
    assert holds(take(small, 3, load), bundle(3))


def test_an_adapter_larger_than_the_whole_budget_is_refused() -> None:
    small = tiers(device=1)
    for _ in range(2):
        with pytest.raises(BudgetError, match=f"One adapter of {2 * BLOCK} bytes"):
            small.acquire(digest(1), 9, lambda: bundle(1, rank=9))
    use(small, 2)


def test_a_scan_of_cold_adapters_does_not_flush_the_hot_ones() -> None:
    small = tiers(device=8, host=0)
    hot = range(5)
    use(small, *hot, *hot)
    use(small, *range(100, 200))
    assert all(small.resident(digest(number)) for number in hot)
    use(small, *range(200, 210), *range(200, 210))  # a new favourite set displaces the old one
    use(small, *range(205, 210), *range(205, 210))
    assert all(small.resident(digest(number)) for number in range(205, 210))


def test_an_arena_gets_room_from_one_that_has_more() -> None:
    small = tiers(device=16, host=64)
    use(small, *range(16))
    slots = [small.acquire(digest(100 + n), 12, lambda n=n: bundle(100 + n, rank=12)) for n in range(4)]
    assert all(slots)
    assert small.stats().device.bytes <= 16 * BLOCK
    for n, slot in enumerate(slots):
        assert holds(slot, bundle(100 + n, rank=12))
    for number in range(16):  # what had to go for them is in host memory
        small.release(take(small, number, never))


def test_held_slots_keep_another_arena_from_taking_their_room() -> None:
    small = tiers(device=4)
    held = [take(small, number) for number in range(4)]
    for slot in held[:3]:
        small.release(slot)
    # The highest slot is held, so the arena cannot shrink below it.
    assert small.acquire(digest(9), 12, lambda: bundle(9, rank=12)) is None
    assert holds(held[3], bundle(3))
    small.release(held[3])
    assert small.acquire(digest(9), 12, never) is not None


def test_out_of_memory_reuses_a_slot_or_fails_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiers(device=8)
    use(small, 1)
    real = pages.empty

    def empty(*shape: int, **options: object) -> Tensor:
        if len(shape) == 2 and shape[0] > 1:
            raise torch.OutOfMemoryError("not enough memory")
        return real(*shape, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(pages, "empty", empty)
    held = take(small, 2)
    assert not small.resident(digest(1))
    with pytest.raises(DeviceMemoryError):
        take(small, 3)
    assert holds(held, bundle(2))
    small.release(held)
    assert holds(take(small, 3, never), bundle(3))


@pytest.mark.parametrize("error", [CorruptBlobError("damaged"), OSError("unreachable"), MemoryError()])
def test_an_error_of_the_store_reaches_the_caller_and_leaves_nothing(error: Exception) -> None:
    small = tiers()

    def load() -> TensorBundle:
        raise error

    for _ in range(2):
        with pytest.raises(type(error)):
            take(small, 1, load)
    assert not small.resident(digest(1))
    assert holds(take(small, 1), bundle(1))


def test_a_bundle_that_does_not_fit_is_refused_by_name() -> None:
    small = tiers()
    with pytest.raises(IncompatibleAdapterError, match=r"A \(3, 5\) and B \(6, 3\) for 'a'"):
        take(small, 1, lambda: low_rank_bundle({"a": (torch.ones(3, 5), torch.ones(6, 3))}))
    with pytest.raises(IncompatibleAdapterError, match="no B"):
        take(small, 1, lambda: {"a.A": torch.ones(3, 4)})
    assert small.stats().device.count == small.stats().host.count == 0


def test_a_corrupt_flat_file_is_loaded_anew(tmp_path: Path) -> None:
    staged = tiers(device=1, host=1, disk=4, folder=tmp_path)
    use(staged, 1, 2, 3)
    (path,) = (path for path in tmp_path.iterdir() if digest(1) in path.name)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    assert holds(take(staged, 1), bundle(1))
    assert staged.stats().damaged == 1
    assert staged.stats().loads == 4
    assert not path.exists()


def test_a_full_disk_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    staged = tiers(device=1, host=1, disk=4, folder=tmp_path)
    monkeypatch.setattr(os, "write", full)
    use(staged, *range(6))
    assert staged.stats().disk.count == staged.stats().disk.bytes == 0
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    use(staged, *range(6))
    assert staged.stats().disk.count > 0


def test_releasing_what_nobody_holds_is_an_error() -> None:
    small = tiers()
    slot = take(small, 1)
    small.release(slot)
    with pytest.raises(EngineError, match="Nobody holds"):
        small.release(slot)
