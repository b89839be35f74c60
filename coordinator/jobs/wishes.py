"""Wishes: what users and the scheduler want of a job. A wish is a column; what comes of it is observed later."""

from __future__ import annotations

from typing import Any

from sqlmodel import Session

from common.errors import FailedPrecondition
from coordinator.jobs import records
from coordinator.jobs.states import ACTIVE, TERMINAL, EndReason, State
from coordinator.store.tables import Job, now
from luthier.v1 import job_pb2

WISH = job_pb2.JOB_EVENT_TYPE_WISH
NO_PAUSE: dict[str, Any] = {"pause_time": None, "pause_reason": EndReason.UNSPECIFIED.value}
"""Columns of a job that nobody wishes to pause."""

NO_FINISH: dict[str, Any] = {"finish_time": None, "finish_reason": EndReason.UNSPECIFIED.value}
"""Columns of a job that nobody wishes to finish early. The wish ends with the run; the next one is asked again."""

WAITING = (State.BLOCKED, State.QUEUED)
"""States in which a job holds nothing and has no run."""

_SAID = {
    EndReason.TIME_LIMIT: "time limit reached",
    EndReason.BUDGET: "budget spent",
    EndReason.DEPENDENCY: "a job that it was to follow did not succeed",
}


def wish_end(session: Session, uid: str, reason: EndReason) -> bool:
    """Record that a job should end; one that holds nothing ends at once. False where there is nothing to end."""
    said = _SAID.get(reason, "cancelled by a user")
    wish: dict[str, Any] = {"cancel_time": now(), "cancel_reason": reason.value}
    idle = [*WAITING, State.PAUSED]
    if records.move(session, uid, State.CANCELLED, said, sources=idle, end_reason=reason, **wish):
        return True
    job = session.get_one(Job, uid)
    if State(job.state) not in ACTIVE or job.cancel_time is not None:
        return False
    return records.add_event(session, uid, job_pb2.JOB_EVENT_TYPE_CANCEL_REQUESTED, said, run=job.run, **wish)


def wish_finish(session: Session, uid: str, reason: EndReason) -> bool:
    """Record that a fine-tune should train no further and keep what it has learned. False where there is nothing to finish."""
    job = session.get_one(Job, uid)
    if State(job.state) not in ACTIVE or job.finish_time is not None or job.cancel_time is not None:
        return False
    if not can_pause(job):
        return wish_end(session, uid, reason)
    said = f"{_SAID.get(reason, 'asked to finish')}: what is learned by now is the result"
    return records.add_event(session, uid, WISH, said, run=job.run, finish_time=now(), finish_reason=reason.value)


def can_pause(job: Job) -> bool:
    """Whether a run of the job can stop with a checkpoint and another go on from there."""
    return job.kind == "finetune"


def wish_pause(session: Session, uid: str, reason: EndReason, said: str = "pause asked for by a user") -> bool:
    """Record that a job should save and give its place up, or stay where it is in the queue. False where it is wished already.

    Raises FailedPrecondition for a job that has ended, and for a running one of a kind that cannot go on where it stopped.
    """
    job = session.get_one(Job, uid)
    state = State(job.state)
    wish: dict[str, Any] = {"pause_time": now(), "pause_reason": reason.value}
    if state in TERMINAL or job.cancel_time is not None:
        raise FailedPrecondition(f"the job is {_ending(job)}, so it cannot be paused", "WRONG_STATE")
    if job.pause_time is not None and (reason is EndReason.PREEMPTED or job.pause_reason == EndReason.USER.value):
        return False
    if state is State.PAUSED:
        return False
    if state in ACTIVE and not can_pause(job):
        raise FailedPrecondition(
            f"a running job of kind {job.kind} cannot go on where it stopped; let it end, or cancel it", "NOT_PAUSABLE"
        )
    if state is State.RUNNING:
        return records.move(session, uid, State.PAUSING, said, run=job.run, **wish)
    return records.add_event(session, uid, WISH, said, run=job.run, **wish)


def wish_resume(session: Session, uid: str) -> bool:
    """Queue a paused job again, or take back a pause that has not happened yet. False where nothing was paused.

    Raises FailedPrecondition for a job that has ended.
    """
    job = session.get_one(Job, uid)
    state = State(job.state)
    if state in TERMINAL or job.cancel_time is not None:
        raise FailedPrecondition(f"the job is {_ending(job)}, so it cannot be resumed", "WRONG_STATE")
    if state is State.PAUSED:
        return records.move(session, uid, State.QUEUED, "resumed by a user", sources=[State.PAUSED], **NO_PAUSE)
    if job.pause_time is None:
        return False
    if state is State.PAUSING:
        # Its agent has been told. It comes back as soon as it has saved.
        back = {"pause_reason": EndReason.PREEMPTED.value}
        return records.add_event(session, uid, WISH, "resumed by a user: it goes on once it has saved", run=job.run, **back)
    return records.add_event(session, uid, WISH, "resumed by a user", run=job.run, **NO_PAUSE)


def _ending(job: Job) -> str:
    return f"in state {job.state}" if State(job.state) in TERMINAL else "being cancelled"
