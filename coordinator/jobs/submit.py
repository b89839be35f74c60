"""Recording many new jobs at once: one INSERT of jobs and one of events for all that wait together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

from sqlalchemy import bindparam, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, SQLModel

from common.errors import AlreadyExists, LuthierError
from coordinator.jobs import create
from coordinator.jobs import secrets as job_secrets
from coordinator.jobs.admission import check_entitlement
from coordinator.jobs.inputs import missing
from coordinator.jobs.records import take_numbers
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import shape_of
from coordinator.scheduling.model import Demand
from coordinator.store.tables import Job, JobEvent
from luthier.v1 import job_pb2

JOBS, EVENTS, PROJECTS = (SQLModel.metadata.tables[name] for name in ("job", "job_event", "project"))
ONCE = [JOBS.c.project_id, JOBS.c.request_id]
INSERT_JOBS = {
    "sqlite": sqlite.insert(JOBS).on_conflict_do_nothing(index_elements=ONCE),
    "postgresql": postgresql.insert(JOBS).on_conflict_do_nothing(index_elements=ONCE),
}
INSERT_EVENTS = insert(EVENTS)
# Built once: to build a statement takes longer than to run it.
BOUNDS = select(PROJECTS.c.id, PROJECTS.c.ceiling, PROJECTS.c.budget).where(PROJECTS.c.id.in_(bindparam("ids", expanding=True)))
THERE = select(JOBS.c.uid).where(JOBS.c.uid.in_(bindparam("uids", expanding=True)))


@dataclass(frozen=True)
class Submission:
    """A job to be recorded: who asked for it, and the columns of its row that are not NULL, or that other jobs may have."""

    request: create.Request
    row: dict[str, Any]

    @classmethod
    def of(cls, request: create.Request, job: job_pb2.Job, resolved: Resolved) -> Submission:
        """Build the row outside of the transaction, so that nobody else waits for that."""
        return cls(request, _defaults(Job) | create.columns(request, job, resolved))


def record(session: Session, submissions: list[Submission]) -> Sequence[Job | LuthierError]:
    """Record jobs that follow no others, and their first events, as `create.insert` does for one. Each gets its row, or why not.

    The constraint on request ids decides what is new, so that nothing has to be read about jobs where everything is.
    """
    refused = _refused(session, submissions)
    entitled = [submission for submission in submissions if submission.row["uid"] not in refused]
    rows = {each.row["uid"]: row for each, row in zip(entitled, _insert(session, entitled), strict=True)}
    return [rows.get(each.row["uid"]) or _earlier(session, each) or refused[each.row["uid"]] for each in submissions]


def _refused(session: Session, submissions: list[Submission]) -> dict[str, LuthierError]:
    """Why jobs are not taken, by uid: what they read was deleted, or their project is bounded and not entitled to them."""
    ids = {submission.request.project for submission in submissions}
    projects = session.connection().execute(BOUNDS, {"ids": list(ids)})
    bounded = {project.id for project in projects if project.ceiling or project.budget}
    gone = missing(session, [(each.request.project, each.row["inputs"]["artifacts"]) for each in submissions])
    refused = {each.row["uid"]: error for each, error in zip(submissions, gone, strict=True) if error is not None}
    for submission in submissions:
        secrets = submission.row["secrets"]
        wanted = job_secrets.missing(session, submission.request.project, secrets) if secrets else None
        if wanted is not None:
            refused[submission.row["uid"]] = wanted
        if submission.request.project in bounded:
            form = shape_of(submission.row["shape"], Demand())
            try:
                check_entitlement(session, submission.request.project, form.total(form.least))
            except LuthierError as error:
                refused[submission.row["uid"]] = error
    return refused


def _insert(session: Session, submissions: list[Submission]) -> Sequence[Job | LuthierError]:
    if not submissions:
        return []
    connection = session.connection()
    inserted = connection.execute(INSERT_JOBS[connection.dialect.name], [submission.row for submission in submissions])
    fresh = {submission.row["uid"] for submission in submissions}
    if inserted.rowcount != len(submissions):
        fresh = set(connection.execute(THERE, {"uids": list(fresh)}).scalars())
    if fresh:
        new = [submission for submission in submissions if submission.row["uid"] in fresh]
        counts = Counter(submission.request.project for submission in new)
        numbers = {name: count(take_numbers(session, name, many) - many + 1) for name, many in counts.items()}
        connection.execute(INSERT_EVENTS, [_first_event(each, next(numbers[each.request.project])) for each in new])
    return [_row(each) if each.row["uid"] in fresh else _made_before(session, each) for each in submissions]


def _made_before(session: Session, submission: Submission) -> Job | LuthierError:
    row = _earlier(session, submission)
    assert row is not None
    return row


def _earlier(session: Session, submission: Submission) -> Job | AlreadyExists | None:
    try:
        return create.earlier(session, submission.request)
    except AlreadyExists as error:
        return error


def _row(submission: Submission) -> Job:
    """What reads like the row. Making one of SQLModel's own takes longer than all else about a job."""
    return cast("Job", SimpleNamespace(**ABSENT | submission.row))


def _first_event(submission: Submission, number: int) -> dict[str, Any]:
    row, request = submission.row, submission.request
    return _defaults(JobEvent) | create.created(row["uid"], row["kind"], row["state"], row["create_time"], request, number)


def _defaults(table: type[Job] | type[JobEvent]) -> dict[str, Any]:
    """Every column that has a default with that, unless it is NULL; an INSERT past SQLModel knows none of them."""
    plain, made = _DEFAULTS[table]
    return plain | {name: make() for name, make in made.items()}


def _defaults_of(table: type[Job] | type[JobEvent]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defaults that are values, and those that are made afresh for each row."""
    fields = {name: field for name, field in table.model_fields.items() if not field.is_required()}
    plain = {name: field.default for name, field in fields.items() if field.default_factory is None and field.default is not None}
    return plain, {name: field.default_factory for name, field in fields.items() if field.default_factory is not None}


_DEFAULTS = {Job: _defaults_of(Job), JobEvent: _defaults_of(JobEvent)}

ABSENT = dict.fromkeys(name for name in Job.model_fields if name not in _DEFAULTS[Job][0] and name not in _DEFAULTS[Job][1])
"""Columns that are NULL unless somebody sets them. To bind their NULLs for each job would be a third of the work."""
