"""Reads what the scheduler decides about out of the records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from google.protobuf.json_format import ParseDict
from sqlalchemy import and_, bindparam, func
from sqlmodel import Session, col, select

from coordinator.cluster.serve_config import GATEWAY_CPUS
from coordinator.jobs.resources import shape_of
from coordinator.jobs.states import ACTIVE, State
from coordinator.jobs.usage import terms
from coordinator.jobs.wishes import can_pause
from coordinator.scheduling.model import Demand, Holding, Node, Shape, Situation, Waiting
from coordinator.store import tables
from coordinator.store.tables import Job, JobRun
from luthier.v1 import job_pb2

# Columns, not rows: a queue may be long, and objects of the session cost ten times as much.
IN_QUEUE: Any = and_(col(Job.state) == State.QUEUED.value, col(Job.pause_time).is_(None))
QUEUED_VERSIONS = select(Job.uid, Job.version).where(IN_QUEUE)
QUEUED = select(
    *(col(each) for each in (Job.uid, Job.version, Job.project_id, Job.priority, Job.create_time, Job.shape, Job.cpus, Job.gpus)),
    *(col(each) for each in (Job.time_limit_seconds, Job.not_before, Job.queue_reason)),
).where(IN_QUEUE, col(Job.uid).in_(bindparam("uids", expanding=True)))

FEW = 500
"""Rows that are looked up by name in one statement."""

ENDPOINT_PRIORITY = 1000
"""Endpoints stand above every job: their replicas are taken from nobody by the scheduler."""


class Records:
    """Reads situations, and remembers of the queue what has not changed since: a row's version says so."""

    def __init__(self) -> None:
        self._queue: dict[str, tuple[int, Waiting]] = {}
        self.told: dict[str, str] = {}
        """What each queued job was last told that it waits for, as of the last reading."""

    def read(self, session: Session, nodes: Sequence[Node] | None, now: datetime) -> Situation:
        """The queue, what is held, and each project's terms, as they are recorded."""
        self._read_queue(session)
        return Situation(
            now=now.timestamp(),
            queue=[waiting for _, waiting in self._queue.values()],
            holding=[*_runs(session, now), *_endpoints(session)],
            nodes=nodes,
            terms=terms(session, now),
        )

    def _read_queue(self, session: Session) -> None:
        present = {row.uid: row.version for row in session.execute(QUEUED_VERSIONS)}
        queue = {uid: known for uid, known in self._queue.items() if present.get(uid) == known[0]}
        self.told = {uid: self.told[uid] for uid in queue}
        changed = [uid for uid in present if uid not in queue]
        for begin in range(0, len(changed), FEW):
            for row in session.execute(QUEUED, {"uids": changed[begin : begin + FEW]}):
                queue[row.uid] = row.version, _waiting(row)
                self.told[row.uid] = row.queue_reason
        self._queue = queue


def active(session: Session) -> Sequence[Job]:
    """The jobs with a run under way."""
    return session.exec(select(Job).where(col(Job.state).in_([state.value for state in ACTIVE]))).all()


def run_seconds(session: Session, uids: Sequence[str], now: datetime) -> dict[str, float]:
    """How long the runs of each job lasted together, the present one included."""
    totals: dict[str, float] = dict.fromkeys(uids, 0.0)
    for uid, begun, ended in session.exec(
        select(JobRun.job_uid, JobRun.create_time, JobRun.end_time).where(col(JobRun.job_uid).in_(uids))
    ).all():
        totals[uid] += max(0.0, ((ended or now) - begun).total_seconds())
    return totals


def _waiting(row: Any) -> Waiting:
    return Waiting(
        uid=row.uid,
        project=row.project_id,
        priority=row.priority,
        since=row.create_time.timestamp(),
        shape=shape_of(row.shape, Demand(row.cpus, row.gpus)),
        expected_seconds=row.time_limit_seconds,
        not_before=row.not_before.timestamp() if row.not_before else 0.0,
    )


def _runs(session: Session, now: datetime) -> list[Holding]:
    jobs = active(session)
    uids = [job.uid for job in jobs]
    open_runs = select(JobRun).where(col(JobRun.job_uid).in_(uids), col(JobRun.end_time).is_(None))
    runs = {(run.job_uid, run.run): run for run in session.exec(open_runs).all()}
    spent = run_seconds(session, uids, now)
    saved = _last_saved(session, uids)
    found = []
    for job in jobs:
        run = runs.get((job.uid, job.run))
        started = run.create_time if run is not None else job.update_time
        unsaved = (now - max(saved.get(job.uid, started), started)).total_seconds()
        found.append(
            Holding(
                uid=job.uid,
                project=job.project_id,
                priority=job.priority,
                shape=shape_of(job.shape if run is not None else {}, Demand(job.cpus, job.gpus)),
                workers=run.workers if run is not None else 0,
                started=started.timestamp(),
                since=job.create_time.timestamp(),
                expected_end=_expected_end(job, spent[job.uid], now),
                preemptible=can_pause(job) and job.state == State.RUNNING.value,
                unsaved_seconds=max(0.0, unsaved),
                stopping=job.state == State.PAUSING.value or job.cancel_time is not None,
            )
        )
    return found


def _expected_end(job: Job, spent: float, now: datetime) -> float | None:
    """By the run's own estimate where it gives one, else by the time limit."""
    limit = None if job.time_limit_seconds is None else now.timestamp() + max(0.0, job.time_limit_seconds - spent)
    progress = ParseDict(job.progress, job_pb2.Progress(), ignore_unknown_fields=True)
    if not progress.HasField("remaining"):
        return limit
    estimate = now.timestamp() + progress.remaining.ToMilliseconds() / 1000
    return estimate if limit is None else min(limit, estimate)


def _last_saved(session: Session, uids: Sequence[str]) -> dict[str, datetime]:
    point = tables.Checkpoint
    query = select(point.job_uid, func.max(point.create_time)).where(col(point.job_uid).in_(uids)).group_by(point.job_uid)
    return dict(session.exec(query).all())


def _endpoints(session: Session) -> list[Holding]:
    endpoints = session.exec(select(tables.Endpoint)).all()
    gateway = Holding("the gateway", "", ENDPOINT_PRIORITY, Shape(Demand(GATEWAY_CPUS)), 0, 0.0, lasting=True)
    return [gateway] * bool(endpoints) + [
        Holding(
            uid=f"endpoint {endpoint.project_id}/{endpoint.id}",
            project=endpoint.project_id,
            priority=ENDPOINT_PRIORITY,
            shape=Shape(Demand(endpoint.cpus, endpoint.gpus)),
            workers=0,
            started=endpoint.create_time.timestamp(),
            lasting=True,
        )
        for endpoint in endpoints
    ]
