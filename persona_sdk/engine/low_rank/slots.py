"""The device tier: which adapter stands in which slot, who holds it, and who has to go.

Slots in use are counted, and never moved or overwritten. Those nobody uses wait in their arena's two queues
(a segmented LRU): an adapter used once is on probation, one used again is protected, and the one longest on
probation goes first. A scan of adapters that are used once so passes by those that come back. As many keys of
evicted adapters are remembered as there are slots: one that returns was used again, so that new favourites
displace old ones also when they did not fit side by side.

    used once ──release──► probation ──used again, released──► protected (at most 3/4 of the slots)
                              │  ▲                                  │
                       evicted┘  └───────── the oldest, when full ──┘

The byte budget is shared by the arenas. One that needs room takes it from the largest: from itself if that is
the largest, else the largest shrinks by at least a quarter, so that the copying is paid by many admissions.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.arena import Arena, Slot
from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.errors import BudgetError, DeviceMemoryError, EngineError
from persona_sdk.tensors import Digest


class Key(NamedTuple):
    """An adapter as a plan names it. The plan's rank is the length of the gate, hence of the slot's."""

    digest: Digest
    rank: int


@dataclass(eq=False)
class Resident:
    """An adapter in a slot.

    Args:
        users: rows that hold it.
        uses: how often it was acquired.
        forgotten: it is no longer to be found, and is erased when the last row lets go.
    """

    key: Key
    slot: Slot
    users: int = 1
    uses: int = 1
    forgotten: bool = False


@dataclass(eq=False)
class Shelf:
    """An arena with its residents nobody uses, oldest first, those it evicted, and the slots in use."""

    arena: Arena
    probation: OrderedDict[Key, Resident] = field(default_factory=OrderedDict)
    protected: OrderedDict[Key, Resident] = field(default_factory=OrderedDict)
    evicted: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    held: set[int] = field(default_factory=set)

    @property
    def idle(self) -> int:
        """Residents that may be evicted."""
        return len(self.probation) + len(self.protected)

    @property
    def least(self) -> int:
        """To how many slots the arena could shrink."""
        return max(self.held) + 1 if self.held else 0

    @property
    def spare_bytes(self) -> int:
        """Bytes it could give up."""
        return (self.arena.slots - self.least) * self.arena.block_bytes

    def hold(self, resident: Resident) -> None:
        """Out of the queues: somebody uses it."""
        self.probation.pop(resident.key, None)
        self.protected.pop(resident.key, None)
        self.held.add(resident.slot.index)

    def wait(self, resident: Resident) -> None:
        """Into a queue: nobody uses it."""
        self.held.discard(resident.slot.index)
        if resident.uses == 1:
            self.probation[resident.key] = resident
            return
        self.protected[resident.key] = resident
        if len(self.protected) > self.arena.slots * 3 // 4:
            oldest, demoted = self.protected.popitem(last=False)
            self.probation[oldest] = demoted

    def returns(self, key: Key) -> bool:
        """Whether an adapter comes back that was evicted not long ago."""
        return self.evicted.pop(key, 0) is None

    def remember(self, key: Key) -> None:
        """An adapter is evicted."""
        self.evicted[key] = None
        if len(self.evicted) > self.arena.slots:
            self.evicted.popitem(last=False)

    def victim(self) -> Resident:
        """Who has to go first."""
        return next(iter((self.probation or self.protected).values()))


class SlotTier:
    """All slots on the device. Not thread-safe: its owner holds a lock.

    Args:
        evicted: told of every resident that has to go while its numbers are still there.
    """

    def __init__(
        self,
        budget: int,
        device: torch.device,
        dtype: torch.dtype,
        evicted: Callable[[Resident], None],
    ) -> None:
        self.budget, self.device, self.dtype = budget, device, dtype
        self.evictions = 0
        self._evicted = evicted
        self._shelves: dict[tuple[int, frozenset[str]], Shelf] = {}
        self._residents: dict[Key, Resident] = {}
        self._holders: dict[Slot, Resident] = {}  # those in use, forgotten ones among them

    def __contains__(self, key: Key) -> bool:
        return key in self._residents

    def __len__(self) -> int:
        """Adapters in slots, those among them that are forgotten but in use."""
        return len(self._residents) + sum(resident.forgotten for resident in self._holders.values())

    @property
    def held(self) -> int:
        """Slots in use."""
        return len(self._holders)

    @property
    def bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(shelf.arena.bytes for shelf in self._shelves.values())

    def pin(self, key: Key) -> Slot | None:
        """One user more for an adapter that is here."""
        resident = self._residents.get(key)
        if resident is None:
            return None
        resident.users += 1
        resident.uses += 1
        self._shelf(resident.slot.arena.layout).hold(resident)
        self._holders[resident.slot] = resident
        return resident.slot

    def place(
        self, key: Key, layout: BlockLayout, block: Float[Tensor, " size"], *, forgotten: bool = False
    ) -> Slot | None:
        """Put an adapter into a slot for its first user. None if all that could go is in use.

        A `forgotten` one is not to be found by anybody else, and is erased when its user lets go.

        Raises:
            BudgetError: one such adapter is larger than the whole budget.
            DeviceMemoryError: the device has no memory, and nothing of this kind could go.
        """
        shelf = self._shelf(layout)
        index = self._room(shelf)
        if index is None:
            return None
        shelf.arena.write(index, block)
        slot = Slot(shelf.arena, index, key.rank, key.digest)
        resident = Resident(key, slot, uses=1 + shelf.returns(key), forgotten=forgotten)
        self._holders[slot] = resident
        if not forgotten:
            self._residents[key] = resident
        shelf.hold(resident)
        return slot

    def release(self, slot: Slot) -> None:
        """One user less."""
        resident = self._holders.get(slot)
        if resident is None:
            raise EngineError(f"Nobody holds slot {slot.index} of adapter {slot.digest[:12]!r}.")
        resident.users -= 1
        if resident.users:
            return
        del self._holders[slot]
        shelf = self._shelf(slot.arena.layout)
        if resident.forgotten:
            shelf.held.discard(slot.index)
            slot.arena.give(slot.index, erase=True)
        else:
            shelf.wait(resident)

    def forget(self, key: Key) -> None:
        """Erase an adapter: now if nobody uses it, else when the last user lets go."""
        for shelf in self._shelves.values():
            shelf.evicted.pop(key, None)
        resident = self._residents.pop(key, None)
        if resident is None:
            return
        resident.forgotten = True
        if resident.slot not in self._holders:
            self._leave(resident, erase=True)

    def keys(self) -> Iterator[Key]:
        """All that can be found here."""
        return iter(tuple(self._residents))

    def fits(self, layout: BlockLayout) -> bool:
        """Whether `place` would find room now."""
        shelf = self._shelf(layout)
        if shelf.arena.free or shelf.idle:
            return True
        spare = sum(other.spare_bytes for other in self._shelves.values())
        return self.budget - self.bytes + spare >= shelf.arena.block_bytes

    def trim(self) -> None:
        """Give back all memory behind the last slot in use of every arena; what stands there is evicted."""
        for shelf in self._shelves.values():
            self._shrink(shelf, shelf.arena.bytes)

    def _shelf(self, layout: BlockLayout) -> Shelf:
        number = (layout.rank, layout.modules)
        shelf = self._shelves.get(number)
        if shelf is None:
            shelf = self._shelves[number] = Shelf(Arena(layout, self.device, self.dtype))
            if shelf.arena.block_bytes > self.budget:
                del self._shelves[number]
                raise BudgetError(
                    f"One adapter of {shelf.arena.block_bytes} bytes is larger than the budget of "
                    f"{self.budget} for all.",
                    hint="Raise device_bytes in EngineOptions, or use an adapter of lower rank.",
                    needed=shelf.arena.block_bytes,
                )
        return shelf

    def _most(self, arena: Arena) -> int:
        """To how many slots an arena may grow."""
        return arena.slots + (self.budget - self.bytes) // arena.block_bytes

    def _room(self, shelf: Shelf) -> int | None:
        """A slot that is free, or becomes so by growing or by evicting; None if that is impossible now."""
        arena = shelf.arena
        if not arena.free and self._most(arena) <= arena.slots:
            self._make_room(shelf)
        if arena.free or self._most(arena) > arena.slots:
            try:
                return arena.take(self._most(arena))
            except DeviceMemoryError:
                if not shelf.idle:
                    raise
        if not shelf.idle:
            return None
        self._leave(shelf.victim(), erase=False)
        return arena.take(arena.slots)

    def _make_room(self, shelf: Shelf) -> None:
        """Shrink other arenas, the largest first, as far as this one may ask them to."""
        needed = shelf.arena.block_bytes - (self.budget - self.bytes)
        donors = [other for other in self._shelves.values() if other is not shelf]
        if shelf.idle:
            donors = [other for other in donors if other.arena.bytes > shelf.arena.bytes]
        if sum(other.spare_bytes for other in donors) < needed:
            return
        for donor in sorted(donors, key=lambda other: -other.arena.bytes):
            self._shrink(donor, needed)
            needed = shelf.arena.block_bytes - (self.budget - self.bytes)
            if needed <= 0:
                return

    def _shrink(self, donor: Shelf, needed: int) -> None:
        """Give up `needed` bytes, a quarter of the arena at least, as far as slots in use allow."""
        arena = donor.arena
        enough = arena.slots - -(-needed // arena.block_bytes)
        slots = max(min(enough, arena.slots * 3 // 4), donor.least)
        if slots == arena.slots:
            return
        for queue in (donor.probation, donor.protected):
            for resident in [found for found in queue.values() if found.slot.index >= slots]:
                self._leave(resident, erase=False)
        arena.shrink(slots)

    def _leave(self, resident: Resident, *, erase: bool) -> None:
        """Out of a slot nobody uses: forgotten, or evicted."""
        slot, shelf = resident.slot, self._shelf(resident.slot.arena.layout)
        shelf.probation.pop(resident.key, None)
        shelf.protected.pop(resident.key, None)
        if not resident.forgotten:
            del self._residents[resident.key]
            self.evictions += 1
            shelf.remember(resident.key)
            self._evicted(resident)
        slot.arena.give(slot.index, erase=erase)
