"""The first schema: personas, revisions, cubes, intervals, provenance, vectors and tombstones."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _owner_of_persona(primary_key: bool = False) -> sa.Column[str]:
    key = sa.ForeignKey("personas.owner", ondelete="CASCADE")
    return sa.Column("owner", sa.String(), key, nullable=False, primary_key=primary_key)


def _of_cube() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["owner", "cube_id"], ["cubes.owner", "cubes.id"], ondelete="CASCADE")


def _text(name: str, primary_key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False, primary_key=primary_key)


def _sequence() -> sa.Column[int]:
    return sa.Column("seq", sa.Integer(), primary_key=True)


def _interval() -> tuple[sa.Column[int], sa.Column[int]]:
    return sa.Column("from_revision", sa.Integer(), nullable=False), sa.Column("to_revision", sa.Integer())


def upgrade() -> None:
    op.create_table(
        "personas",
        _text("owner", primary_key=True),
        _text("kind"),
        sa.Column("head", sa.Integer(), nullable=False),
        _text("stamp"),
        _text("created_at"),
        sa.CheckConstraint("kind in ('user', 'group')", name="persona_kind"),
    )
    op.create_table(
        "revisions",
        _owner_of_persona(primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("message", sa.Text(), nullable=False),
        _text("created_at"),
        sa.Column("restores", sa.Integer()),
    )
    op.create_table(
        "cubes",
        _sequence(),
        _owner_of_persona(),
        _text("id"),
        _text("kind"),
        sa.Column("text", sa.Text()),
        sa.Column("blob", sa.String()),
        sa.Column("header", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.UniqueConstraint("owner", "id", name="cube_of_owner"),
        sa.CheckConstraint("kind in ('plaintext', 'activation', 'parametric')", name="cube_kind"),
    )
    op.create_index("cubes_by_id", "cubes", ["id"])
    op.create_index("cubes_by_blob", "cubes", ["blob"])
    op.create_table("memberships", _sequence(), _text("owner"), _text("cube_id"), *_interval(), _of_cube())
    op.create_index("memberships_of_owner", "memberships", ["owner", "cube_id"])
    op.create_table("group_memberships", _sequence(), _owner_of_persona(), _text("group_id"), *_interval())
    op.create_index("group_memberships_of_owner", "group_memberships", ["owner"])
    op.create_index("group_memberships_by_group", "group_memberships", ["group_id"])
    op.create_table(
        "sources",
        *(_text(name, primary_key=True) for name in ("owner", "cube_id", "source_owner", "source_id")),
        _of_cube(),
    )
    op.create_index("sources_by_source", "sources", ["source_owner", "source_id"])
    op.create_table(
        "vectors",
        _sequence(),
        *(_text(name) for name in ("owner", "cube_id", "encoder")),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        _of_cube(),
        sa.UniqueConstraint("owner", "encoder", "cube_id", name="vector_of_cube"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "tombstones",
        _sequence(),
        _owner_of_persona(),
        _text("cube_id"),
        _text("at"),
        sa.Column("from_revision", sa.Integer(), nullable=False),
        sa.Column("to_revision", sa.Integer(), nullable=False),
    )
    op.create_index("tombstones_of_owner", "tombstones", ["owner"])
    op.create_table(
        "erasures", _sequence(), _text("owner"), _text("at"), sa.Column("counts", sa.Text(), nullable=False)
    )
