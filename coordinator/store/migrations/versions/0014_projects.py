"""what secrets, scopes of keys, members and counted tokens need."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def _json(name: str, default: str = "{}") -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(), nullable=False, server_default=default)


def _moment(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _tokens() -> sa.Column[Any]:
    return sa.Column("trained_tokens", sa.BigInteger(), nullable=False, server_default="0")


COLUMNS: dict[str, list[sa.Column[Any]]] = {
    "api_key": [_json("scopes", "[]"), sa.Column("member", sa.String(), nullable=False, server_default="")],
    "job": [_json("secrets"), _tokens()],
    "project": [_tokens()],
    "report_cursor": [_tokens()],
}


def upgrade() -> None:
    """Apply this revision."""
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.add_column(column)
    op.create_table(
        "member",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("role", sa.Integer(), nullable=False),
        _moment("create_time"),
        _moment("update_time"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"]),
        sa.PrimaryKeyConstraint("project_id", "id"),
    )
    op.create_table(
        "secret",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("ciphertext", sa.Text(), nullable=False),
        _moment("create_time"),
        _moment("update_time"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"]),
        sa.PrimaryKeyConstraint("project_id", "id"),
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("secret")
    op.drop_table("member")
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.drop_column(column.name)
