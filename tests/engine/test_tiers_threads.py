"""Tiers under several threads: one load for all who want it, and the forgotten is gone whoever uses it."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_sdk.engine.low_rank.arena import Slot
from persona_sdk.errors import (
    CorruptBlobError,
    EngineError,
    EngineStoppedError,
)
from persona_sdk.tensors import TensorBundle

from .tiers_support import (
    Gate,
    bundle,
    digest,
    everything,
    holds,
    locked,
    never,
    settle,
    take,
    tiers,
    traces,
    use,
)


def test_eight_threads_that_want_one_adapter_load_it_once() -> None:
    small, together = tiers(host=0), threading.Barrier(8)
    loads: list[int] = []
    slots: list[Slot] = []

    def load() -> TensorBundle:
        loads.append(1)
        time.sleep(0.05)
        return bundle(1)

    def want() -> None:
        together.wait(5)
        slots.append(take(small, 1, load))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(loads) == 1
    assert len(slots) == 8
    assert len(set(slots)) == 1
    for slot in slots:
        assert holds(slot, bundle(1))
        small.release(slot)
    with pytest.raises(EngineError):
        small.release(slots[0])


def test_threads_with_adapters_of_their_own_do_not_disturb_each_other(tmp_path: Path) -> None:
    small, faults = tiers(device=6, host=3, disk=5, folder=tmp_path), []

    def work(seed: int) -> None:
        try:
            for number in np.random.default_rng(seed).integers(0, 12, 120).tolist():
                if number == 0:
                    small.drop([digest(seed)])
                small.prefetch(digest(number + 1), 3, lambda number=number: bundle(number + 1))
                slot = small.acquire(digest(number), 3, lambda number=number: bundle(number))
                if slot is not None:
                    if not torch.equal(  # the arena may grow meanwhile: look at it between moves
                        locked(small, slot), slot.arena.layout.pack(bundle(number))
                    ):
                        faults.append(f"{number} is another's")
                    small.release(slot)
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not faults
    assert small.stats().held == 0
    small.close()
    assert not list(tmp_path.iterdir())


def test_acquire_waits_for_a_prefetch_under_way() -> None:
    small, load = tiers(), Gate(1)
    small.prefetch(digest(1), 3, load)
    small.prefetch(digest(1), 3, load)
    assert load.begun.wait(5)
    found: list[Slot] = []
    thread = threading.Thread(target=lambda: found.append(take(small, 1, never)))
    thread.start()
    thread.join(0.02)
    assert not found
    load.go.set()
    thread.join(5)
    assert holds(found[0], bundle(1))
    assert load.count == 1
    assert small.stats().prefetched == 1


def test_nothing_else_waits_for_a_load() -> None:
    small, load = tiers(), Gate(1)
    small.prefetch(digest(1), 3, load)
    assert load.begun.wait(5)
    assert holds(take(small, 2), bundle(2))
    small.drop([digest(2)])
    assert not small.resident(digest(1))
    assert small.stats().loads == 1
    load.go.set()
    settle(small)


def test_a_prefetch_that_fails_is_tried_again_by_acquire() -> None:
    small = tiers()
    small.prefetch(digest(1), 3, never)  # an AssertionError in the thread
    settle(small)

    def damaged() -> TensorBundle:
        raise CorruptBlobError("damaged")

    with pytest.raises(CorruptBlobError):
        take(small, 1, damaged)
    assert holds(take(small, 1), bundle(1))
    small.prefetch(digest(2), 3, lambda: bundle(2))  # the thread is still there
    settle(small)
    assert holds(take(small, 2, never), bundle(2))


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes nothing until the event is set."""
    go, real = threading.Event(), os.write

    def write(handle: int, data: memoryview) -> int:
        assert go.wait(10)
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    yield go
    go.set()


def test_what_waits_for_the_disk_is_still_found(tmp_path: Path, stuck: threading.Event) -> None:
    staged = tiers(device=1, host=1, disk=9, folder=tmp_path)
    for number in range(3):
        staged.release(take(staged, number))
    assert staged._spills
    for number in (0, 1, 2, 0):
        slot = take(staged, number, never)
        assert holds(slot, bundle(number))
        staged.release(slot)
    stuck.set()
    settle(staged)
    staged.close()


def test_who_evicts_faster_than_the_disk_takes_it_writes_too(tmp_path: Path, stuck: threading.Event) -> None:
    staged, done = tiers(device=1, host=1, disk=99, folder=tmp_path), threading.Event()

    def many() -> None:
        for number in range(30):
            staged.release(take(staged, number))
        done.set()

    thread = threading.Thread(target=many)
    thread.start()
    assert not done.wait(0.2)
    assert 1 <= len(staged._spills) <= 6
    stuck.set()
    assert done.wait(10)
    thread.join()
    staged.close()


def test_what_waits_for_the_disk_can_be_forgotten(tmp_path: Path, stuck: threading.Event) -> None:
    staged = tiers(device=1, host=1, disk=9, folder=tmp_path)
    for number in range(4):
        staged.release(take(staged, number))
    waiting = [spill.block.data for spill in staged._spills.values()]
    assert waiting
    dropping = threading.Thread(target=staged.drop, args=([digest(number) for number in range(4)],))
    dropping.start()
    stuck.set()
    dropping.join(5)
    assert not any(data.any() for data in waiting)
    assert not list(tmp_path.iterdir())


def test_prefetching_does_not_push_out_what_it_fetched() -> None:
    small = tiers(device=1, host=8)
    for number in range(20):
        small.prefetch(digest(number), 3, lambda number=number: bundle(number))
        settle(small)
    assert small.stats().prefetched == 5  # the first beyond half of the host memory is the last
    for number in range(5):
        small.release(take(small, number, never))


def test_dropping_erases_every_copy(tmp_path: Path) -> None:
    staged = tiers(device=2, host=3, disk=8, folder=tmp_path)
    use(staged, *range(8))
    present = [n for n in range(8) if all(t in everything(staged, tmp_path) for t in traces(bundle(n)))]
    assert present == list(range(8))
    blocks = {key: block.data for key, block in staged._host._blocks.items()}
    staged.drop([digest(number) for number in (0, 3, 5, 6, 7)])
    left = everything(staged, tmp_path)
    for number in range(8):
        assert all(trace in left for trace in traces(bundle(number))) == (number in (1, 2, 4))
    for key, data in blocks.items():
        assert data.any() == (key.digest in (digest(1), digest(2), digest(4)))
    staged.clear()
    assert not any(trace in everything(staged, tmp_path) for n in range(8) for trace in traces(bundle(n)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_dropped_while_it_loads_is_not_kept(ahead: bool) -> None:
    small, load = tiers(), Gate(1)
    found: list[Slot] = []
    if ahead:
        small.prefetch(digest(1), 3, load)
    else:
        thread = threading.Thread(target=lambda: found.append(take(small, 1, load)))
        thread.start()
    assert load.begun.wait(5)
    small.drop([digest(1)])
    fresh = take(small, 1)  # asked for after the drop: loaded again, by itself
    load.go.set()
    if ahead:
        deadline = time.monotonic() + 5
        while small.stats().loads < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    else:
        thread.join(5)
        assert found[0] is not fresh
        assert holds(found[0], bundle(1))
        small.release(found[0])
        assert not found[0].arena.data[found[0].index].any()
    assert holds(fresh, bundle(1))
    small.release(fresh)
    small.drop([digest(1)])
    assert not any(trace in everything(small, None) for trace in traces(bundle(1)))


def test_a_queued_prefetch_that_is_dropped_does_not_run() -> None:
    small, load = tiers(), Gate(1)
    small.prefetch(digest(1), 3, load)
    assert load.begun.wait(5)
    small.prefetch(digest(2), 3, never)
    small.drop([digest(2)])
    assert not small._queue
    load.go.set()
    settle(small)


def test_closing_erases_all_but_what_is_held(tmp_path: Path) -> None:
    staged = tiers(device=4, host=4, disk=4, folder=tmp_path)
    use(staged, *range(10))
    held = take(staged, 3)
    staged.prefetch(digest(99), 3, lambda: bundle(99))
    settle(staged)
    staged.close()
    assert not list(tmp_path.iterdir())
    assert holds(held, bundle(3))
    staged.release(held)
    assert not any(everything(staged, tmp_path))
    with pytest.raises(EngineStoppedError):
        take(staged, 3)
    staged.prefetch(digest(3), 3, never)
    staged.close()
    assert staged._worker is not None
    assert not staged._worker.is_alive()
