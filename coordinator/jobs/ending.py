"""What becomes of a job when a run of it has ended: it ends too, waits for another try, or is paused."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlmodel import Session, col, select

from coordinator.jobs import records
from coordinator.jobs.resources import shape_document, shape_of
from coordinator.jobs.retry import FAULTS, Retry, most_retries, next_try
from coordinator.jobs.states import EndReason, State
from coordinator.jobs.wishes import NO_FINISH, NO_PAUSE, can_pause
from coordinator.scheduling.model import Demand, Shape
from coordinator.store.tables import Checkpoint, Job, JobRun, now


@dataclass(frozen=True)
class Ended:
    """How a run ended: SUCCEEDED, FAILED, CANCELLED, or PAUSED where it stopped with a checkpoint because it was asked to."""

    state: State
    reason: EndReason
    message: str
    error: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None


def end_run(session: Session, uid: str, run: int, ended: Ended) -> bool:
    """Record the end of a run and what follows from it, all in one. False where the run ended already."""
    job = session.get_one(Job, uid)
    values: dict[str, Any] = {} if ended.result is None else {"result": ended.result}
    if job.cancel_time is None:
        given_up = ended.state is State.PAUSED or (ended.state is State.FAILED and ended.reason in FAULTS)
        if given_up and job.pause_time is not None:
            return _pause(session, job, run, ended, values)
        if ended.state is State.FAILED:
            spec = job.spec if job.kind == "finetune" else {}
            retry = next_try(ended.reason, job.attempt, job.retry, spec)
            if retry is not None:
                return _try_again(session, job, run, ended, retry, values)
    state = ended.state if ended.state is not State.PAUSED else State.CANCELLED
    return records.move(
        session, uid, state, ended.message, run=run, end_reason=ended.reason, run_error=ended.error, error=ended.error, **values
    )


def _pause(session: Session, job: Job, run: int, ended: Ended, values: dict[str, Any]) -> bool:
    preempted = job.pause_reason == EndReason.PREEMPTED.value
    point = latest_checkpoint(session, job)
    where = f"at step {point.step}" if point is not None else "before its first checkpoint, so it starts again"
    to, said = (State.QUEUED, "gave its place up") if preempted else (State.PAUSED, "paused")
    values |= NO_PAUSE | NO_FINISH | {"shape": _pinned(session, job, run)}
    reason = EndReason.PREEMPTED if preempted else EndReason.USER
    return records.move(
        session, job.uid, to, f"{said} {where}", run=run, run_end_reason=reason, run_error=ended.error, progress={}, **values
    )


def _try_again(session: Session, job: Job, run: int, ended: Ended, retry: Retry, values: dict[str, Any]) -> bool:
    attempt = job.attempt + 1
    said = f"run {run} failed ({ended.message}); retry {attempt} of {most_retries(job.retry)} in {retry.pause:g} s"
    if retry.hyperparameters:
        spec = dict(job.spec)
        spec["hyperparameters"] = spec.get("hyperparameters", {}) | retry.hyperparameters
        values["spec"] = spec
        said += f" with {retry.change}"
    values |= NO_FINISH | {
        "attempt": attempt,
        "not_before": now() + timedelta(seconds=retry.pause),
        "progress": {},
        "shape": _pinned(session, job, run),
    }
    return records.move(
        session, job.uid, State.QUEUED, said, run=run, run_end_reason=ended.reason, run_error=ended.error, **values
    )


def _pinned(session: Session, job: Job, run: int) -> dict[str, Any]:
    """The job's shape; once it has checkpoints, with the very number of workers whose ranks wrote them."""
    shape = shape_of(job.shape, Demand(job.cpus, job.gpus))
    workers = session.get_one(JobRun, (job.uid, run)).workers
    if shape.least < shape.most and workers and latest_checkpoint(session, job) is not None:
        shape = Shape(shape.driver, shape.worker, workers, workers)
    return shape_document(shape)


def latest_checkpoint(session: Session, job: Job) -> Checkpoint | None:
    """The checkpoint that the job's next run would go on from."""
    return next(iter(checkpoints(session, job, 1)), None)


def checkpoints(session: Session, job: Job, most: int) -> list[Checkpoint]:
    """Checkpoints of all runs that the job can go on from, the furthest first; of two at one step the later written.

    None for a sweep: those that it has are its trials', which start again with it.
    """
    if not can_pause(job):
        return []
    query = select(Checkpoint).where(Checkpoint.job_uid == job.uid, col(Checkpoint.delete_time).is_(None))
    return list(session.exec(query.order_by(col(Checkpoint.step).desc(), col(Checkpoint.run).desc()).limit(most)).all())
