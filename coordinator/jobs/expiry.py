"""Which jobs have used up their time or what they may spend."""

from __future__ import annotations

from collections.abc import Callable

from sqlmodel import Session, col, select

from coordinator.jobs.situation import active, run_seconds
from coordinator.jobs.states import EndReason, State
from coordinator.jobs.usage import job_spent, terms
from coordinator.jobs.wishes import WAITING, wish_end, wish_finish
from coordinator.scheduling.model import Demand
from coordinator.store.tables import Job, JobRun, now

Wish = Callable[..., bool]
"""`wish_end` or `wish_finish`."""


def expired(session: Session) -> list[tuple[str, Wish, EndReason]]:
    """Jobs that should end, with the wish to record and why."""
    moment = now()
    running = [job for job in active(session) if job.cancel_time is None]
    lasted = run_seconds(session, [job.uid for job in running], moment)
    left = {name: each.budget_left for name, each in terms(session, moment).items()} if running else {}
    found: list[tuple[str, Wish, EndReason]] = []
    for job in running:
        if job.time_limit_seconds is not None and job.start_time is not None and lasted[job.uid] > job.time_limit_seconds:
            found.append((job.uid, wish_end, EndReason.TIME_LIMIT))
        elif job.finish_time is None and (_spent(left.get(job.project_id), job) or over_budget(session, job)):
            found.append((job.uid, wish_finish, EndReason.BUDGET))
    # What failed after its budget was spent is not started again.
    waiting = select(Job).where(col(Job.state).in_([state.value for state in WAITING]), col(Job.run) > 0)
    found += [(job.uid, wish_end, EndReason.BUDGET) for job in session.exec(waiting).all() if over_budget(session, job)]
    return found


def over_budget(session: Session, job: Job) -> bool:
    """Whether a job has spent all that it was given of something."""
    used = spent_by(session, job)
    amounts = {"cpu_seconds": used.cpus, "gpu_seconds": used.gpus}
    return any(amounts[name] >= most for name, most in job.budget.items())


def spent_by(session: Session, job: Job) -> Demand:
    """CPU- and GPU-seconds of a job's ended runs and of the one under way."""
    run = session.get(JobRun, (job.uid, job.run)) if State(job.state) not in WAITING else None
    return job_spent(job, run, now())


def _spent(left: Demand | None, job: Job) -> bool:
    """Whether the project has nothing left of something that the job holds."""
    return left is not None and bool((job.cpus and left.cpus <= 0) or (job.gpus and left.gpus <= 0))
