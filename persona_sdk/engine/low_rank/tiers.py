"""The way of an adapter to its slot: device slot, else host block, else flat file, else the store.

    acquire ─► slot? ─► host block? ─► flat file? ─► load() ─► pack
                 ▲           │▲              │           │
                 └──one copy─┘└──────────────┴───────────┘
    evicted:   slot ──► host block ──► flat file ──► gone

A digest names content, so an adapter that was updated is another one here: it takes another slot, and the old
one goes when its last row lets go. Only adapters that were touched are known, and every step of the way costs
the same whatever their number.

One lock guards the books and the copies between host and device. It is never held over `load`, over packing
or over a file; meanwhile a *flight* stands for the adapter, and whoever wants the same one waits for it. One
thread fetches ahead and writes the files; who evicts faster than it writes has to write one himself.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.engine.low_rank.arena import Slot
from persona_sdk.engine.low_rank.blocks import (
    BlockLayout,
    check_bundle,
    host_tensor,
    layout_of,
    shapes_of,
)
from persona_sdk.engine.low_rank.flat_files import FlatFile, FlatFiles
from persona_sdk.engine.low_rank.host import Block, HostTier
from persona_sdk.engine.low_rank.sites import Site
from persona_sdk.engine.low_rank.slots import Key, Resident, SlotTier
from persona_sdk.errors import EngineStoppedError
from persona_sdk.tensors import Digest, TensorBundle

logger = logging.getLogger("persona_sdk.engine")

Load: TypeAlias = Callable[[], TensorBundle]

_UNWRITTEN = 4  # blocks out of host memory that may wait for the disk, beyond the host's budget
_LINGER = 2.0  # seconds an idle worker waits for more
_REMEMBERED = 1024  # layouts of adapters that found no slot, so that waiting does not load them again


class TierOptions(FrozenConfig):
    """Budgets in bytes. They are limits, not reservations.

    Beyond them are, for a moment, an arena's former size while it grows, and a few blocks on their way.
    """

    device_bytes: int = Field(2**30, ge=1, description="adapters in device slots")
    host_bytes: int = Field(2**30, ge=0, description="adapters in host memory; 0 keeps none")
    disk_bytes: int = Field(4 * 2**30, ge=0, description="adapters as flat files in `flat_folder`")
    flat_folder: Path | None = Field(None, description="of one process; its flat files go when it is opened")


@dataclass(frozen=True)
class TierUse:
    """What one tier holds, and how often it was asked with success."""

    bytes: int
    count: int
    hits: int
    evictions: int


@dataclass(frozen=True)
class TierStats:
    """Use of the tiers since they were opened.

    Args:
        held: slots that rows hold.
        loads: bundles that had to be loaded; `prefetched` of them before they were asked for.
        damaged: flat files that did not match their checksum.
    """

    device: TierUse
    host: TierUse
    disk: TierUse
    held: int
    loads: int
    prefetched: int
    damaged: int


@dataclass(eq=False)
class _Flight:
    """An adapter on its way into host memory."""

    landed: threading.Event = field(default_factory=threading.Event)
    forgotten: bool = False


@dataclass(eq=False)
class _Spill:
    """A block that went out of host memory, until it is in its file."""

    file: FlatFile
    block: Block
    taken: bool = False


@dataclass
class _Counts:
    device: int = 0
    host: int = 0
    disk: int = 0
    host_evictions: int = 0
    loads: int = 0
    prefetched: int = 0


class AdapterTiers:
    """Adapters of one forward pass in slots, host memory and files. Thread-safe; see `Arena` for passes.

    Args:
        sites: of the forward pass.
        device: of the slots.
        dtype: of the factors in all tiers.
    """

    def __init__(
        self, sites: Sequence[Site], *, device: torch.device, dtype: torch.dtype, options: TierOptions
    ) -> None:
        self.options = options
        self._sites, self._shapes, self._dtype = tuple(sites), shapes_of(sites), dtype
        self._pinned = device.type == "cuda"
        self._files = FlatFiles(options.flat_folder, options.disk_bytes, dtype)
        self._host = HostTier(options.host_bytes)
        self._slots = SlotTier(options.device_bytes, device, dtype, self._to_host)
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._flights: dict[Key, _Flight] = {}
        self._queue: OrderedDict[Key, Load] = OrderedDict()  # to prefetch
        self._spills: OrderedDict[Key, _Spill] = OrderedDict()
        self._layouts: dict[tuple[int, frozenset[str]], BlockLayout] = {}
        self._no_room: OrderedDict[Key, BlockLayout] = OrderedDict()
        self._ranks: set[int] = set()
        self._counts = _Counts()
        self._worker: threading.Thread | None = None
        self._closed = False

    # Using --------------------------------------------------------------------------------------------

    def acquire(self, digest: Digest, rank: int, load: Load) -> Slot | None:
        """The slot of an adapter, for one user more; None while everything that could go is in use.

        Raises:
            IncompatibleAdapterError: what was loaded does not fit the model.
            BudgetError: it alone is larger than the device's budget.
            DeviceMemoryError: the device has less memory than its budget.
            EngineStoppedError: the tiers are closed.
            Exception: whatever `load` raises.
        """
        key = Key(digest, rank)
        try:
            while True:
                with self._lock:
                    self._check_open()
                    self._ranks.add(rank)
                    slot = self._slots.pin(key)
                    if slot is not None:
                        self._counts.device += 1
                        return slot
                    layout = self._layout_of(key)
                    if layout is not None and not self._slots.fits(layout):
                        return None
                    block = self._host.get(key)
                    if block is not None:
                        self._counts.host += 1
                        return self._place(key, block)
                    if key in self._spills:  # not written yet
                        self._counts.host += 1
                        block = self._spills[key].block
                        self._keep(key, block)
                        return self._place(key, block)
                    flight = self._flights.get(key)
                    own = flight is None
                    if flight is None:
                        flight = self._flights[key] = _Flight()
                        self._queue.pop(key, None)
                if own:
                    return self._fly(flight, key, load, place=True)
                flight.landed.wait()
        finally:
            while self._write_spill(beyond=_UNWRITTEN):
                pass

    def release(self, slot: Slot) -> None:
        """One user less."""
        with self._lock:
            self._slots.release(slot)

    def prefetch(self, digest: Digest, rank: int, load: Load) -> None:
        """Have an adapter in host memory soon. What goes wrong is left to `acquire` to meet again.

        Little is fetched ahead when half of the host memory already holds what nobody asked for yet.
        """
        key = Key(digest, rank)
        with self._news:
            if self._closed or not self._host.budget or self._known(key) or key in self._queue:
                return
            self._ranks.add(rank)
            self._queue[key] = load
            self._wake()

    def arriving(self, digest: Digest) -> bool:
        """Whether an adapter is on its way into host memory: to acquire it now would mean to wait."""
        with self._lock:
            keys = [Key(digest, rank) for rank in self._ranks]
            return any(key in self._flights or key in self._queue for key in keys)

    def trim(self) -> None:
        """Take everything that nobody uses off the device."""
        with self._lock:
            self._slots.trim()

    def resident(self, digest: Digest) -> bool:
        """Whether an adapter stands in a slot."""
        with self._lock:
            return any(Key(digest, rank) in self._slots for rank in self._ranks)

    def stats(self) -> TierStats:
        """Bytes, counts and what happened so far."""
        with self._lock:
            slots, host, files, counts = self._slots, self._host, self._files, self._counts
            return TierStats(
                TierUse(slots.bytes, len(slots), counts.device, slots.evictions),
                TierUse(host.bytes, len(host), counts.host, counts.host_evictions),
                TierUse(files.bytes, len(files), counts.disk, files.evictions),
                slots.held,
                counts.loads,
                counts.prefetched,
                files.damaged,
            )

    # Forgetting ---------------------------------------------------------------------------------------

    def drop(self, digests: Iterable[Digest]) -> None:
        """Erase adapters: overwrite their blocks, files and slots; a slot in use when its last row ends."""
        with self._lock:
            keys = [Key(digest, rank) for digest in digests for rank in self._ranks]
        self._forget(keys)

    def clear(self) -> None:
        """Erase everything."""
        with self._lock:
            keys = {*self._slots.keys(), *self._host.keys(), *self._files.keys(), *self._flights}
            keys.update(self._queue, self._spills)
            self._no_room.clear()
        self._forget(list(keys))

    def close(self) -> None:
        """Erase everything, end the worker, give the memory back. Slots in use stay until released."""
        with self._news:
            self._closed = True
            self._queue.clear()
            self._news.notify_all()
            worker = self._worker
        self.clear()
        if worker is not None and worker is not threading.current_thread():
            worker.join(timeout=5)
        self._files.close()
        with self._lock:
            self._slots.trim()

    def _forget(self, keys: Sequence[Key]) -> None:
        with self._lock:
            for key in keys:
                self._queue.pop(key, None)
                self._no_room.pop(key, None)
                flight = self._flights.pop(key, None)
                if flight is not None:
                    flight.forgotten = True
                self._host.forget(key)
                self._slots.forget(key)
                spill = self._spills.pop(key, None)
                if spill is not None:
                    spill.block.erase()
            files = self._files.retract(keys)
        self._files.erase(files)

    # Moving between tiers; with the lock held ----------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStoppedError("The adapter tiers are closed.", hint="Open the engine again.")

    def _known(self, key: Key) -> bool:
        return any(key in place for place in (self._slots, self._host, self._flights, self._spills))

    def _layout_of(self, key: Key) -> BlockLayout | None:
        """The layout of an adapter that can be told without loading it."""
        return self._no_room.get(key) or self._files.layout(key)

    def _place(self, key: Key, block: Block) -> Slot | None:
        slot = self._slots.place(key, block.layout, block.data)
        if slot is not None:
            self._no_room.pop(key, None)
            self._host.expendable(key)
            return slot
        self._no_room[key] = block.layout
        if len(self._no_room) > _REMEMBERED:
            self._no_room.popitem(last=False)
        return None

    def _to_host(self, resident: Resident) -> None:
        """A slot is about to be used for another adapter: keep its numbers, unless host memory has them."""
        key, slot = resident.key, resident.slot
        if self._host.get(key) is not None or slot.arena.block_bytes > self._host.budget:
            return
        try:
            data = host_tensor(slot.arena.layout.size, self._dtype, pinned=self._pinned)
        except (RuntimeError, MemoryError) as error:
            logger.warning("No host memory for an evicted adapter: %s", error)
            return
        slot.arena.read(slot.index, data)
        self._keep(key, Block(slot.arena.layout, data))

    def _keep(self, key: Key, block: Block) -> None:
        """Into host memory; what has to go for it will be written to files."""
        for other, gone in self._host.put(key, block):
            self._counts.host_evictions += 1
            if other not in self._slots and (file := self._files.begin(other, gone.layout)):
                self._spills[other] = _Spill(file, gone)
                self._wake()

    def _wake(self) -> None:
        """There is something to do for the worker."""
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="persona-tiers", daemon=True)
            self._worker.start()
        self._news.notify()

    # Loading; without the lock -------------------------------------------------------------------------

    def _fly(self, flight: _Flight, key: Key, load: Load, *, place: bool) -> Slot | None:
        """Bring an adapter into host memory and, with `place`, into a slot. Always ends the flight."""
        try:
            block = self._fetch(key, load, ahead=not place)
            with self._lock:
                return self._land(flight, key, block, place=place)
        finally:
            with self._lock:
                if self._flights.get(key) is flight:
                    del self._flights[key]
            flight.landed.set()

    def _fetch(self, key: Key, load: Load, *, ahead: bool) -> Block:
        block = self._files.read(key, pinned=self._pinned)
        if block is not None:
            with self._lock:
                self._counts.disk += 1
        else:
            bundle = load()
            check_bundle(key.digest, key.rank, bundle, self._shapes)
            layout = layout_of(self._sites, bundle, key.rank)
            layout = self._layouts.setdefault((layout.rank, layout.modules), layout)
            block = Block(layout, layout.pack(bundle, self._dtype, pinned=self._pinned))
            with self._lock:
                self._counts.loads += 1
                self._counts.prefetched += ahead
        block.ahead = ahead
        return block

    def _land(self, flight: _Flight, key: Key, block: Block, *, place: bool) -> Slot | None:
        if self._closed or flight.forgotten:
            slot = None
            if place:
                self._check_open()
                # Its row was admitted before: it may run to its end, and the slot goes with it.
                slot = self._slots.place(key, block.layout, block.data, forgotten=True)
            block.erase()
            return slot
        self._keep(key, block)
        return self._place(key, block) if place else None

    def _write_spill(self, *, beyond: int = 0) -> bool:
        """Write to its file what went out of host memory first, if more than `beyond` such blocks wait."""
        with self._lock:
            spill = next((spill for spill in self._spills.values() if not spill.taken), None)
            if spill is None or len(self._spills) <= beyond:
                return False
            spill.taken = True
        try:
            self._files.write(spill.file, spill.block)
        finally:
            with self._lock:
                if self._spills.get(spill.file.key) is spill:
                    del self._spills[spill.file.key]
        return True

    def _work(self) -> None:
        """The thread that fetches ahead and writes files."""
        while True:
            with self._news:
                while not (self._queue or self._closed or self._unwritten()):
                    if not self._news.wait(_LINGER) and not (self._queue or self._unwritten()):
                        self._worker = None  # a thread that waits would keep all this memory alive
                        return
                if self._closed:
                    return
            try:
                self._fetch_next()
                self._write_spill()
            except Exception as error:
                logger.debug("Fetching an adapter ahead failed: %r", error)

    def _unwritten(self) -> bool:
        return any(not spill.taken for spill in self._spills.values())

    def _fetch_next(self) -> None:
        with self._lock:
            if not self._queue:
                return
            key, load = self._queue.popitem(last=False)
            if self._known(key) or self._host.ahead_bytes > self._host.budget // 2:
                return
            flight = self._flights[key] = _Flight()
        self._fly(flight, key, load, place=False)
