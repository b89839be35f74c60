"""Deleting what has ended or is registered: who refers to it is asked, and it is marked, in one transaction."""

from __future__ import annotations

from sqlalchemy import delete
from sqlmodel import Session, col, or_, select

from common.errors import Aborted, FailedPrecondition, InvalidArgument, Violation
from common.names import VersionRef
from coordinator import garbage, registry
from coordinator.jobs import records
from coordinator.jobs.states import TERMINAL, State
from coordinator.store.tables import Job, JobDependency, ModelAlias


def delete_job(session: Session, job: Job, etag: str = "") -> None:
    """Mark a job that has ended as deleted; nobody sees it from then on, and the collector removes what belongs to it.

    Raises FailedPrecondition where it has not ended or a waiting job follows it, Aborted for an old etag.
    """
    if State(job.state) not in TERMINAL:
        raise FailedPrecondition(f"the job is in state {job.state}, so it cannot be deleted; cancel it first", "WRONG_STATE")
    if etag and etag != f'"{job.version}"':
        raise Aborted("the job was changed since it was read; read it again", "ETAG_MISMATCH")
    follows = select(Job.job_id).join(JobDependency, col(Job.uid) == col(JobDependency.job_uid))
    waiting = session.exec(follows.where(JobDependency.after_uid == job.uid, Job.state == State.BLOCKED.value)).all()
    if waiting:
        why = f"{', '.join(sorted(waiting)[:5])} waits to follow the job, so it cannot be deleted yet"
        raise FailedPrecondition(why, "JOB_FOLLOWED")
    session.exec(delete(JobDependency).where(or_(col(JobDependency.after_uid) == job.uid, col(JobDependency.job_uid) == job.uid)))
    records.mark_deleted(session, job.uid)


def delete_dataset_version(session: Session, project: str, ref: VersionRef) -> None:
    """Delete a data set version. Raises NotFound, and FailedPrecondition naming the jobs that read it."""
    _check_number(ref)
    row = registry.find_dataset(session, project, ref)
    _check_unread(session, project, f"{row.dataset_id}@{row.version}")
    garbage.discard(session, row.uri)
    session.delete(row)


def delete_model_version(session: Session, project: str, ref: VersionRef) -> None:
    """Delete a model version and its aliases. Raises NotFound, and FailedPrecondition naming what reads or serves it."""
    _check_number(ref)
    row = registry.find_model(session, project, ref)
    _check_unread(session, project, f"{row.model_id}@{row.version}")
    alias = ModelAlias
    aliases = select(alias).where(alias.project_id == project, alias.model_id == row.model_id, alias.version == row.version)
    for each in session.exec(aliases).all():
        session.delete(each)
    garbage.discard(session, row.uri)
    session.delete(row)


def _check_number(ref: VersionRef) -> None:
    if not ref.version.isdecimal():
        why = f"{str(ref)!r} may mean another version soon; name the one to delete by its number"
        raise InvalidArgument.of([Violation("name", why)])


def _check_unread(session: Session, project: str, name: str) -> None:
    found = garbage.readers(session, project, name)
    if found:
        raise FailedPrecondition(f"{name} is in use by {', '.join(found)}, so it cannot be deleted yet", "IN_USE")
