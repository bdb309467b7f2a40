"""States of life, validity, uses, grants, snapshots, pending tasks, the audit log and keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# As they were at this version; `persona_sdk.memory.lifecycle` says what they mean.
_MOVES = (
    *(("generated", state) for state in ("activated", "merged", "archived", "frozen")),
    *(("activated", state) for state in ("merged", "archived", "frozen")),
    *(("merged", state) for state in ("activated", "archived", "frozen")),
    *(("archived", state) for state in ("activated", "frozen")),
    *(("frozen", state) for state in ("generated", "activated", "merged", "archived")),
)


def _of_cube() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["owner", "cube_id"], ["cubes.owner", "cubes.id"], ondelete="CASCADE")


def _text(name: str, primary_key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False, primary_key=primary_key)


def _cube_key() -> tuple[sa.Column[str], sa.Column[str]]:
    return _text("owner", primary_key=True), _text("cube_id", primary_key=True)


def upgrade() -> None:
    for name in ("slot", "valid_from", "valid_to", "expires_at"):
        op.add_column("cubes", sa.Column(name, sa.String()))
    op.add_column("tombstones", sa.Column("reason", sa.String(), nullable=False, server_default="forgotten"))
    moves = op.create_table(
        "moves", *(_text(name, primary_key=True) for name in ("owner", "before", "state"))
    )
    op.bulk_insert(moves, [{"owner": "*", "before": before, "state": state} for before, state in _MOVES])
    op.create_table(
        "states",
        *_cube_key(),
        sa.Column("everybody", sa.String(), nullable=False, server_default="*"),
        *(_text(name) for name in ("before", "state", "since")),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("legal_basis", sa.Text()),
        _of_cube(),
        sa.ForeignKeyConstraint(
            ["everybody", "before", "state"], ["moves.owner", "moves.before", "moves.state"]
        ),
    )
    op.create_table(
        "uses",
        *_cube_key(),
        sa.Column("hits", sa.Integer(), nullable=False),
        sa.Column("strength", sa.Float(), nullable=False),
        _text("last_used"),
        _of_cube(),
    )
    op.create_table(
        "grants",
        *_cube_key(),
        _text("principal", primary_key=True),
        *(_text(name) for name in ("right", "at")),
        _of_cube(),
        sa.CheckConstraint("\"right\" in ('read', 'write')", name="grant_right"),
    )
    op.create_index("grants_by_principal", "grants", ["principal"])
    op.create_table(
        "snapshots",
        sa.Column(
            "owner",
            sa.String(),
            sa.ForeignKey("personas.owner", ondelete="CASCADE"),
            primary_key=True,
            nullable=False,
        ),
        _text("name", primary_key=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        _text("at"),
    )
    op.create_table(
        "pending",
        sa.Column("seq", sa.Integer(), primary_key=True),
        *(_text(name) for name in ("owner", "cube_id", "task")),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        _of_cube(),
        sa.UniqueConstraint("owner", "cube_id", "task", name="pending_task"),
    )
    op.create_table(
        "events",
        sa.Column("seq", sa.Integer(), primary_key=True),
        _text("owner"),
        sa.Column("number", sa.Integer(), nullable=False),
        *(_text(name) for name in ("at", "actor", "kind")),
        sa.Column("details", sa.Text(), nullable=False),
        *(_text(name) for name in ("previous", "hash")),
        sa.UniqueConstraint("owner", "number", name="event_of_owner"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "keys",
        _text("owner", primary_key=True),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        _text("created_at"),
    )
