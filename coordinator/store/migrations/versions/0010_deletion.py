"""what deleting needs."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def _time(name: str, nullable: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    """Apply this revision."""
    for table in ("job", "checkpoint"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(_time("delete_time"))
    op.create_table(
        "garbage",
        sa.Column("uri", sa.String(), nullable=False),
        _time("create_time", nullable=False),
        _time("start_time"),
        sa.PrimaryKeyConstraint("uri"),
    )
    op.create_table(
        "hold",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("folder", sa.String(), nullable=False),
        _time("expire_time", nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("hold")
    op.drop_table("garbage")
    for table in ("job", "checkpoint"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column("delete_time")
