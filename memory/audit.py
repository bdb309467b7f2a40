"""Is the audit log whole, and does it agree with the tables?

    `verify` finds                                          by
    an event that was edited, inserted, removed or moved    its hash, its number, the hash before it
    a revision that was removed, added or edited            the digest that an event holds of it
    a tail that was cut off                                 the newest event and the tables disagree
    a state, grant or snapshot that nobody wrote            replaying the events

There is no key in the chain. Whoever can write to the database can compute all hashes anew, or put back an
older copy of the whole store, and nothing inside can show it. Uses leave no trace but their event, so cutting
off a tail of uses is not seen either. All of this is found with an anchor: keep `events.head` somewhere else
and hand it to `verify` later. Texts and headers of cubes are not covered.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, func, select

from persona_sdk.memory import events, revisions
from persona_sdk.memory.cube import hashed
from persona_sdk.memory.events import Head, alias
from persona_sdk.memory.schema import erasures, grants, snapshots, states
from persona_sdk.memory.schema import events as event_rows


@dataclass(frozen=True)
class Fault:
    """What is wrong, and at which event; 0 when it is about none."""

    number: int
    what: str


@dataclass
class _Ledger:
    """What the events say the tables hold."""

    revision: int = 0
    states: dict[str, str] = field(default_factory=dict)
    grants: dict[tuple[str, str], str] = field(default_factory=dict)
    snapshots: dict[str, int] = field(default_factory=dict)

    def apply(self, details: dict[str, Any]) -> None:
        self.revision = details["revision"]
        self.states |= details.get("states", {})
        self.snapshots |= details.get("snapshots", {})
        self.grants |= {(cube, who): right for cube, who, right in details.get("granted", ())}
        for cube_id, who in details.get("revoked", ()):
            self.grants.pop((cube_id, who), None)
        gone = set(details.get("erased", ()))
        self.states = {cube_id: state for cube_id, state in self.states.items() if cube_id not in gone}
        self.grants = {key: right for key, right in self.grants.items() if key[0] not in gone}


def verify(connection: Connection, owner: str, *, anchor: Head | None = None) -> list[Fault]:
    """Everything that is wrong with the chain of an owner (`events.STORE` for the store's); none is good.

    Args:
        connection: a read transaction.
        owner: whose chain.
        anchor: an end of the chain that was kept outside.
    """
    rows = connection.execute(
        select(event_rows).where(event_rows.c.owner == owner).order_by(event_rows.c.number)
    ).all()
    faults = _chain_faults(owner, rows)
    if anchor is not None and anchor.number:
        known = {row.number: row.hash for row in rows}
        if anchor.number not in known:
            faults.append(Fault(anchor.number, "is missing, but was anchored"))
        elif known[anchor.number] != anchor.hash:
            faults.append(Fault(anchor.number, "is not the one that was anchored"))
    if faults:
        return faults  # what a broken chain says of the tables means nothing
    return _store_faults(connection, rows) if owner == events.STORE else _faults(connection, owner, rows)


def _chain_faults(owner: str, rows: Sequence[Any]) -> list[Fault]:
    faults = []
    number, previous = 0, events.GENESIS
    for row in rows:
        if row.number != number + 1:
            faults.append(Fault(number + 1, "is missing"))
        elif row.previous != previous:
            faults.append(Fault(row.number, "does not follow the one before it"))
        columns = (row.at, row.actor, row.kind, row.details, row.previous)
        if events.link(row.number, owner, *columns) != row.hash:
            faults.append(Fault(row.number, "was changed"))
        number, previous = row.number, row.hash
    if [row.seq for row in rows] != sorted(row.seq for row in rows):
        faults.append(Fault(0, "events were not written in the order of their numbers"))
    return faults


def _store_faults(connection: Connection, rows: Sequence[Any]) -> list[Fault]:
    told = json.loads(rows[-1].details)["erasures"] if rows else 0
    found = connection.execute(select(func.count()).select_from(erasures)).scalar_one()
    what = f"the events tell of {told} erased personas, the table of {found}"
    return [] if told == found else [Fault(0, what)]


def _faults(connection: Connection, owner: str, rows: Sequence[Any]) -> list[Fault]:
    faults: list[Fault] = []
    ledger = _Ledger()
    past = revisions.history(connection, owner)
    for row in rows:
        details, before = json.loads(row.details), ledger.revision
        ledger.apply(details)
        covered = past[before : ledger.revision]  # numbers are 1, 2, ...
        digest = events.history_digest(covered) if ledger.revision != before else None
        if row.kind == "migrated":
            continue
        if digest != details.get("digest"):
            faults.append(Fault(row.number, f"revisions {before + 1} to {ledger.revision} are others"))
        if ledger.revision > before + 1 and row.kind != "import":  # an event was cut off, then came a write
            faults.append(Fault(row.number, f"tells of {ledger.revision - before} revisions at once"))
    head = revisions.head(connection, owner)
    if [r.number for r in past] != list(range(1, head + 1)):
        faults.append(Fault(0, f"the history does not hold each revision up to {head} once"))
    if ledger.revision != head:
        faults.append(Fault(0, f"the events end at revision {ledger.revision}, the history at {head}"))
    for table, told, found in (
        ("states", ledger.states, _states(connection, owner)),
        ("grants", ledger.grants, _grants(connection, owner)),
        ("snapshots", ledger.snapshots, _snapshots(connection, owner)),
    ):
        if told != found:
            differ = len(dict(told.items() ^ found.items()))
            faults.append(Fault(0, f"{differ} of the {table} are not as the events tell"))
    return faults


def _states(connection: Connection, owner: str) -> dict[str, str]:
    found = connection.execute(select(states.c.cube_id, states.c.state).where(states.c.owner == owner))
    return {row.cube_id: row.state for row in found}


def _grants(connection: Connection, owner: str) -> dict[tuple[str, str], str]:
    found = connection.execute(select(grants).where(grants.c.owner == owner))
    return {(row.cube_id, alias(row.principal)): row.right for row in found}


def _snapshots(connection: Connection, owner: str) -> dict[str, int]:
    found = connection.execute(select(snapshots).where(snapshots.c.owner == owner))
    return {hashed(row.name): row.revision for row in found}
