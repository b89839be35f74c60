"""Which jobs have used up their time or what they may spend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlmodel import Session, col, select

from coordinator.jobs.situation import active, run_seconds
from coordinator.jobs.states import EndReason, State
from coordinator.jobs.wishes import WAITING, wish_end, wish_finish
from coordinator.store.tables import Job, JobRun, now

Wish = Callable[..., bool]
"""`wish_end` or `wish_finish`."""


def expired(session: Session) -> list[tuple[str, Wish, EndReason]]:
    """Jobs that should end, with the wish to record and why."""
    running = [job for job in active(session) if job.cancel_time is None]
    spent = run_seconds(session, [job.uid for job in running], now())
    found: list[tuple[str, Wish, EndReason]] = []
    for job in running:
        if job.time_limit_seconds is not None and job.start_time is not None and spent[job.uid] > job.time_limit_seconds:
            found.append((job.uid, wish_end, EndReason.TIME_LIMIT))
        elif job.finish_time is None and job.budget and _over_budget(session, job):
            found.append((job.uid, wish_finish, EndReason.BUDGET))
    # What failed after its budget was spent is not started again.
    waiting = select(Job).where(col(Job.state).in_([state.value for state in WAITING]), col(Job.run) > 0)
    found += [
        (job.uid, wish_end, EndReason.BUDGET) for job in session.exec(waiting).all() if job.budget and _over_budget(session, job)
    ]
    return found


def _over_budget(session: Session, job: Job) -> bool:
    used = used_by(session, job)
    return any(used[name] >= most for name, most in job.budget.items())


def used_by(session: Session, job: Job) -> dict[str, float]:
    """CPU- and GPU-seconds that a job has used: its ended runs and the one under way."""
    used: dict[str, Any] = {"cpu_seconds": job.cpu_seconds, "gpu_seconds": job.gpu_seconds}
    run = session.get(JobRun, (job.uid, job.run))
    if run is not None and run.end_time is None and State(job.state) not in WAITING:
        seconds = max(0.0, (now() - run.create_time).total_seconds())
        used["cpu_seconds"] += seconds * run.cpus
        used["gpu_seconds"] += seconds * run.gpus
    return used
