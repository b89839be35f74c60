"""Looking jobs up as their callers see them."""

from __future__ import annotations

import re

from sqlmodel import Session, col, select

from common.errors import InvalidArgument, NotFound, Violation
from coordinator import messages
from coordinator.jobs import records
from coordinator.jobs.expiry import spent_by
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.states import State
from coordinator.jobs.usage import tokens_of_job
from coordinator.services.principal import Principal
from coordinator.store import tables
from luthier.v1 import job_pb2


def whole_job(session: Session, row: tables.Job) -> job_pb2.Job:
    """A job with its trials, its runs, and the jobs it follows."""
    trials = session.exec(select(tables.Trial).where(tables.Trial.job_uid == row.uid)).all()
    runs = session.exec(select(tables.JobRun).where(tables.JobRun.job_uid == row.uid).order_by(col(tables.JobRun.run))).all()
    followed = (
        select(tables.Job)
        .join(tables.JobDependency, col(tables.Job.uid) == col(tables.JobDependency.after_uid))
        .where(tables.JobDependency.job_uid == row.uid)
        .order_by(col(tables.Job.create_time))
    )
    after = [messages.job_name(other) for other in session.exec(followed).all()]
    message = messages.job(row, trials, runs, after)
    spent = spent_by(session, row)
    tokens = tokens_of_job(session, row, next((run for run in runs if run.run == row.run), None))
    message.usage.CopyFrom(job_pb2.Usage(cpu_seconds=spent.cpus, gpu_seconds=spent.gpus, trained_tokens=tokens))
    say_what_blocks(session, row, message)
    return message


def say_what_blocks(session: Session, row: tables.Job, message: job_pb2.Job) -> None:
    """Name the jobs that a blocked one follows."""
    if row.state == State.BLOCKED:
        waiting = records.waits_for(session, row.uid)
        message.queue.waiting_for = "jobs to succeed: " + ", ".join(f"{other.job_id} ({other.state})" for other in waiting)


def with_queue(reconciler: Reconciler, job: job_pb2.Job) -> job_pb2.Job:
    """Say why a queued job waits, by the scheduler's last round."""
    if job.state == job_pb2.JOB_STATE_QUEUED:
        decision = reconciler.queue.decisions.get(job.uid)
        if job.pause_requested:
            job.queue.waiting_for = "somebody to resume it"
        elif decision is None or decision.start:
            job.queue.waiting_for = "the scheduler's next round"
        else:
            job.queue.waiting_for, job.queue.position = decision.reason, decision.position
            if decision.estimated_start is not None:
                job.queue.estimated_start.FromMilliseconds(int(decision.estimated_start * 1000))
    return job


def find_job(session: Session, who: Principal, name: str, field: str = "name") -> tables.Job:
    """The job of that name in the caller's project; NotFound otherwise."""
    (job_id,) = who.own(name, "jobs", field=field)
    query = select(tables.Job).where(tables.Job.project_id == who.project, tables.Job.job_id == job_id)
    row = session.exec(query.where(col(tables.Job.delete_time).is_(None))).first()
    if row is None:
        raise NotFound(f"there is no job {job_id!r}; `luthier job list` shows those there are", "JOB_NOT_FOUND")
    return row


def parse_filter(text: str) -> dict[str, str]:
    """Read `state=RUNNING AND label.team=search`; InvalidArgument names the term that cannot be read."""
    wanted = {}
    for term in re.split(r"\s+AND\s+|\s+", text.strip()) if text.strip() else []:
        name, equals, value = term.partition("=")
        value = value.strip('"')
        if name == "state":
            value = value.upper().removeprefix("JOB_STATE_")
        good = name in ("state", "kind", "display_name", "creator") or re.fullmatch(r"label\.[\w./-]{1,63}", name)
        if not (equals and good) or (name == "state" and value not in State.__members__):
            why = (
                f"cannot read {term[:80]!r}; write state=RUNNING, kind=sweep, display_name=x or label.team=search, joined by AND"
            )
            raise InvalidArgument.of([Violation("filter", why)])
        wanted[name] = value
    return wanted
