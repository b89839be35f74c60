"""number events within their project."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NUMBER = """
UPDATE job_event SET project_id = numbered.project_id, project_sequence = numbered.number
FROM (
    SELECT job_event.job_uid, job_event.sequence, job.project_id,
        ROW_NUMBER() OVER (PARTITION BY job.project_id ORDER BY job_event.time, job_event.job_uid, job_event.sequence) AS number
    FROM job_event JOIN job ON job.uid = job_event.job_uid
) AS numbered
WHERE job_event.job_uid = numbered.job_uid AND job_event.sequence = numbered.sequence
"""
COUNT = """
UPDATE project SET event_sequence =
    (SELECT COALESCE(MAX(project_sequence), 0) FROM job_event WHERE job_event.project_id = project.id)
"""


def upgrade() -> None:
    """Apply this revision; events that are there are numbered by their time."""
    with op.batch_alter_table("project") as batch:
        batch.add_column(sa.Column("event_sequence", sa.BigInteger(), nullable=False, server_default="0"))
    with op.batch_alter_table("job_event") as batch:
        batch.add_column(sa.Column("project_id", sa.String(), nullable=False, server_default=""))
        batch.add_column(sa.Column("project_sequence", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(NUMBER)
    op.execute(COUNT)
    op.create_index("ix_job_event_project", "job_event", ["project_id", "project_sequence"], unique=True)


def downgrade() -> None:
    """Take this revision back."""
    op.drop_index("ix_job_event_project", "job_event")
    with op.batch_alter_table("job_event") as batch:
        batch.drop_column("project_sequence")
        batch.drop_column("project_id")
    with op.batch_alter_table("project") as batch:
        batch.drop_column("event_sequence")
