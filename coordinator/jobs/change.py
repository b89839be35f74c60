"""Changing a job that has not ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from common.errors import Aborted, FailedPrecondition, InvalidArgument, Violation
from coordinator import messages
from coordinator.jobs import records
from coordinator.jobs.states import TERMINAL, State
from coordinator.jobs.validate import own_terms
from coordinator.store.tables import Job
from luthier.v1 import job_pb2

CHANGEABLE = ("priority", "labels", "display_name", "time_limit", "retry", "budget")
"""Fields that UpdateJob takes."""


@dataclass(frozen=True)
class Change:
    """New values of some of a job's fields."""

    values: dict[str, Any]
    etag: str

    @classmethod
    def of(cls, request: job_pb2.UpdateJobRequest) -> Change:
        """Read a request. Raises InvalidArgument naming what cannot be changed, or changed so."""
        bad = [
            Violation("update_mask", f"{path!r} cannot be changed; {', '.join(CHANGEABLE)} can")
            for path in request.update_mask.paths
            if path not in CHANGEABLE
        ]
        if not request.update_mask.paths:
            bad.append(Violation("update_mask", f"missing: name the fields to change, of {', '.join(CHANGEABLE)}"))
        if bad:
            raise InvalidArgument.of(bad)
        own_terms(request.job)
        return cls({path: _column(request.job, path) for path in request.update_mask.paths}, request.etag)

    def apply(self, session: Session, uid: str) -> bool:
        """Make the change, with an event. Raises FailedPrecondition where the job has ended, Aborted for an old etag."""
        job = session.get_one(Job, uid)
        if State(job.state) in TERMINAL:
            raise FailedPrecondition(f"the job is in state {job.state}, so it cannot be changed", "WRONG_STATE")
        if self.etag and self.etag != f'"{job.version}"':
            raise Aborted("the job was changed since it was read; read it again", "ETAG_MISMATCH")
        columns = {"time_limit_seconds" if path == "time_limit" else path: value for path, value in self.values.items()}
        changed = {name: value for name, value in columns.items() if getattr(job, name) != value}
        if not changed:
            return False
        said = "changed: " + ", ".join(f"{path} {_words(value)}" for path, value in self.values.items())
        return records.add_event(session, uid, job_pb2.JOB_EVENT_TYPE_UPDATED, said, run=job.run, **changed)


def _column(job: job_pb2.Job, path: str) -> Any:
    if path == "labels":
        return dict(job.labels)
    if path == "time_limit":
        return job.time_limit.ToMilliseconds() / 1000 if job.HasField("time_limit") else None
    if path == "budget":
        return budget(job)
    return messages.document(job.retry) if path == "retry" else getattr(job, path)


def budget(job: job_pb2.Job) -> dict[str, float]:
    """A job's budget as the store keeps it: only what is bounded."""
    return {name: getattr(job.budget, name) for name in ("cpu_seconds", "gpu_seconds") if job.budget.HasField(name)}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={each}" for name, each in sorted(value.items())) or "none"
    return "none" if value is None else str(value)
