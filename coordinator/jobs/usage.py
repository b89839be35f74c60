"""What runs spend: seconds times what they hold, kept in all and, for fair shares, with a half-life.

A run's spending is added to its job and its project once, in the transaction that ends the run. Until then it is computed from
its beginning whenever somebody asks, so that nothing is written while jobs run. So are the tokens that it trained: each of its
processes tells how many there were so far, which is kept beside the number of its last report until the run has ended.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import CursorResult, func, update
from sqlmodel import Session, col, select

from coordinator.jobs.states import ACTIVE
from coordinator.scheduling.model import Demand, Terms
from coordinator.scheduling.order import HALF_LIFE_SECONDS
from coordinator.store.tables import Endpoint, Job, JobRun, Project, ReportCursor, now


@dataclass(frozen=True)
class Standing:
    """What a project holds now, what its jobs have spent, and its jobs by state."""

    held: Demand = field(default_factory=Demand)
    spent: Demand = field(default_factory=Demand)
    jobs: Mapping[str, int] = field(default_factory=dict)
    trained_tokens: int = 0


def spent(begin: datetime, end: datetime, held: Demand) -> Demand:
    """CPU- and GPU-seconds of holding so much for so long; none where the clock was set back."""
    return _scaled(held, _seconds(begin, end))


def decayed(amount: Demand, since: datetime, until: datetime) -> Demand:
    """What is left at `until` of an amount that counted in full at `since`."""
    return _scaled(amount, 2.0 ** (-_seconds(since, until) / HALF_LIFE_SECONDS))


def decayed_spent(begin: datetime, end: datetime, held: Demand) -> Demand:
    """Like `spent`, each moment of it decayed to `end`: the integral of held x 2^(-(end - t) / half-life) over the run."""
    # expm1 keeps its digits for runs that are short beside the half-life.
    return _scaled(held, HALF_LIFE_SECONDS / math.log(2) * -math.expm1(-math.log(2) * _seconds(begin, end) / HALF_LIFE_SECONDS))


def held_by(job: Job, job_run: JobRun) -> Demand:
    """What a run holds. Runs that began before runs recorded it hold what their job asked for."""
    return Demand(job_run.cpus, job_run.gpus) if job_run.cpus or job_run.gpus else Demand(job.cpus, job.gpus)


def settle(session: Session, job: Job, job_run: JobRun, moment: datetime | None = None) -> bool:
    """End a run's row and add what the run spent to its job and its project, in the caller's transaction.

    Does nothing and returns False where the run has been settled already; `end_time` is what says so.
    """
    end = moment or now()
    ended = session.execute(
        update(JobRun)
        .where(col(JobRun.job_uid) == job_run.job_uid, col(JobRun.run) == job_run.run, col(JobRun.end_time).is_(None))
        .values(end_time=end)
        .execution_options(synchronize_session=False)
    )
    assert isinstance(ended, CursorResult)
    if not ended.rowcount:
        return False
    held = held_by(job, job_run)
    amount = spent(job_run.create_time, end, held)
    tokens = _tokens_of_run(session, job.uid, job_run.run)
    session.execute(
        update(Job)
        .where(col(Job.uid) == job.uid)
        .values(
            cpu_seconds=Job.cpu_seconds + amount.cpus,
            gpu_seconds=Job.gpu_seconds + amount.gpus,
            trained_tokens=Job.trained_tokens + tokens,
        )
        .execution_options(synchronize_session=False)
    )
    project = locked_project(session, job.project_id)
    assert project is not None  # a foreign key says so
    # Runs end in any order, and clocks of two coordinators differ: what counts is the later of the two moments.
    at = max(end, project.decay_time or end)
    before = _decayed_to(project, at)
    added = decayed(decayed_spent(job_run.create_time, end, held), end, at)
    project.cpu_seconds += amount.cpus
    project.gpu_seconds += amount.gpus
    project.trained_tokens += tokens
    project.decayed_cpu_seconds = before.cpus + added.cpus
    project.decayed_gpu_seconds = before.gpus + added.gpus
    project.decay_time = at
    session.add(project)
    session.flush()
    session.expire(job)
    session.expire(job_run)
    return True


def locked_project(session: Session, project_id: str) -> Project | None:
    """A project's row as it is now, for changing: nobody else changes it before this transaction ends."""
    # The weaker of PostgreSQL's two locks: inserting a job, which refers to the project, does not wait for it.
    query = select(Project).where(Project.id == project_id).with_for_update(key_share=True)
    return session.exec(query, execution_options={"populate_existing": True}).first()


def job_spent(job: Job, job_run: JobRun | None, moment: datetime) -> Demand:
    """What a job has spent: its ended runs, and its latest one so far if that has not ended."""
    total = Demand(job.cpu_seconds, job.gpu_seconds)
    if job_run is not None and job_run.end_time is None:
        total = total + spent(job_run.create_time, moment, held_by(job, job_run))
    return total


def tokens_of_job(session: Session, job: Job, job_run: JobRun | None) -> int:
    """Tokens that a job has trained: its ended runs, and its latest one so far if that has not ended."""
    under_way = job_run is not None and job_run.end_time is None
    return job.trained_tokens + (_tokens_of_run(session, job.uid, job.run) if under_way else 0)


def standings(session: Session, projects: Sequence[Project], moment: datetime) -> dict[str, Standing]:
    """How projects stand at a moment, by id."""
    ids = [project.id for project in projects]
    held: dict[str, Demand] = defaultdict(Demand)
    total = {project.id: Demand(project.cpu_seconds, project.gpu_seconds) for project in projects}
    tokens = {project.id: project.trained_tokens for project in projects}
    for project_id, under_way in _live_tokens(session, ids):
        tokens[project_id] += under_way
    for job, job_run in _live(session, ids):
        holds = held_by(job, job_run)
        held[job.project_id] = held[job.project_id] + holds
        total[job.project_id] = total[job.project_id] + spent(job_run.create_time, moment, holds)
    for endpoint in session.exec(select(Endpoint).where(col(Endpoint.project_id).in_(ids))).all():
        held[endpoint.project_id] = held[endpoint.project_id] + Demand(endpoint.cpus, endpoint.gpus)
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    there = (col(Job.project_id).in_(ids), col(Job.delete_time).is_(None))
    by_state = select(Job.project_id, Job.state, func.count()).where(*there)
    for project_id, state, count in session.exec(by_state.group_by(Job.project_id, Job.state)).all():
        counts[project_id][state] = count
    return {id_: Standing(held[id_], total[id_], counts[id_], tokens[id_]) for id_ in ids}


def terms(session: Session, moment: datetime) -> dict[str, Terms]:
    """What every project is entitled to at a moment, for the scheduler."""
    found = {}
    projects = session.exec(select(Project)).all()
    total = {project.id: Demand(project.cpu_seconds, project.gpu_seconds) for project in projects}
    weighed = {project.id: _decayed_to(project, moment) for project in projects}
    for job, job_run in _live(session):
        holds = held_by(job, job_run)
        total[job.project_id] = total[job.project_id] + spent(job_run.create_time, moment, holds)
        weighed[job.project_id] = weighed[job.project_id] + decayed_spent(job_run.create_time, moment, holds)
    for project in projects:
        found[project.id] = Terms(
            project=project.id,
            share=project.share,
            quota=Demand(project.quota.get("cpus", 0.0), project.quota.get("gpus", 0.0)),
            limit=limit_of(project),
            decayed=weighed[project.id],
            budget_left=budget_left(project, total[project.id]),
        )
    return found


def limit_of(project: Project) -> Demand | None:
    """Most that a project may hold at a time, infinite where it is not bounded; None where nothing is."""
    if not project.ceiling:
        return None
    return Demand(project.ceiling.get("cpus", math.inf), project.ceiling.get("gpus", math.inf))


def budget_left(project: Project, spent_in_all: Demand) -> Demand | None:
    """What a project may still spend, at least 0 and infinite where it is not bounded; None where nothing is."""
    if not project.budget:
        return None
    cpus = project.budget.get("cpu_seconds", math.inf) - spent_in_all.cpus
    gpus = project.budget.get("gpu_seconds", math.inf) - spent_in_all.gpus
    return Demand(max(cpus, 0.0), max(gpus, 0.0))


def _live(session: Session, projects: Collection[str] | None = None) -> Sequence[tuple[Job, JobRun]]:
    """The runs that hold resources now, with their jobs."""
    query = select(Job, JobRun).join(JobRun, _LATEST).where(*_UNDER_WAY)
    if projects is not None:
        query = query.where(col(Job.project_id).in_(projects))
    return session.exec(query).all()


_LATEST = (col(JobRun.job_uid) == col(Job.uid)) & (col(JobRun.run) == col(Job.run))
_UNDER_WAY = (col(Job.state).in_([state.value for state in ACTIVE]), col(JobRun.end_time).is_(None))


def _live_tokens(session: Session, projects: Collection[str]) -> Sequence[tuple[str, int]]:
    """What the runs under way have trained so far, by project."""
    cursor = ReportCursor
    query = select(Job.project_id, func.sum(cursor.trained_tokens)).join(JobRun, _LATEST)
    query = query.join(cursor, (col(cursor.job_uid) == col(JobRun.job_uid)) & (col(cursor.run) == col(JobRun.run)))
    found = session.exec(query.where(*_UNDER_WAY, col(Job.project_id).in_(projects)).group_by(Job.project_id)).all()
    return [(project_id, int(tokens)) for project_id, tokens in found]


def _tokens_of_run(session: Session, uid: str, run: int) -> int:
    query = select(func.sum(ReportCursor.trained_tokens)).where(ReportCursor.job_uid == uid, ReportCursor.run == run)
    return int(session.exec(query).one() or 0)


def _decayed_to(project: Project, moment: datetime) -> Demand:
    amount = Demand(project.decayed_cpu_seconds, project.decayed_gpu_seconds)
    return decayed(amount, project.decay_time, moment) if project.decay_time is not None else amount


def _seconds(begin: datetime, end: datetime) -> float:
    return max((end - begin).total_seconds(), 0.0)


def _scaled(amount: Demand, factor: float) -> Demand:
    return Demand(amount.cpus * factor, amount.gpus * factor)
