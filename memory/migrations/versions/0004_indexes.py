"""Indexes for what grew with the store: cubes by slot and expiry, and the history of one revision.

Some stores have the first four: for a while migration 0002 made them. The index over an owner's memberships
gets a third column; `persona_sdk.memory.schema` says why.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("cubes_by_slot", "cubes", ["owner", "slot"], if_not_exists=True)
    op.create_index("cubes_by_expiry", "cubes", ["expires_at"], if_not_exists=True)
    op.create_index("memberships_by_start", "memberships", ["owner", "from_revision"], if_not_exists=True)
    op.create_index(
        "memberships_by_end", "memberships", ["owner", "to_revision", "cube_id"], if_not_exists=True
    )
    op.drop_index("memberships_of_owner", "memberships")
    op.create_index("memberships_of_owner", "memberships", ["owner", "cube_id", "from_revision"])
