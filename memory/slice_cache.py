"""Slices kept in memory: read from SQL, brought up to date by their owner's stamp, dropped when forgotten.

A slice is read in the caller's transaction, whole in one statement, so that it is one state of the rows. The
least recently used slices go first.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

from sqlalchemy import Connection, Select, bindparam, or_, select

from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory import revisions
from persona_sdk.memory.cipher import CLEAR
from persona_sdk.memory.rows import chunks
from persona_sdk.memory.schema import cubes, memberships, vectors
from persona_sdk.memory.slices import Slice
from persona_sdk.memory.store import MemoryStore

Key: TypeAlias = tuple[str, str, bool]  # owner, encoder, with what was retired


def _searchable(*columns: Any, history: bool) -> Select[Any]:
    """Texts of an owner that have a vector, in the order in which they got it."""
    same = (cubes.c.owner == vectors.c.owner) & (cubes.c.id == vectors.c.cube_id)
    query = select(*columns).select_from(vectors.join(cubes, same))
    query = query.where(vectors.c.owner == bindparam("of"), vectors.c.encoder == bindparam("encoder"))
    query = query.where(cubes.c.kind == "plaintext")
    if not history:
        live = memberships.c
        ends = or_(live.to_revision.is_(None), live.to_revision > bindparam("at"))
        named = (live.owner == vectors.c.owner) & (live.cube_id == vectors.c.cube_id)
        query = query.where(
            select(live.seq).where(named, live.from_revision <= bindparam("at"), ends).exists()
        )
    return query.order_by(vectors.c.seq)


_COLUMNS = (
    *(cubes.c.id, cubes.c.text, cubes.c.header, vectors.c.data),
    *(cubes.c.valid_from, cubes.c.valid_to, cubes.c.expires_at),
)
_ROWS = {history: _searchable(*_COLUMNS, history=history) for history in (False, True)}
_IDS = {history: _searchable(cubes.c.id, history=history) for history in (False, True)}
_SOME = {
    history: query.where(cubes.c.id.in_(bindparam("ids", expanding=True))) for history, query in _ROWS.items()
}


class SliceCache:
    """Slices of a store's owners; thread-safe. The least recently used ones go beyond `max_bytes`."""

    def __init__(self, store: MemoryStore, *, max_bytes: int = 256 << 20) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._bytes = 0
        self._drops = 0
        self._slices: OrderedDict[Key, Slice] = OrderedDict()
        self._lock = threading.Lock()
        store.on_forget(self.drop)

    @property
    def bytes(self) -> int:
        """Bytes of all slices in memory."""
        with self._lock:
            return self._bytes

    def drop(self, owner: str | None = None) -> None:
        """Let go of the slices of an owner, or of all."""
        with self._lock:
            self._drops += 1
            for key in [key for key in self._slices if owner is None or key[0] == owner]:
                self._bytes -= self._slices.pop(key).bytes

    def get(
        self,
        connection: Connection,
        owner: str,
        encoder: str,
        *,
        revision: int | None = None,
        history: bool = False,
    ) -> Slice:
        """What is live of `owner` at a revision, None being the newest; read inside the caller's transaction.

        Args:
            connection: a read transaction of the store.
            owner: whose slice it is.
            encoder: fingerprint of what made the vectors.
            revision: another revision than the newest is read anew every time.
            history: with what was retired; `revision` must be None.

        Raises:
            NotFoundError: the owner has no such revision.
        """
        key, drops = (owner, encoder, history), self._drops
        head, stamp = revisions.mark(connection, owner)
        if revision not in (None, head):
            return _read(connection, key, stamp, revisions.resolve(connection, owner, revision))
        with self._lock:
            found = self._slices.get(key)
            if found is not None and found.stamp == stamp:
                self._slices.move_to_end(key)
                return found
        # The stamp was read before: content that is newer than its stamp is read again, never the reverse.
        fresh = (
            _read(connection, key, stamp, head)
            if found is None
            else _follow(connection, key, stamp, head, found)
        )
        self._keep(key, fresh, drops)
        return fresh

    def _keep(self, key: Key, fresh: Slice, drops: int) -> None:
        with self._lock:
            if drops != self._drops:
                return  # something was forgotten since it was read: it may hold that
            old = self._slices.pop(key, None)
            self._bytes -= old.bytes if old else 0
            if fresh.ids:
                self._slices[key] = fresh
                self._bytes += fresh.bytes
            while self._bytes > self._max_bytes and len(self._slices) > 1:
                self._bytes -= self._slices.popitem(last=False)[1].bytes


def _read(connection: Connection, key: Key, stamp: str, revision: int | None) -> Slice:
    owner, encoder, history = key
    found = connection.execute(_ROWS[history], {"of": owner, "encoder": encoder, "at": revision}).all()
    return Slice.of(owner, stamp, _opened(connection, owner, encoder, found))


def _opened(connection: Connection, owner: str, encoder: str, found: Sequence[Any]) -> Sequence[Any]:
    """Rows as they were before they were sealed."""
    cipher = ciphers.reading(connection, owner)
    if cipher is CLEAR:
        return found
    return [
        SimpleNamespace(
            id=row.id,
            text=cipher.open_text(row.id, row.text),
            header=cipher.open_header(row.id, row.header, None)[0],
            data=cipher.open_vector(row.id, encoder, row.data),
            valid_from=row.valid_from,
            valid_to=row.valid_to,
            expires_at=row.expires_at,
        )
        for row in found
    ]


def _follow(connection: Connection, key: Key, stamp: str, head: int, last: Slice) -> Slice:
    """The successor of a slice: what stays of it is taken over, only what is new is read and tokenized."""
    owner, encoder, history = key
    scope = {"of": owner, "encoder": encoder, "at": head}
    now = list(connection.execute(_IDS[history], scope).scalars())
    wanted, known = set(now), set(last.ids)
    stay = [row for row, name in enumerate(last.ids) if name in wanted]
    new = [name for name in now if name not in known]
    if [last.ids[row] for row in stay] + new != now:  # a rollback brought back something older
        return _read(connection, key, stamp, head)
    found = [
        row for part in chunks(new) for row in connection.execute(_SOME[history], {**scope, "ids": part})
    ]
    if [row.id for row in found] != new:
        return _read(connection, key, stamp, head)
    opened = _opened(connection, owner, encoder, found)
    return last.followed_by(stamp, stay, Slice.of(owner, stamp, opened, last.type_names))
