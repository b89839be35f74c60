"""A time of a schedule comes: what is created, and what is written down of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session, col, select

from common.errors import LuthierError
from coordinator import messages
from coordinator.jobs import create, secrets
from coordinator.jobs.resolve import Resolved, resolve
from coordinator.jobs.resources import fill_in
from coordinator.jobs.states import TERMINAL, EndReason, State
from coordinator.jobs.validate import validate
from coordinator.jobs.wishes import wish_end
from coordinator.schedules.times import following, last_until
from coordinator.store.database import Store
from coordinator.store.tables import Job, Schedule
from coordinator.vault import Vault
from luthier.v1 import job_pb2, schedule_pb2

KEPT = 10
"""Firings of a schedule that are kept."""

CATCH_UP = timedelta(hours=1)
"""How late a job may be created where the schedule does not say."""


@dataclass(frozen=True)
class Draft:
    """A schedule's job as it is created now: with its defaults, and what its names stand for at the moment."""

    request: create.Request
    job: job_pb2.Job
    resolved: Resolved


async def draft(store: Store, vault: Vault, schedule: Schedule, key: str, cluster_has_gpus: bool) -> Draft:
    """Make the job of a schedule, which `key` makes the only one of its kind. Raises what CreateJob would."""
    job = messages.parse(schedule.job, job_pb2.Job())
    request_id = f"schedule/{schedule.uid}/{key}"
    asked = job_pb2.CreateJobRequest(job=job, request_id=request_id)
    request = create.request_of(schedule.project_id, f"schedule {schedule.id}", asked)
    validate(job)
    fill_in(job, cluster_has_gpus)
    token = await secrets.hub_token(store, vault, schedule.project_id, job)
    resolved = await resolve(store, schedule.project_id, job, paths_allowed=False, hub_token=token)
    return Draft(request, job, resolved)


def due(session: Session, now: datetime) -> list[Schedule]:
    """The schedules whose time has come, longest due first."""
    query = select(Schedule).where(col(Schedule.paused).is_(False), col(Schedule.next_time) <= now)
    return list(session.exec(query.order_by(col(Schedule.next_time))).all())


def time_of(schedule: Schedule, now: datetime) -> datetime | None:
    """The time for which a due schedule's job is created: the last that was missed, and none where all are too long ago."""
    assert schedule.next_time is not None
    begin = max(schedule.next_time - timedelta(seconds=1), now - timedelta(seconds=schedule.catch_up_seconds))
    return last_until(schedule.cron, schedule.time_zone, begin, now)


def fire(session: Session, schedule: Schedule, time: datetime, made: Draft, now: datetime) -> tuple[Job | None, list[str]]:
    """Create the job of a time and note it, in one transaction. Returns the job, and the uids of all jobs that changed.

    Nothing is done where somebody was faster, or the schedule was changed, paused or deleted meanwhile.
    """
    row = _unchanged(session, schedule)
    if row is None:
        return None, []
    last = _last_job(session, row)
    changed = []
    if last is not None and State(last.state) not in TERMINAL:
        if row.overlap == schedule_pb2.OVERLAP_SKIP:
            note(row, time, error=f"{last.job_id} of the time before has not ended")
            _go_on(session, row, now)
            return None, []
        if row.overlap == schedule_pb2.OVERLAP_REPLACE and wish_end(session, last.uid, EndReason.USER):
            changed.append(last.uid)
    job = _insert(session, row, made)
    note(row, time, job=messages.job_name(job))
    _go_on(session, row, now)
    return job, [*changed, job.uid]


def skip(session: Session, schedule: Schedule, why: str, now: datetime) -> None:
    """Note that a time comes to nothing, and go on to the next."""
    row = _unchanged(session, schedule)
    if row is not None:
        assert row.next_time is not None
        note(row, row.next_time, error=why)
        _go_on(session, row, now)


def run(session: Session, schedule: Schedule, made: Draft, now: datetime) -> Job:
    """Create a schedule's job besides its times. The same request makes it once. Raises NotFound, and what CreateJob would."""
    before = create.earlier(session, made.request)
    if before is not None:
        return before
    row = session.get_one(Schedule, (schedule.project_id, schedule.id))
    job = _insert(session, row, made)
    note(row, now, job=messages.job_name(job))
    row.version += 1
    session.add(row)
    return job


def note(row: Schedule, time: datetime, job: str = "", error: str = "") -> None:
    """Write down what became of a time."""
    firing = schedule_pb2.Firing(time=messages.stamp(time), job=job, error=error[:500])
    row.firings = [messages.document(firing), *row.firings][:KEPT]


def words(error: LuthierError) -> str:
    """Why no job was created."""
    return f"{error.grpc_code}: {error.message}"


def _insert(session: Session, row: Schedule, made: Draft) -> Job:
    job = create.insert(session, made.request, made.job, made.resolved)
    job.schedule = row.id
    session.add(job)
    session.flush()
    return job


def _unchanged(session: Session, schedule: Schedule) -> Schedule | None:
    row = session.get(Schedule, (schedule.project_id, schedule.id))
    same = row is not None and (row.uid, row.version) == (schedule.uid, schedule.version)
    return row if same else None


def _last_job(session: Session, row: Schedule) -> Job | None:
    names: list[Any] = [firing["job"] for firing in row.firings if firing.get("job")]
    if not names:
        return None
    job_id = names[0].rpartition("/")[2]
    return session.exec(select(Job).where(Job.project_id == row.project_id, Job.job_id == job_id)).first()


def _go_on(session: Session, row: Schedule, now: datetime) -> None:
    row.next_time = following(row.cron, row.time_zone, now)
    row.version += 1
    session.add(row)
