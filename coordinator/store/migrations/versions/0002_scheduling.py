"""what scheduling, retries and projects need."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _text(name: str, default: str, kind: Any = sa.String) -> sa.Column[Any]:
    return sa.Column(name, kind(), nullable=False, server_default=default)


def _number(name: str, default: str = "0", kind: Any = sa.Float) -> sa.Column[Any]:
    return sa.Column(name, kind(), nullable=False, server_default=default)


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(), nullable=False, server_default="{}")


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=True)


COLUMNS = {
    "project": [
        _text("display_name", ""),
        _number("share", "1"),
        *(_json(name) for name in ("quota", "ceiling", "budget")),
        _number("version", "1", sa.BigInteger),
        *(_number(name) for name in ("cpu_seconds", "gpu_seconds", "decayed_cpu_seconds", "decayed_gpu_seconds")),
        _time("decay_time"),
    ],
    "job": [
        *(_json(name) for name in ("shape", "retry", "budget")),
        _time("pause_time"),
        _text("pause_reason", "UNSPECIFIED"),
        _time("finish_time"),
        _text("finish_reason", "UNSPECIFIED"),
        _time("not_before"),
        _text("queue_reason", "", sa.Text),
        _number("cpu_seconds"),
        _number("gpu_seconds"),
    ],
    "job_run": [
        _text("end_reason", "UNSPECIFIED"),
        _json("error"),
        _number("workers", kind=sa.Integer),
        _number("resumed_step", kind=sa.BigInteger),
        _number("cpus"),
        _number("gpus"),
    ],
}


def upgrade() -> None:
    """Apply."""
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.add_column(column)
    op.create_table(
        "job_dependency",
        sa.Column("job_uid", sa.String(), nullable=False),
        sa.Column("after_uid", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["job_uid"], ["job.uid"]),
        sa.ForeignKeyConstraint(["after_uid"], ["job.uid"]),
        sa.PrimaryKeyConstraint("job_uid", "after_uid"),
    )
    op.create_index("ix_job_dependency_after_uid", "job_dependency", ["after_uid"])


def downgrade() -> None:
    """Take back."""
    op.drop_table("job_dependency")
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.drop_column(column.name)
