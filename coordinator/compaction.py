"""What is not kept for good: old events of jobs that ended, and log lines that are old or too many.

Numbers are never used again, so that whoever comes with one that lies before what is left can be told so. The last event of a job
stays with it. Each function does a bounded piece of the work in a transaction of its own and says whether there may be more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case, delete, func
from sqlmodel import Session, col, select

from common.settings import Settings
from coordinator.jobs import records
from coordinator.jobs.states import TERMINAL
from coordinator.store.tables import Job, JobEvent, JobLog, Project

ROWS = 5000
"""Rows that one transaction deletes at most, so that nobody who writes waits for long."""

JOBS = 200
"""Jobs that one transaction is about at most."""

FOR_GOOD = timedelta(days=365_000)


@dataclass(frozen=True)
class Retention:
    """How long things are kept after a job's end, and how many log lines of each job."""

    checkpoints: timedelta = timedelta(days=7)
    events: timedelta = timedelta(days=30)
    logs: timedelta = timedelta(days=90)
    log_lines: int = 200_000

    @classmethod
    def of(cls, settings: Settings) -> Retention:
        """As the settings say."""
        days = (settings.checkpoint_days, settings.event_days, settings.log_days)
        checkpoints, events, logs = (timedelta(days=each) if each < FOR_GOOD.days else FOR_GOOD for each in days)
        return cls(checkpoints, events, logs, settings.log_lines)


def with_old_events(session: Session, before: datetime) -> Sequence[str]:
    """Jobs, by uid, that ended before a moment and still have more events than their last."""
    query = select(Job.uid).where(_ended(before), col(Job.events_compacted) < Job.sequence - 1)
    return session.exec(query.limit(JOBS)).all()


def compact_events(session: Session, uids: Sequence[str]) -> None:
    """Remove the events of some jobs that have ended, but for the last of each; of all together as many as one go allows."""
    left = ROWS
    rows = select(Job.uid, Job.project_id, Job.sequence, Job.events_compacted).where(col(Job.uid).in_(uids))
    for uid, project, sequence, compacted in session.exec(rows).all():
        upto = min(sequence - 1, compacted + left)
        if upto <= compacted:
            continue
        gone = [col(JobEvent.job_uid) == uid, col(JobEvent.sequence) <= upto]
        highest = session.exec(select(func.max(JobEvent.project_sequence)).where(*gone)).one()
        session.execute(delete(JobEvent).where(*gone))
        records.compacted(session, uid, events_compacted=upto)
        if highest is not None:
            records.raise_to(session, project, events_compacted=highest)
        left -= upto - compacted
        if left <= 0:
            return


def note_deletion(session: Session, uid: str) -> None:
    """Let the numbers that a deleted job's events have in their project be missing from now on."""
    highest = select(JobEvent.project_id, func.max(JobEvent.project_sequence)).where(JobEvent.job_uid == uid)
    for project, number in session.exec(highest.group_by(JobEvent.project_id)).all():
        records.raise_to(session, project, events_deleted=number)


def with_old_lines(session: Session, before: datetime, lines: int) -> Sequence[tuple[str, int]]:
    """Jobs, by uid, with log lines that are not to be kept, and the number up to which."""
    upto: Any = case((_ended(before), Job.log_sequence), else_=Job.log_sequence - lines)
    query = select(Job.uid, upto).where(col(Job.delete_time).is_(None), upto > Job.logs_compacted)
    return session.exec(query.limit(JOBS)).all()


def compact_logs(session: Session, jobs: Sequence[tuple[str, int]]) -> None:
    """Remove the log lines of some jobs up to a number each; of all together as many as one go allows."""
    left = ROWS
    compacted = dict(session.exec(select(Job.uid, Job.logs_compacted).where(col(Job.uid).in_([uid for uid, _ in jobs]))).all())
    for uid, wanted in jobs:
        if uid not in compacted:
            continue
        upto = min(wanted, compacted[uid] + left)
        session.execute(delete(JobLog).where(col(JobLog.job_uid) == uid, col(JobLog.sequence) <= upto))
        records.compacted(session, uid, logs_compacted=upto)
        left -= upto - compacted[uid]
        if left <= 0:
            return


def holes(project: Project) -> int:
    """The number up to which events of a project may be missing."""
    return max(project.events_compacted, project.events_deleted)


def _ended(before: datetime) -> Any:
    states = [state.value for state in TERMINAL]
    return (col(Job.state).in_(states)) & (col(Job.end_time) < before) & col(Job.delete_time).is_(None)
