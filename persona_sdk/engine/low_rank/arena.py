"""Arenas: the blocks of one layout side by side on the device, and the slots in them.

    data:  | slot 0 | slot 1 | ... |        one `BlockLayout` each, [slots, size]

    symbol        field          shape
    blocks        `Arena.data`   [slots, size]
    one adapter   `Slot.index`   data[index], [size]

An arena becomes larger only in `take` and smaller only in `shrink`. Both replace `data` by another tensor
and erase the one before, so no pass may run meanwhile; the indices of slots in use never change. A slot that
was given back keeps its numbers until the next block overwrites all of them, padding included, unless it was
erased.
"""

import heapq
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine import pages
from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.errors import DeviceMemoryError, EngineError


class Arena:
    """Slots for adapters of one layout. Not thread-safe: its owner holds a lock."""

    def __init__(self, layout: BlockLayout, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = layout
        self._device, self._dtype = device, dtype
        self._free: list[int] = []  # a heap: low slots are filled first, so that the end can be cut off
        self.data: Float[Tensor, "slots size"] = self._allocate(0)

    @property
    def slots(self) -> int:
        """Number of slots, taken or free."""
        return self.data.shape[0]

    @property
    def free(self) -> int:
        """Number of slots nobody has."""
        return len(self._free)

    @property
    def block_bytes(self) -> int:
        """Bytes of one slot."""
        return self.layout.size * self._dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.block_bytes

    def take(self, most: int) -> int:
        """A free slot. Without one, the arena grows to twice its size, but to no more than `most` slots.

        Raises:
            DeviceMemoryError: the device has no memory for even one more.
        """
        if not self._free:
            self._grow(most)
        return heapq.heappop(self._free)

    def give(self, index: int, *, erase: bool) -> None:
        """Take a slot back. `erase` overwrites it with zeros now; else the next block does."""
        if erase:
            self.data[index].zero_()
        heapq.heappush(self._free, index)

    def write(self, index: int, block: Float[Tensor, " size"]) -> None:
        """Overwrite all of a slot. From page-locked memory the copy is queued, not waited for."""
        self.data[index].copy_(block, non_blocking=True)

    def read(self, index: int, into: Float[Tensor, " size"]) -> None:
        """Copy a slot out."""
        into.copy_(self.data[index])

    def shrink(self, slots: int) -> None:
        """Give memory back: cut off the slots from number `slots` on, which must be free."""
        kept = [index for index in self._free if index < slots]
        if len(self._free) - len(kept) != self.slots - slots:
            raise EngineError(f"Of the slots from {slots} to {self.slots} some are in use.")
        self._replace(self._allocate(slots))
        self._free = kept
        heapq.heapify(self._free)

    def _grow(self, most: int) -> None:
        slots = self.slots
        if most <= slots:
            raise EngineError(f"The arena has {slots} slots, all taken, and may have {most}.")
        try:
            larger = self._allocate(min(max(2 * slots, 1), most))
        except (RuntimeError, MemoryError):
            larger = self._one_more()
        self._replace(larger)
        for index in range(slots, self.slots):
            heapq.heappush(self._free, index)

    def _one_more(self) -> Float[Tensor, "slots size"]:
        """Room for one slot more, after the allocator has let go of what it only keeps."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            return self._allocate(self.slots + 1)
        except (RuntimeError, MemoryError) as error:
            raise DeviceMemoryError(
                f"The device has no memory for one more adapter of {self.block_bytes} bytes "
                f"beside {self.slots} of its kind.",
                hint="Try again when other requests have ended, or lower the budgets in EngineOptions.",
            ) from error

    def _allocate(self, slots: int) -> Float[Tensor, "slots size"]:
        # Never an inference tensor: slots are erased outside of passes too.
        return pages.empty(slots, self.layout.size, dtype=self._dtype, device=self._device)

    def _replace(self, data: Float[Tensor, "slots size"]) -> None:
        both = min(len(data), len(self.data))
        data[:both].copy_(self.data[:both])
        data[both:].zero_()  # what was in this memory before is nobody's business
        self.data.zero_()  # adapters may be forgotten later, when this memory is out of reach
        self.data = data


@dataclass(frozen=True, eq=False)
class Slot:
    """One adapter's place on the device. Two are equal only if they are the same.

    Args:
        arena: where it stands.
        index: which block of `arena.data`.
        rank: the plan's rank of the adapter, at most the layout's.
        digest: what it holds.
    """

    arena: Arena
    index: int
    rank: int
    digest: str
