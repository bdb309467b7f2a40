"""Small adapters, tiers for a few of them, and all the bytes they keep."""

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from persona_sdk.engine.low_rank.arena import Arena, Slot
from persona_sdk.engine.low_rank.blocks import layout_of, shapes_of
from persona_sdk.engine.low_rank.sites import single_sites
from persona_sdk.engine.low_rank.tiers import AdapterTiers, TierOptions
from persona_sdk.tensors import TensorBundle, low_rank_bundle

SITES = single_sites({"a": (4, 6), "b": (6, 4)})
SHAPES = shapes_of(SITES)
BLOCK = 8 * (4 + 6) * 4  # bytes of an adapter of rank 8 that patches "a"
FILE = BLOCK + 80  # with its header


def digest(number: int) -> str:
    return f"{number:064x}"


def bundle(number: int, rank: int = 3, modules: Collection[str] = "a") -> TensorBundle:
    generator = torch.Generator().manual_seed(number)
    return low_rank_bundle(
        {
            name: (
                torch.randn(rank, SHAPES[name][0], generator=generator),
                torch.randn(SHAPES[name][1], rank, generator=generator),
            )
            for name in modules
        }
    )


def tiers(device: int = 3, host: int = 5, disk: int = 0, folder: Path | None = None) -> AdapterTiers:
    """Budgets in adapters of rank 8 that patch "a"."""
    return AdapterTiers(
        SITES,
        device=torch.device("cpu"),
        dtype=torch.float32,
        options=TierOptions(
            device_bytes=max(device * BLOCK, 1),
            host_bytes=host * BLOCK,
            disk_bytes=disk * FILE,
            flat_folder=folder,
        ),
    )


def never() -> TensorBundle:
    raise AssertionError("loaded")


def take(of: AdapterTiers, number: int, load: Callable[[], TensorBundle] | None = None) -> Slot:
    slot = of.acquire(digest(number), 3, load or (lambda: bundle(number)))
    assert slot is not None
    return slot


def use(of: AdapterTiers, *numbers: int) -> None:
    for number in numbers:
        of.release(take(of, number))
    settle(of)


def holds(slot: Slot, factors: TensorBundle) -> bool:
    expected = layout_of(SITES, factors, slot.rank)
    return slot.arena.layout == expected and torch.equal(slot.arena.data[slot.index], expected.pack(factors))


def settle(of: AdapterTiers) -> None:
    """Wait until the prefetching thread has nothing to do."""
    deadline = time.monotonic() + 10
    while of._queue or of._flights or of._spills or of._files._writing:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def arenas(of: AdapterTiers) -> list[Arena]:
    return [shelf.arena for shelf in of._slots._shelves.values()]


def everything(of: AdapterTiers, folder: Path | None) -> bytes:
    """All bytes the tiers keep."""
    tensors: list[Tensor] = [arena.data for arena in arenas(of)]
    tensors += [block.data for block in of._host._blocks.values()]
    found = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    return found + b"".join(path.read_bytes() for path in folder.iterdir()) if folder else found


def traces(factors: TensorBundle) -> list[bytes]:
    """A row of every factor, as it stands in a block."""
    return [
        (tensor.T if name.endswith(".B") else tensor).contiguous()[0].numpy().tobytes()
        for name, tensor in factors.items()
    ]


def locked(of: AdapterTiers, slot: Slot) -> Tensor:
    with of._lock:
        return slot.arena.data[slot.index].clone()


class Gate:
    """A load that tells when it began and ends when it may."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> TensorBundle:
        self.count += 1
        self.begun.set()
        assert self.go.wait(10)
        return bundle(self.number)
