"""The tables. Every one has an ``owner`` column, and every query names the owner it is about.

    personas            who exists: kind, newest revision, and a stamp that changes with every write
    revisions           one row per commit
    cubes               header and text; ``blob`` names a file of the vault
    memberships         the interval of revisions in which a cube is live
    group_memberships   the same for the groups a persona belongs to
    sources             provenance, kept apart from the header so that forgetting can follow it
    vectors             derived: embeddings by encoder; ``seq`` is never reused
    moves               the legal moves between states of life; the same for everybody
    states              the state of a cube that has left the first one
    uses                how often and when a cube was used
    grants              who else may do what with a cube
    snapshots           names for revisions
    pending             cubes that wait for a task, as turns for enrichment
    events              the audit log: one chain of hashes per owner
    keys                wrapped data keys, of encrypted stores
    tombstones          what is left of a forgotten cube: id, time and the intervals it was live in
    erasures            what is left of a forgotten persona: counts. Its ``owner`` is the id's SHA-256

A membership is live at revision n when ``from_revision <= n`` and (``to_revision`` is NULL or ``> n``).
``slot``, ``valid_from``, ``valid_to`` and ``expires_at`` of a cube repeat its header, to be searched by.
The tables are created by `migrations`; a test keeps both descriptions equal.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    ColumnElement,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    or_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

FORGOTTEN = "(forgotten)"  # the message of a revision whose own may have told of a forgotten cube

metadata = MetaData()


def _of_cube() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["owner", "cube_id"], ["cubes.owner", "cubes.id"], ondelete="CASCADE")


def _owner_of_persona(primary_key: bool = False) -> Column[str]:
    key = ForeignKey("personas.owner", ondelete="CASCADE")
    return Column("owner", key, nullable=False, primary_key=primary_key)


def _cube_key() -> tuple[Column[str], Column[str]]:
    return Column("owner", String, primary_key=True), Column("cube_id", String, primary_key=True)


def _interval() -> tuple[Column[int], Column[int]]:
    return Column("from_revision", Integer, nullable=False), Column("to_revision", Integer)


personas = Table(
    "personas",
    metadata,
    Column("owner", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("head", Integer, nullable=False),
    Column("stamp", String, nullable=False),
    Column("created_at", String, nullable=False),
    CheckConstraint("kind in ('user', 'group')", name="persona_kind"),
)

revisions = Table(
    "revisions",
    metadata,
    _owner_of_persona(primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("message", Text, nullable=False),
    Column("created_at", String, nullable=False),
    Column("restores", Integer),
)

cubes = Table(
    "cubes",
    metadata,
    Column("seq", Integer, primary_key=True),
    _owner_of_persona(),
    Column("id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("text", Text),
    Column("blob", String),
    Column("header", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("slot", String),
    Column("valid_from", String),
    Column("valid_to", String),
    Column("expires_at", String),
    UniqueConstraint("owner", "id", name="cube_of_owner"),
    CheckConstraint("kind in ('plaintext', 'activation', 'parametric')", name="cube_kind"),
    Index("cubes_by_id", "id"),
    Index("cubes_by_blob", "blob"),
    Index("cubes_by_slot", "owner", "slot"),
    Index("cubes_by_expiry", "expires_at"),
)

memberships = Table(
    "memberships",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("owner", String, nullable=False),
    Column("cube_id", String, nullable=False),
    *_interval(),
    _of_cube(),
    # The first two columns alone would do, but SQLite, which has no statistics, would then take one of the
    # others to look up one cube: it prefers more conditions to better ones.
    Index("memberships_of_owner", "owner", "cube_id", "from_revision"),
    Index("memberships_by_start", "owner", "from_revision"),
    Index("memberships_by_end", "owner", "to_revision", "cube_id"),
)

group_memberships = Table(
    "group_memberships",
    metadata,
    Column("seq", Integer, primary_key=True),
    _owner_of_persona(),
    Column("group_id", String, nullable=False),
    *_interval(),
    Index("group_memberships_of_owner", "owner"),
    Index("group_memberships_by_group", "group_id"),
)

sources = Table(
    "sources",
    metadata,
    *_cube_key(),
    Column("source_owner", String, primary_key=True),
    Column("source_id", String, primary_key=True),
    _of_cube(),
    Index("sources_by_source", "source_owner", "source_id"),
)

vectors = Table(
    "vectors",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("owner", String, nullable=False),
    Column("cube_id", String, nullable=False),
    Column("encoder", String, nullable=False),
    Column("data", LargeBinary, nullable=False),
    _of_cube(),
    UniqueConstraint("owner", "encoder", "cube_id", name="vector_of_cube"),
    sqlite_autoincrement=True,
)

moves = Table(
    "moves",
    metadata,
    Column("owner", String, primary_key=True),  # always "*"
    Column("before", String, primary_key=True),
    Column("state", String, primary_key=True),
)

states = Table(
    "states",
    metadata,
    *_cube_key(),
    Column("everybody", String, nullable=False, server_default="*"),
    Column("before", String, nullable=False),
    Column("state", String, nullable=False),
    Column("since", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("legal_basis", Text),
    _of_cube(),
    ForeignKeyConstraint(["everybody", "before", "state"], ["moves.owner", "moves.before", "moves.state"]),
)

uses = Table(
    "uses",
    metadata,
    *_cube_key(),
    Column("hits", Integer, nullable=False),
    Column("strength", Float, nullable=False),
    Column("last_used", String, nullable=False),
    _of_cube(),
)

grants = Table(
    "grants",
    metadata,
    *_cube_key(),
    Column("principal", String, primary_key=True),
    Column("right", String, nullable=False),
    Column("at", String, nullable=False),
    _of_cube(),
    CheckConstraint("\"right\" in ('read', 'write')", name="grant_right"),
    Index("grants_by_principal", "principal"),
)

snapshots = Table(
    "snapshots",
    metadata,
    _owner_of_persona(primary_key=True),
    Column("name", String, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("at", String, nullable=False),
)

pending = Table(
    "pending",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("owner", String, nullable=False),
    Column("cube_id", String, nullable=False),
    Column("task", String, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    _of_cube(),
    UniqueConstraint("owner", "cube_id", "task", name="pending_task"),
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("owner", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("at", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("details", Text, nullable=False),
    Column("previous", String, nullable=False),
    Column("hash", String, nullable=False),
    UniqueConstraint("owner", "number", name="event_of_owner"),
    sqlite_autoincrement=True,
)

keys = Table(
    "keys",
    metadata,
    Column("owner", String, primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created_at", String, nullable=False),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("seq", Integer, primary_key=True),
    _owner_of_persona(),
    Column("cube_id", String, nullable=False),
    Column("at", String, nullable=False),
    Column("from_revision", Integer, nullable=False),
    Column("to_revision", Integer, nullable=False),
    Column("reason", String, nullable=False, server_default="forgotten"),
    Index("tombstones_of_owner", "owner"),
)

erasures = Table(
    "erasures",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("owner", String, nullable=False),
    Column("at", String, nullable=False),
    Column("counts", Text, nullable=False),
)

# What is erased with a cube, and with its persona, after which its events may go.
BY_CUBE = (memberships, sources, vectors, states, uses, grants, pending)
BY_OWNER = (tombstones, group_memberships, snapshots, keys, revisions)


class ByteLength(GenericFunction[int]):
    """Bytes of a text in UTF-8, for which SQLite and PostgreSQL have no common function."""

    type = Integer()
    inherit_cache = True


@compiles(ByteLength, "sqlite")
def _in_sqlite(element: ByteLength, compiler: SQLCompiler, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


@compiles(ByteLength)
def _elsewhere(element: ByteLength, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


def live_at(table: Table, owner: str, revision: int) -> ColumnElement[bool]:
    """The rows of an interval table that are live at `revision` of `owner`."""
    ends = table.c.to_revision
    return (
        (table.c.owner == owner) & (table.c.from_revision <= revision) & or_(ends.is_(None), ends > revision)
    )


def to_column(moment: datetime) -> str:
    """A time as it is stored: ISO 8601 in UTC, so that text order is time order."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def from_column(value: str) -> datetime:
    """Inverse of `to_column`."""
    return datetime.fromisoformat(value)
