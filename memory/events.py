"""The audit log: what was done to a persona, by whom and when, as one chain of hashes per owner.

    hash(n) = sha256(json([n, owner, at, actor, kind, details, hash(n - 1)])),   hash(0) = 64 zeros

    symbol    column      value
    n         number      1, 2, ... without a gap
    actor     actor       ``system``, or ``<kind>:<id>``; the hash of the id when it is not the owner's own
    details   details     canonical JSON of cube ids, counts, states and hashes; never a text or a name

Every write appends one event to the chain of each owner it changes, in its own transaction. Vectors are
derived, so adding some is no event. Each event states the newest revision, and a digest of what the
revisions since the event before it added and retired. Erasing a persona erases its chain, and appends to the
chain of the store, whose owner is ``*``.

People other than the owner stand in a chain by hash only, so that erasing them leaves no id behind in it.
Who knows an id can find its events with `alias`. What `persona_sdk.memory.audit` cannot see is said there.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

from sqlalchemy import Connection, func, insert, select

from persona_sdk.memory import revisions
from persona_sdk.memory.cube import State, canonical, hashed, utc_now
from persona_sdk.memory.schema import erasures, events, from_column, to_column

STORE = "*"  # owner of the store's own chain and key; no persona can have this id
SYSTEM = "system"
GENESIS = "0" * 64

_WORDS = frozenset({*get_args(State), "read", "write", "user", "group"})
_HEX = re.compile(r"([0-9a-f]{32}|[0-9a-f]{64})|(user|group|service):[0-9a-f]{64}")
_actor: ContextVar[str] = ContextVar("actor", default=SYSTEM)


@dataclass(frozen=True)
class Event:
    """One entry of a chain."""

    owner: str
    number: int
    at: datetime
    actor: str
    kind: str
    details: Mapping[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class Head:
    """The end of a chain. Kept outside the store, it proves that nothing before it was changed later."""

    number: int
    hash: str


@contextmanager
def acting_as(actor: str) -> Iterator[None]:
    """Let the writes of this block, in this thread or task, be those of ``<kind>:<id>``."""
    token = _actor.set(actor)
    try:
        yield
    finally:
        _actor.reset(token)


def alias(principal: str) -> str:
    """How somebody else, ``<kind>:<id>``, stands in a chain: with the id hashed."""
    kind, _, name = principal.partition(":")
    return f"{kind}:{hashed(name)}" if name else kind


def link(number: int, owner: str, at: str, actor: str, kind: str, details: str, previous: str) -> str:
    """The hash of an event, of the columns of its row."""
    return hashed(canonical([number, owner, at, actor, kind, details, previous]))


def append(
    connection: Connection,
    owner: str,
    kind: str,
    details: Mapping[str, Any] | None = None,
    *,
    actor: str | None = None,
    past: Sequence[revisions.Revision] = (),
) -> None:
    """Append an event to the chain of `owner`, in the transaction of what it tells.

    Args:
        connection: the write transaction.
        owner: whose chain.
        kind: what was done, a word.
        details: what can be checked later, as `persona_sdk.memory.audit` does; ids, counts, states, hashes.
        actor: who did it; None takes the one of `acting_as`.
        past: the revisions up to the newest, as far back as the caller has read them.

    Raises:
        ValueError: details hold something else, such as text; a mistake of the calling code.
    """
    last = connection.execute(
        select(events).where(events.c.owner == owner).order_by(events.c.number.desc()).limit(1)
    ).first()
    told = {**(details or {}), **_standing(connection, owner, _revision(last), past)}
    _require_no_text(list(told.values()))
    who = _actor.get() if actor is None else actor
    values: dict[str, Any] = {
        "number": last.number + 1 if last else 1,
        "at": to_column(utc_now()),
        "actor": who if who.partition(":")[2] == owner else alias(who),
        "kind": kind,
        "details": canonical(told),
        "previous": last.hash if last else GENESIS,
    }
    values["hash"] = link(owner=owner, **values)
    connection.execute(insert(events).values(owner=owner, **values))


def _revision(row: Any) -> int:
    """The revision an event ends at; 0 before the first, and if it was tampered with: writing must go on."""
    try:
        return int(json.loads(row.details)["revision"]) if row else 0
    except (ValueError, TypeError, KeyError):
        return 0


def _standing(
    connection: Connection, owner: str, told: int, past: Sequence[revisions.Revision]
) -> dict[str, Any]:
    """What every event says of the tables: they must still agree with the newest one."""
    if owner == STORE:
        return {"erasures": connection.execute(select(func.count()).select_from(erasures)).scalar_one()}
    head = revisions.head(connection, owner)
    if head == told:
        return {"revision": head}
    if not past or past[0].parent != told:
        past = revisions.history(connection, owner, since=told)
    return {"revision": head, "digest": history_digest(past)}


def membership(groups: Iterable[str] | None) -> dict[str, list[str]]:
    """Details of a commit that set the groups of a persona."""
    return {} if groups is None else {"groups": [alias(f"group:{group}") for group in dict.fromkeys(groups)]}


def history_digest(past: Sequence[revisions.Revision]) -> str:
    """Digest of what revisions added, retired and restored; forgetting a cube later does not change it."""
    return hashed(canonical([[r.number, r.restores, sorted(r.added), sorted(r.retired)] for r in past]))


def read(connection: Connection, owner: str) -> list[Event]:
    """The chain of an owner, oldest first."""
    query = select(events).where(events.c.owner == owner).order_by(events.c.number)
    return [_to_event(owner, row._asdict()) for row in connection.execute(query)]


def head(connection: Connection, owner: str) -> Head:
    """The end of a chain, to be kept where whoever can write to the store cannot."""
    query = select(events.c.number, events.c.hash).where(events.c.owner == owner)
    row = connection.execute(query.order_by(events.c.number.desc()).limit(1)).first()
    return Head(row.number, row.hash) if row else Head(0, GENESIS)


def _to_event(owner: str, row: Mapping[str, Any]) -> Event:
    rest = {key: row[key] for key in ("number", "actor", "kind", "previous", "hash")}
    return Event(owner=owner, at=from_column(row["at"]), details=json.loads(row["details"]), **rest)


def _require_no_text(value: Any) -> None:
    if isinstance(value, str):
        if value not in _WORDS and not _HEX.fullmatch(value):
            raise ValueError("an event was given text")  # not quoted, for the same reason
    elif isinstance(value, Mapping):
        _require_no_text([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            _require_no_text(item)
    elif not isinstance(value, int):
        raise ValueError(f"an event was given a {type(value).__name__}")
