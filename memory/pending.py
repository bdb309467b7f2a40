"""The queue of cubes that wait for a task, in the table ``pending``: turns for enrichment, above all.

A task is queued in the transaction that stores its cube and deleted in the one that stores its outcome, so
a crash at any moment leaves it either waiting or done. Forgetting the cube takes its tasks with it. A task
whose cube is not live, as after a rollback, rests: it is kept for when the cube comes back, and is neither
done nor counted until then.
Functions work inside the caller's transaction and take the owner they are about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from persona_sdk.errors import RevisionConflictError
from persona_sdk.memory.rows import chunks
from persona_sdk.memory.schema import memberships, pending

Task: TypeAlias = Literal["enrich", "embed"]
TASKS: tuple[Task, ...] = ("embed", "enrich")


@dataclass(frozen=True)
class Waiting:
    """One task that was not done yet."""

    owner: str
    cube_id: str
    task: Task
    attempts: int


def enqueue(connection: Connection, owner: str, cube_ids: Sequence[str], task: Task) -> None:
    """Queue a task for cubes that do not have it yet."""
    if cube_ids:
        rows = [{"owner": owner, "cube_id": cube_id, "task": task} for cube_id in cube_ids]
        connection.execute(insert(pending), rows)


def owners(connection: Connection, *, attempts: int) -> list[str]:
    """Who has a task of ours that failed less than `attempts` times."""
    query = select(pending.c.owner).where(pending.c.task.in_(TASKS), pending.c.attempts < attempts)
    return list(connection.execute(query.distinct().order_by(pending.c.owner)).scalars())


def waiting(connection: Connection, owner: str, *, among: Sequence[str] | None = None) -> list[Waiting]:
    """The owner's tasks of live cubes in order, also those that failed too often.

    `among` are the cubes that are asked about; None asks about all.
    """
    mine = (pending.c.owner == owner) & pending.c.task.in_(TASKS)
    live = (
        select(memberships.c.seq)
        .where(memberships.c.owner == owner, memberships.c.cube_id == pending.c.cube_id)
        .where(memberships.c.to_revision.is_(None))
        .exists()
    )
    query = select(pending).where(mine, live)
    parts = [query] if among is None else [query.where(pending.c.cube_id.in_(ids)) for ids in chunks(among)]
    found = [row for part in parts for row in connection.execute(part)]
    return [Waiting(r.owner, r.cube_id, r.task, r.attempts) for r in sorted(found, key=lambda r: r.seq)]


def finish(connection: Connection, owner: str, tasks: Sequence[Waiting]) -> None:
    """Take tasks out of the queue.

    Raises:
        RevisionConflictError: one is not there any more; somebody else has done it, or its cube is forgotten.
    """
    for task in tasks:
        if not connection.execute(delete(pending).where(_is(task, owner))).rowcount:
            raise RevisionConflictError(
                "Somebody else has done this work.", hint="Look at the queue again; nothing was committed."
            )


def fail(connection: Connection, owner: str, tasks: Sequence[Waiting]) -> None:
    """Count a failed attempt."""
    for task in tasks:
        counted = update(pending).values(attempts=pending.c.attempts + 1)
        connection.execute(counted.where(_is(task, owner)))


def reset(connection: Connection, owner: str) -> int:
    """Give the owner's failed tasks new attempts; how many there were."""
    mine = (pending.c.owner == owner) & pending.c.task.in_(TASKS) & (pending.c.attempts > 0)
    return connection.execute(update(pending).where(mine).values(attempts=0)).rowcount


def _is(task: Waiting, owner: str) -> ColumnElement[bool]:
    # Not by seq: SQLite gives the number of a deleted row to the next one.
    return (pending.c.owner == owner) & (pending.c.cube_id == task.cube_id) & (pending.c.task == task.task)
