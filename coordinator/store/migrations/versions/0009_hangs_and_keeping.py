"""what hung ranks and keep policies need."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def _json(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.JSON(), nullable=False, server_default="{}")


COLUMNS: dict[str, list[sa.Column[Any]]] = {
    "job": [sa.Column("hang_timeout_seconds", sa.Float(), nullable=True)],
    "job_run": [_json("standings")],
    "checkpoint": [_json("figures")],
}


def upgrade() -> None:
    """Apply this revision."""
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.add_column(column)


def downgrade() -> None:
    """Take this revision back."""
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.drop_column(column.name)
