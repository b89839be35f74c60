"""how much keys may ask of endpoints in a minute."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    with op.batch_alter_table("api_key") as batch:
        batch.add_column(sa.Column("requests_per_minute", sa.Integer(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("tokens_per_minute", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Take this revision back."""
    with op.batch_alter_table("api_key") as batch:
        batch.drop_column("requests_per_minute")
        batch.drop_column("tokens_per_minute")
