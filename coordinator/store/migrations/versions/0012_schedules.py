"""schedules, and which job is of which."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def _time(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "schedule",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("uid", "cron", "time_zone")),
        sa.Column("job", sa.JSON(), nullable=False),
        sa.Column("overlap", sa.Integer(), nullable=False),
        sa.Column("catch_up_seconds", sa.Float(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        _time("next_time", nullable=True),
        sa.Column("firings", sa.JSON(), nullable=False),
        sa.Column("creator", sa.String(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        _time("create_time"),
        _time("update_time"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"]),
        sa.PrimaryKeyConstraint("project_id", "id"),
    )
    with op.batch_alter_table("job") as batch:
        batch.add_column(sa.Column("schedule", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    """Take this revision back."""
    with op.batch_alter_table("job") as batch:
        batch.drop_column("schedule")
    op.drop_table("schedule")
