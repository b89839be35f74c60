"""what endpoints serve while they change, how their canaries fare, and what happened to them."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    with op.batch_alter_table("endpoint") as batch:
        batch.add_column(sa.Column("serving", sa.JSON(), nullable=False, server_default="{}"))
        batch.add_column(sa.Column("rollout", sa.JSON(), nullable=False, server_default="{}"))
        batch.add_column(sa.Column("events", sa.JSON(), nullable=False, server_default="[]"))
    # What was ready is what answers.
    op.execute("UPDATE endpoint SET serving = desired WHERE state = 'ENDPOINT_STATE_READY'")


def downgrade() -> None:
    """Take this revision back."""
    with op.batch_alter_table("endpoint") as batch:
        batch.drop_column("serving")
        batch.drop_column("rollout")
        batch.drop_column("events")
