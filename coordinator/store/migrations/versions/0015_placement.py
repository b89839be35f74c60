"""where jobs may run."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    with op.batch_alter_table("job") as batch:
        batch.add_column(sa.Column("placement", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    """Take this revision back."""
    with op.batch_alter_table("job") as batch:
        batch.drop_column("placement")
