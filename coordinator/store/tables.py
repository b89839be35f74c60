"""The tables. Proto messages are kept as their JSON with the contract's field names, so that a person can read the store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Column, DateTime, Index, Text, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel


class UTCDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite drops time zones, so it is given back here."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC; refuse moments without a zone."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a moment without a time zone")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """The present moment in UTC."""
    return datetime.now(UTC)


def _time(nullable: bool = False) -> Any:
    return Field(default=None if nullable else ..., sa_type=UTCDateTime, nullable=nullable)


def _json(default: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    return Field(default_factory=default, sa_type=JSON, nullable=False)


def _big(default: int = 0) -> Any:
    return Field(default=default, sa_column=Column(BigInteger, nullable=False))


class StackFact(SQLModel, table=True):
    """Facts about the stack as a whole, such as the secret that claim tokens are derived from."""

    __tablename__: ClassVar[Any] = "stack_fact"
    key: str = Field(primary_key=True)
    value: str


class Leader(SQLModel, table=True):
    """Which coordinator leads, in one row (see store/leader.py)."""

    id: int = Field(primary_key=True)
    epoch: int = _big()
    holder: str = ""
    beat: int = _big()
    beat_time: datetime | None = _time(nullable=True)


class Project(SQLModel, table=True):
    """A tenant."""

    id: str = Field(primary_key=True)
    display_name: str = ""
    share: float = 1.0
    quota: dict[str, float] = _json()
    ceiling: dict[str, float] = _json()
    budget: dict[str, float] = _json()
    version: int = _big(1)
    # What its ended runs spent in all, and the same decayed to `decay_time` (see jobs/usage.py).
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    trained_tokens: int = _big()
    decayed_cpu_seconds: float = 0.0
    decayed_gpu_seconds: float = 0.0
    decay_time: datetime | None = _time(nullable=True)
    # Number of the latest event of its jobs.
    event_sequence: int = _big()
    # Highest numbers of events that are gone: for their age, or with a job that was deleted (see compaction.py).
    events_compacted: int = _big()
    events_deleted: int = _big()
    create_time: datetime = _time()


class ApiKey(SQLModel, table=True):
    """An API key. Only the SHA-256 of its secret is kept; the secret has 256 random bits, so no slow hash is needed."""

    __tablename__: ClassVar[Any] = "api_key"
    id: str = Field(primary_key=True)
    project_id: str = Field(foreign_key="project.id", index=True)
    display_name: str
    role: int
    token_sha256: str = Field(unique=True)
    create_time: datetime = _time()
    expire_time: datetime | None = _time(nullable=True)
    revoke_time: datetime | None = _time(nullable=True)
    # What it may touch within its role (see common/scopes.py); everything where it is empty.
    scopes: list[str] = _json(list)
    # Whose it is; nobody's where empty. The name outlives the membership, with which the key is revoked.
    member: str = ""
    # At endpoints; 0 is no limit.
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class Member(SQLModel, table=True):
    """A person or service of a project; `role` bounds what its keys may do."""

    project_id: str = Field(primary_key=True, foreign_key="project.id")
    id: str = Field(primary_key=True)
    display_name: str = ""
    role: int
    create_time: datetime = _time()
    update_time: datetime = _time()


class Job(SQLModel, table=True):
    """A job. `sequence` numbers its events, `version` every change; wishes are columns, `state` is what was observed."""

    __table_args__ = (
        UniqueConstraint("project_id", "job_id"),
        UniqueConstraint("project_id", "request_id"),
        Index("ix_job_project_created", "project_id", "create_time", "uid"),
        Index("ix_job_state", "state"),
    )
    uid: str = Field(primary_key=True)
    project_id: str = Field(foreign_key="project.id")
    job_id: str
    kind: str
    display_name: str
    labels: dict[str, str] = _json()
    priority: int = 0
    time_limit_seconds: float | None = None
    hang_timeout_seconds: float | None = None
    spec: dict[str, Any] = _json()
    inputs: dict[str, Any] = _json()
    # What it holds while it runs, and how that is made up (scheduling/model.py, Shape).
    cpus: float = 0.0
    gpus: float = 0.0
    shape: dict[str, Any] = _json()
    # Where it may run, as it was asked for.
    placement: dict[str, Any] = _json()
    retry: dict[str, Any] = _json()
    budget: dict[str, float] = _json()
    request_id: str | None = None
    request_sha256: str = ""
    creator: str = ""
    # Id of the schedule that created it.
    schedule: str = ""
    # Names of secrets, by the environment variables that its processes get them in.
    secrets: dict[str, str] = _json()

    state: str
    end_reason: str = "UNSPECIFIED"
    run: int = 0
    attempt: int = 0
    sequence: int = _big()
    log_sequence: int = _big()
    version: int = _big(1)
    progress: dict[str, Any] = _json()
    progress_version: int = _big()
    result: dict[str, Any] = _json()
    error: dict[str, Any] = _json()

    # Wishes: each with when and why; empty while nobody wishes it.
    cancel_time: datetime | None = _time(nullable=True)
    cancel_reason: str = "UNSPECIFIED"
    pause_time: datetime | None = _time(nullable=True)
    pause_reason: str = "UNSPECIFIED"
    finish_time: datetime | None = _time(nullable=True)
    finish_reason: str = "UNSPECIFIED"

    # Not started before this moment: the pause after a fault.
    not_before: datetime | None = _time(nullable=True)
    # Why it waits, as last told in an event.
    queue_reason: str = Field(default="", sa_column=Column(Text, nullable=False))
    # What its ended runs spent.
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    trained_tokens: int = _big()

    # W3C's traceparent of the call that made it; empty where nobody traces.
    trace_parent: str = ""

    create_time: datetime = _time()
    start_time: datetime | None = _time(nullable=True)
    end_time: datetime | None = _time(nullable=True)
    update_time: datetime = _time()
    # Numbers up to which its events and log lines are no longer kept (see compaction.py).
    events_compacted: int = _big()
    logs_compacted: int = _big()
    # Deleted: nobody sees it any more, and the collector removes what belongs to it (see collector.py).
    delete_time: datetime | None = _time(nullable=True)


class JobDependency(SQLModel, table=True):
    """`job_uid` starts only after `after_uid` has succeeded."""

    __tablename__: ClassVar[Any] = "job_dependency"
    job_uid: str = Field(primary_key=True, foreign_key="job.uid")
    after_uid: str = Field(primary_key=True, foreign_key="job.uid", index=True)


class JobRun(SQLModel, table=True):
    """One launch of a job. The claim token is derived (see jobs/tokens.py) and so not stored; the session's hash is set once."""

    __tablename__: ClassVar[Any] = "job_run"
    job_uid: str = Field(primary_key=True, foreign_key="job.uid")
    run: int = Field(primary_key=True)
    submission_id: str = Field(unique=True)
    session_sha256: str = ""
    create_time: datetime = _time()
    claim_time: datetime | None = _time(nullable=True)
    report_time: datetime | None = _time(nullable=True)
    end_time: datetime | None = _time(nullable=True)
    end_reason: str = "UNSPECIFIED"
    error: dict[str, Any] = _json()
    workers: int = 0
    resumed_step: int = _big()
    cpus: float = 0.0
    gpus: float = 0.0
    failures: list[dict[str, Any]] = _json(list)
    # Where each rank stands that has not moved for long, by source (see jobs/hang.py).
    standings: dict[str, Any] = _json()


class ReportCursor(SQLModel, table=True):
    """Number of the last report applied, per run and source: a repeated one is ignored. And the tokens that it has trained."""

    __tablename__: ClassVar[Any] = "report_cursor"
    job_uid: str = Field(primary_key=True, foreign_key="job.uid")
    run: int = Field(primary_key=True)
    source: str = Field(primary_key=True)
    last: int = _big()
    trained_tokens: int = _big()


class JobEvent(SQLModel, table=True):
    """An append-only record of a job's life, numbered within its job and within its project."""

    __tablename__: ClassVar[Any] = "job_event"
    __table_args__ = (Index("ix_job_event_project", "project_id", "project_sequence", unique=True),)
    job_uid: str = Field(primary_key=True, foreign_key="job.uid")
    sequence: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    time: datetime = _time()
    type: int
    state: str
    end_reason: str = "UNSPECIFIED"
    run: int = 0
    message: str = Field(default="", sa_column=Column(Text, nullable=False))
    project_id: str
    project_sequence: int = _big()


class JobLog(SQLModel, table=True):
    """A line of a job's processes."""

    __tablename__: ClassVar[Any] = "job_log"
    job_uid: str = Field(primary_key=True, foreign_key="job.uid")
    sequence: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    time: datetime = _time()
    run: int
    source: str
    level: str
    message: str = Field(sa_column=Column(Text, nullable=False))


class Metric(SQLModel, table=True):
    """The figures of one step."""

    __table_args__ = (Index("ix_metric_job", "job_uid", "id"),)
    id: int | None = Field(default=None, primary_key=True)
    job_uid: str = Field(foreign_key="job.uid")
    run: int
    step: int = _big()
    trial: str = ""
    time: datetime = _time()
    figures: dict[str, float] = _json()


class Checkpoint(SQLModel, table=True):
    """A published checkpoint."""

    job_uid: str = Field(primary_key=True, foreign_key="job.uid")
    run: int = Field(primary_key=True)
    step: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    uri: str
    manifest_sha256: str
    size_bytes: int = _big()
    figures: dict[str, float] = _json()
    create_time: datetime = _time()
    # No longer offered to anybody; the row goes once its bytes have gone.
    delete_time: datetime | None = _time(nullable=True)


class Trial(SQLModel, table=True):
    """A trial of a sweep, as last reported."""

    job_uid: str = Field(primary_key=True, foreign_key="job.uid")
    trial_id: str = Field(primary_key=True)
    document: dict[str, Any] = _json()


class Dataset(SQLModel, table=True):
    """A data set's name and its latest version."""

    project_id: str = Field(primary_key=True, foreign_key="project.id")
    id: str = Field(primary_key=True)
    latest: int = 0
    create_time: datetime = _time()


class DatasetVersion(SQLModel, table=True):
    """An immutable set of rows; `document` is the contract's message."""

    __tablename__: ClassVar[Any] = "dataset_version"
    __table_args__ = (UniqueConstraint("project_id", "request_id"),)
    project_id: str = Field(primary_key=True, foreign_key="project.id")
    dataset_id: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    content_hash: str
    manifest_sha256: str = ""
    uri: str
    document: dict[str, Any] = _json()
    request_id: str | None = None
    request_sha256: str = ""
    create_time: datetime = _time()


class Model(SQLModel, table=True):
    """A model's name and its latest version."""

    project_id: str = Field(primary_key=True, foreign_key="project.id")
    id: str = Field(primary_key=True)
    latest: int = 0
    create_time: datetime = _time()


class ModelVersion(SQLModel, table=True):
    """An immutable artifact; `document` is the contract's message."""

    __tablename__: ClassVar[Any] = "model_version"
    __table_args__ = (UniqueConstraint("project_id", "request_id"),)
    project_id: str = Field(primary_key=True, foreign_key="project.id")
    model_id: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    content_hash: str
    uri: str
    job_uid: str = Field(default="", index=True)
    document: dict[str, Any] = _json()
    request_id: str | None = None
    request_sha256: str = ""
    create_time: datetime = _time()


class ModelAlias(SQLModel, table=True):
    """A name that points at one version of a model."""

    __tablename__: ClassVar[Any] = "model_alias"
    project_id: str = Field(primary_key=True, foreign_key="project.id")
    model_id: str = Field(primary_key=True)
    alias: str = Field(primary_key=True)
    version: int


class Endpoint(SQLModel, table=True):
    """Desired state of a deployment, and what was last observed of it."""

    project_id: str = Field(primary_key=True, foreign_key="project.id")
    id: str = Field(primary_key=True)
    desired: dict[str, Any] = _json()
    generation: int = 1
    version: int = _big(1)
    state: str
    error: str = ""
    ready_replicas: dict[str, int] = _json()
    cpus: float = 0.0
    gpus: float = 0.0
    create_time: datetime = _time()
    update_time: datetime = _time()
    # What the gateway leads to: as `desired`, and the one before until that is ready. Empty before anything was.
    serving: dict[str, Any] = _json()
    # The canary that is on its way, or how the last one ended (endpoints/progress.py).
    rollout: dict[str, Any] = _json()
    # The latest events, `time` and `message` each.
    events: list[dict[str, Any]] = _json(list)


class Secret(SQLModel, table=True):
    """A secret of a project, encrypted (see vault.py); `key_id` says under which key."""

    project_id: str = Field(primary_key=True, foreign_key="project.id")
    id: str = Field(primary_key=True)
    key_id: str
    ciphertext: str = Field(sa_column=Column(Text, nullable=False))
    create_time: datetime = _time()
    update_time: datetime = _time()


class Garbage(SQLModel, table=True):
    """A folder of storage that a deleted version had. The row goes once the folder has, which waits for all who still need it."""

    uri: str = Field(primary_key=True)
    create_time: datetime = _time()
    # Set while its files are being deleted: nobody may publish there meanwhile.
    start_time: datetime | None = _time(nullable=True)


class Hold(SQLModel, table=True):
    """Somebody publishes into a folder of storage (`bases`, `datasets`): nothing in it is collected before this is gone."""

    id: str = Field(primary_key=True)
    folder: str
    expire_time: datetime = _time()


class Schedule(SQLModel, table=True):
    """Creates a job at certain times. `job` is the contract's message as it was asked for: its names are looked up each time."""

    project_id: str = Field(primary_key=True, foreign_key="project.id")
    id: str = Field(primary_key=True)
    # Never used again, also where the id is.
    uid: str
    cron: str
    time_zone: str
    job: dict[str, Any] = _json()
    overlap: int
    catch_up_seconds: float
    paused: bool = False
    # Absent while paused.
    next_time: datetime | None = _time(nullable=True)
    # The last times, latest first: Firing (schedule.proto) as JSON.
    firings: list[dict[str, Any]] = _json(list)
    creator: str = ""
    version: int = _big(1)
    create_time: datetime = _time()
    update_time: datetime = _time()
