"""Every change of a job's row goes through here: a conditional UPDATE and its numbered event, in one transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

from sqlalchemy import CursorResult, bindparam, insert, update
from sqlmodel import Session, SQLModel, col, select

from coordinator.jobs.states import ACTIVE, SOURCES, TERMINAL, EndReason, State
from coordinator.jobs.usage import settle
from coordinator.store.tables import Job, JobDependency, JobEvent, JobRun, now
from luthier.v1 import job_pb2

# Built once: to build a statement takes longer than to run it.
JOBS, EVENTS, PROJECTS = (SQLModel.metadata.tables[name] for name in ("job", "job_event", "project"))
TAKE_NUMBERS = (
    update(PROJECTS)
    .where(PROJECTS.c.id == bindparam("project"))
    .values(event_sequence=PROJECTS.c.event_sequence + bindparam("many"))
    .returning(PROJECTS.c.event_sequence)
)
QUEUED = (
    JOBS.select()
    .with_only_columns(*(JOBS.c[name] for name in ("uid", "project_id", "sequence", "end_reason", "run", "queue_reason")))
    .where(JOBS.c.state == State.QUEUED.value, JOBS.c.uid.in_(bindparam("uids", expanding=True)))
)
TELL = (
    update(JOBS)
    .where(JOBS.c.uid == bindparam("row"))
    .values(
        sequence=JOBS.c.sequence + 1,
        version=JOBS.c.version + 1,
        update_time=bindparam("moment"),
        queue_reason=bindparam("reason"),
    )
)
INSERT_EVENTS = insert(EVENTS)

MAX_MESSAGE = 2000
"""Characters of an event's message that are kept."""


def add_event(
    session: Session, uid: str, type_: job_pb2.JobEventType.ValueType, message: str, *, run: int | None = None, **values: Any
) -> bool:
    """Number and append an event that changes no state; `values` are columns set along with it.

    The number is taken in the UPDATE of the job's own row, so numbers appear in order and without gaps. With `run`, nothing
    happens and False is returned unless that is still the job's run.
    """
    where = [col(Job.uid) == uid]
    if run is not None:
        where.append(col(Job.run) == run)
    return _advance(session, where, type_, message, values)


def move(
    session: Session,
    uid: str,
    to: State,
    message: str,
    *,
    run: int | None = None,
    sources: Iterable[State] | None = None,
    end_reason: EndReason = EndReason.UNSPECIFIED,
    next_run: int | None = None,
    run_end_reason: EndReason | None = None,
    run_error: dict[str, Any] | None = None,
    **values: Any,
) -> bool:
    """Move a job to another state, if it is in one that allows it (or in one of `sources`) and, where given, in this run.

    `next_run` begins a new run with the move. A move to a state in which no run is under way ends the job's run, for
    `run_end_reason` (the job's `end_reason` where absent) and with `run_error`. A job that ends lets those that follow it go on,
    or ends them too.

    Returns False and changes nothing where somebody was faster.
    """
    allowed = SOURCES[to] if sources is None else SOURCES[to] & frozenset(sources)
    where = [col(Job.uid) == uid, col(Job.state).in_([state.value for state in allowed])]
    if run is not None:
        where.append(col(Job.run) == run)
    values["state"] = to.value
    if next_run is not None:
        values["run"] = next_run
    if to in TERMINAL:
        values |= {"end_reason": end_reason.value, "end_time": now()}
    moved = _advance(session, where, job_pb2.JOB_EVENT_TYPE_STATE_CHANGED, message, values)
    if moved and to not in ACTIVE:
        _end_run(session, uid, run_end_reason or end_reason, run_error or {})
    if moved and to in TERMINAL:
        _release(session, uid, to)
    return moved


def _end_run(session: Session, uid: str, reason: EndReason, error: dict[str, Any]) -> None:
    job = session.get_one(Job, uid)
    job_run = session.get(JobRun, (uid, job.run))
    if job_run is not None and job_run.end_time is None:
        job_run.end_reason, job_run.error = reason.value, error
        session.add(job_run)
        session.flush()
        settle(session, job, job_run)


def _release(session: Session, uid: str, ended: State) -> None:
    """Let the jobs that follow one go on, or end them where it did not succeed."""
    followers = session.exec(select(JobDependency.job_uid).where(JobDependency.after_uid == uid)).all()
    for follower in followers:
        if ended is not State.SUCCEEDED:
            said = f"{session.get_one(Job, uid).job_id}, which it was to follow, ended {ended.value}"
            move(session, follower, State.CANCELLED, said, sources=[State.BLOCKED], end_reason=EndReason.DEPENDENCY)
        elif not waits_for(session, follower):
            move(session, follower, State.QUEUED, "all jobs that it follows have succeeded", sources=[State.BLOCKED])


def waits_for(session: Session, uid: str) -> list[Job]:
    """The jobs that a job follows and that have not succeeded yet, oldest first."""
    query = select(Job).join(JobDependency, col(Job.uid) == col(JobDependency.after_uid)).where(JobDependency.job_uid == uid)
    return list(session.exec(query.where(Job.state != State.SUCCEEDED.value).order_by(col(Job.create_time))).all())


def _advance(
    session: Session, where: list[Any], type_: job_pb2.JobEventType.ValueType, message: str, values: dict[str, Any]
) -> bool:
    moment = now()
    row = session.execute(
        update(Job)
        .where(*where)
        .values(sequence=Job.sequence + 1, version=Job.version + 1, update_time=moment, **values)
        .returning(col(Job.uid), col(Job.project_id), col(Job.sequence), col(Job.state), col(Job.end_reason), col(Job.run))
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        return False
    session.expire_all()
    session.add(
        JobEvent(
            job_uid=row.uid,
            sequence=row.sequence,
            time=moment,
            type=type_,
            state=row.state,
            end_reason=row.end_reason,
            run=row.run,
            message=message[:MAX_MESSAGE],
            project_id=row.project_id,
            project_sequence=take_numbers(session, row.project_id),
        )
    )
    session.flush()
    return True


def tell_reasons(session: Session, reasons: Mapping[str, str]) -> list[str]:
    """Record for each of some jobs, by uid, what it waits for now, with an event where that is news.

    Two statements for all of them, because a queue may be long. Returns the uids of those for whom it was news.
    """
    connection, moment = session.connection(), now()
    rows = [
        row
        for row in connection.execute(QUEUED, {"uids": list(reasons)})
        if row.queue_reason != reasons[row.uid]  # somebody was faster
    ]
    if not rows:
        return []
    counts = Counter(row.project_id for row in rows)
    numbers = {project: count(take_numbers(session, project, many) - many + 1) for project, many in counts.items()}
    connection.execute(TELL, [{"row": row.uid, "reason": reasons[row.uid], "moment": moment} for row in rows])
    events = [
        {
            "job_uid": row.uid,
            "sequence": row.sequence + 1,
            "time": moment,
            "type": job_pb2.JOB_EVENT_TYPE_WAITING,
            "state": State.QUEUED.value,
            "end_reason": row.end_reason,
            "run": row.run,
            "message": f"waits for {reasons[row.uid]}"[:MAX_MESSAGE],
            "project_id": row.project_id,
            "project_sequence": next(numbers[row.project_id]),
        }
        for row in rows
    ]
    connection.execute(INSERT_EVENTS, events)
    session.expire_all()
    return [row.uid for row in rows]


def take_numbers(session: Session, project_id: str, many: int = 1) -> int:
    """Take the next numbers for events of a project's jobs, and return the last of them.

    They appear in order: writing transactions run one at a time, and one that is rolled back gives its numbers back.
    """
    return int(session.connection().execute(TAKE_NUMBERS, {"project": project_id, "many": many}).scalar_one())


def mark_deleted(session: Session, uid: str) -> bool:
    """Let nobody see a job any more that has ended; its request id makes a new one then. False where that is so already."""
    result = session.execute(
        update(Job)
        .where(col(Job.uid) == uid, col(Job.state).in_([state.value for state in TERMINAL]), col(Job.delete_time).is_(None))
        .values(delete_time=now(), request_id=None, version=Job.version + 1)
        .execution_options(synchronize_session=False)
    )
    assert isinstance(result, CursorResult)
    return bool(result.rowcount)


def set_unnumbered(session: Session, uid: str, run: int, **values: Any) -> bool:
    """Set columns that tell no event, such as progress, if `run` is still the job's run."""
    result = session.execute(
        update(Job).where(col(Job.uid) == uid, col(Job.run) == run).values(**values).execution_options(synchronize_session=False)
    )
    assert isinstance(result, CursorResult)
    return bool(result.rowcount)


def compacted(session: Session, uid: str, **numbers: int) -> None:
    """Set up to which number a job's events or log lines are no longer kept. Not a change of the job: nobody is told."""
    session.execute(update(JOBS).where(JOBS.c.uid == uid).values(**numbers))


def raise_to(session: Session, project_id: str, **numbers: int) -> None:
    """Raise numbers of a project that never fall."""
    for name, number in numbers.items():
        column = PROJECTS.c[name]
        session.execute(update(PROJECTS).where(PROJECTS.c.id == project_id, column < number).values({name: number}))
