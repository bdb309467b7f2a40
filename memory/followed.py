"""What is kept in memory about an owner's cubes, brought up to date by reading only those that are new.

Cubes never change once they are written, so it is enough to compare ids: what has gone is dropped, what has
come is read and looked at once. That holds also after commits of other processes, rollbacks and imports.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import select

from persona_sdk.memory.cube import MemCube
from persona_sdk.memory.schema import cubes
from persona_sdk.memory.store import MemoryStore

T = TypeVar("T")

OWNERS = 256  # beyond, those that were not asked for longest are dropped


@dataclass(frozen=True)
class _Kept(Generic[T]):
    """What was picked, by cube id, oldest first; ``seen`` are the ids of all cubes that were looked at."""

    stamp: str
    seen: frozenset[str]
    picked: Mapping[str, T]


class Followed(Generic[T]):
    """By owner, what a function picks from each cube, live or not; thread-safe. None picks nothing."""

    def __init__(self, store: MemoryStore, pick: Callable[[MemCube], T | None]) -> None:
        self._store = store
        self._pick = pick
        self._kept: OrderedDict[str, _Kept[T]] = OrderedDict()
        self._lock = threading.Lock()
        store.on_forget(self.drop)

    def get(self, owner: str) -> tuple[int, Mapping[str, T]]:
        """The owner's newest revision, and what was picked from cubes up to at least that one, by id."""
        with self._lock:
            # The stamp is read first: what is newer than its stamp is compared again, never the reverse.
            head, stamp = self._store.mark(owner)
            kept = self._kept.get(owner)
            if kept is None or kept.stamp != stamp:
                kept = self._read(owner, stamp, kept or _Kept("", frozenset(), {}))
            self._kept[owner] = kept
            self._kept.move_to_end(owner)
            while len(self._kept) > OWNERS:
                self._kept.popitem(last=False)
            return head, kept.picked

    def _read(self, owner: str, stamp: str, last: _Kept[T]) -> _Kept[T]:
        query = select(cubes.c.id).where(cubes.c.owner == owner).order_by(cubes.c.seq)
        with self._store.reading() as connection:
            ids = list(connection.execute(query).scalars())
        new = self._store.lookup(owner, [name for name in ids if name not in last.seen])
        fresh = {name: found for name, cube in new.items() if (found := self._pick(cube)) is not None}
        known = {**last.picked, **fresh}
        seen = frozenset(name for name in ids if name in last.seen or name in new)
        return _Kept(stamp, seen, {name: known[name] for name in ids if name in known})

    def drop(self, owner: str) -> None:
        """Let go of what is kept of an owner, as when something of it was forgotten."""
        with self._lock:
            self._kept.pop(owner, None)
