"""Expiry: erase what has outlived its time. Only tombstones with the reason ``expired`` stay.

A cube expires when its ``expires_at`` has passed, with its earlier versions and with everything derived from
it, as in forgetting. It is kept for as long as one of these is frozen; recall passes it over all the same.
The clock is an argument, so the same call on the same store does the same.
"""

from collections.abc import Iterator
from datetime import datetime
from functools import partial

from sqlalchemy import Connection, select

from persona_sdk.memory import erasure, lifecycle
from persona_sdk.memory.cube import aware
from persona_sdk.memory.reader import StoreReader
from persona_sdk.memory.receipt import Receipt
from persona_sdk.memory.schema import cubes, to_column


def expire(store: StoreReader, owner: str | None = None, *, now: datetime) -> list[Receipt]:
    """Erase the expired cubes of an owner, or of all; one receipt for each owner that had some.

    Raises:
        InvalidInputError: `now` has no time zone.
    """
    aware(now)
    with store.reading() as connection:
        due = select(cubes.c.owner).where(cubes.c.expires_at <= to_column(now))
        if owner is not None:
            due = due.where(cubes.c.owner == owner)
        owners = sorted(set(connection.execute(due).scalars()))
        chosen = [name for name in owners if any(_due(connection, name, now))]
    return erasure.expire(store, {name: partial(_due, owner=name, now=now) for name in chosen})


def _due(connection: Connection, owner: str, now: datetime) -> Iterator[str]:
    """The owner's cubes that can go: expired, and nothing that goes with them is frozen."""
    query = select(cubes.c.id).where(cubes.c.owner == owner, cubes.c.expires_at <= to_column(now))
    for cube_id in connection.execute(query.order_by(cubes.c.seq)).scalars().all():
        if not lifecycle.any_frozen(connection, erasure.reach(connection, owner, [cube_id])):
            yield cube_id
