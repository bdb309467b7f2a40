"""The audit log is append-only in SQL, and every persona that is older than the log gets its first event.

An event is never updated. It is deleted only with its persona, which must be gone before; never if it is the
store's own. Triggers guard against mistakes: whoever may change the schema may also drop them, and then the
chain of hashes tells.
"""

import hashlib
import json
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_GUARDED = "OLD.owner = '*' OR EXISTS (SELECT 1 FROM personas WHERE owner = OLD.owner)"

_SQLITE = (
    "CREATE TRIGGER events_never_change BEFORE UPDATE ON events "
    "BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
    f"CREATE TRIGGER events_stay BEFORE DELETE ON events WHEN {_GUARDED} "
    "BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
)
_POSTGRESQL = (
    "CREATE FUNCTION refuse_event_change() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'events are append-only' "
    "USING ERRCODE = 'integrity_constraint_violation'; END $$",
    "CREATE FUNCTION refuse_event_deletion() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN IF {_GUARDED} THEN RAISE EXCEPTION 'events are append-only' "
    "USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN OLD; END $$",
    "CREATE TRIGGER events_never_change BEFORE UPDATE ON events "
    "FOR EACH ROW EXECUTE FUNCTION refuse_event_change()",
    "CREATE TRIGGER events_stay BEFORE DELETE ON events "
    "FOR EACH ROW EXECUTE FUNCTION refuse_event_deletion()",
)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _first_event(owner: str, details: dict[str, int]) -> dict[str, object]:
    # The formula of `persona_sdk.memory.events` at this version; a test keeps both equal.
    at, previous = datetime.now(UTC).isoformat(timespec="microseconds"), "0" * 64
    chained = [1, owner, at, "system", "migrated", _json(details), previous]
    values = dict(
        zip(("number", "owner", "at", "actor", "kind", "details", "previous"), chained, strict=True)
    )
    return values | {"hash": hashlib.sha256(_json(chained).encode()).hexdigest()}


def upgrade() -> None:
    connection = op.get_bind()
    names = ("owner", "number", "at", "actor", "kind", "details", "previous", "hash")
    events = sa.table("events", *(sa.column(name) for name in names))
    personas = sa.table("personas", sa.column("owner"), sa.column("head"))
    first = [
        _first_event(row.owner, {"revision": row.head})
        for row in connection.execute(sa.select(personas.c.owner, personas.c.head))
    ]
    erased = connection.execute(sa.select(sa.func.count()).select_from(sa.table("erasures"))).scalar_one()
    if erased:
        first.append(_first_event("*", {"erasures": erased}))
    if first:
        connection.execute(sa.insert(events), first)
    for statement in _SQLITE if connection.dialect.name == "sqlite" else _POSTGRESQL:
        op.execute(statement)
