"""What runs spend is counted once, decays by half in a day, and is seen while they still run."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlmodel import Session

from coordinator.jobs import records, usage
from coordinator.jobs.states import State
from coordinator.scheduling.model import Demand
from coordinator.store import tables
from coordinator.store.database import Store

NewJob = Callable[..., tables.Job]
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)


def start(store: Store, job: tables.Job, begin: datetime, held: Demand = Demand(2.0, 1.0), run: int = 1) -> None:
    """Bring a job to RUNNING in a run that began at a moment."""

    def work(session: Session) -> None:
        assert records.move(session, job.uid, State.STARTING, "go", next_run=run)
        assert records.move(session, job.uid, State.RUNNING, "claimed")
        row = tables.JobRun(
            job_uid=job.uid, run=run, submission_id=f"{job.uid}-{run}", create_time=begin, cpus=held.cpus, gpus=held.gpus
        )
        session.add(row)

    store.write_now(work)


def settle(store: Store, job: tables.Job, moment: datetime, run: int = 1) -> bool:
    def work(session: Session) -> bool:
        job_run = session.get_one(tables.JobRun, (job.uid, run))
        return usage.settle(session, session.get_one(tables.Job, job.uid), job_run, moment)

    return store.write_now(work)


def project_of(store: Store, project_id: str = "default") -> tables.Project:
    return store.read_now(lambda session: session.get_one(tables.Project, project_id))


def test_spent_is_time_times_what_was_held() -> None:
    assert usage.spent(BEGIN, BEGIN + HOUR, Demand(2.0, 0.5)) == Demand(7200.0, 1800.0)
    assert usage.spent(BEGIN, BEGIN - HOUR, Demand(2.0)) == Demand()


def test_use_counts_half_after_a_day() -> None:
    assert usage.decayed(Demand(100.0, 8.0), BEGIN, BEGIN + DAY) == Demand(50.0, 4.0)
    assert usage.decayed(Demand(100.0, 8.0), BEGIN, BEGIN) == Demand(100.0, 8.0)


def test_a_decayed_run_is_the_sum_of_its_decayed_moments() -> None:
    steps = 100_000
    length = 3 * 86_400.0
    moments = ((number + 0.5) * length / steps for number in range(steps))
    integral = sum(2.0 ** (-(length - moment) / usage.HALF_LIFE_SECONDS) for moment in moments) * length / steps
    assert usage.decayed_spent(BEGIN, BEGIN + 3 * DAY, Demand(3.0)).cpus == pytest.approx(3 * integral, rel=1e-8)


def test_a_short_run_counts_in_full_and_an_endless_one_has_a_limit() -> None:
    assert usage.decayed_spent(BEGIN, BEGIN + timedelta(microseconds=1), Demand(1.0)).cpus == pytest.approx(1e-6, rel=1e-9)
    forever = usage.decayed_spent(BEGIN, BEGIN + 1000 * DAY, Demand(1.0)).cpus
    assert forever == pytest.approx(usage.HALF_LIFE_SECONDS / math.log(2))


def test_a_run_cut_in_two_weighs_as_much_as_one() -> None:
    middle, end = BEGIN + 7 * HOUR, BEGIN + 31 * HOUR
    first = usage.decayed(usage.decayed_spent(BEGIN, middle, Demand(1.0)), middle, end)
    second = usage.decayed_spent(middle, end, Demand(1.0))
    assert (first + second).cpus == pytest.approx(usage.decayed_spent(BEGIN, end, Demand(1.0)).cpus)


def test_a_run_is_settled_once(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job, BEGIN)
    assert settle(store, job, BEGIN + HOUR)
    assert not settle(store, job, BEGIN + 2 * HOUR)
    row = store.read_now(lambda session: session.get_one(tables.Job, job.uid))
    run = store.read_now(lambda session: session.get_one(tables.JobRun, (job.uid, 1)))
    project = project_of(store)
    assert run.end_time == BEGIN + HOUR
    assert (row.cpu_seconds, row.gpu_seconds) == (7200.0, 3600.0)
    assert (project.cpu_seconds, project.gpu_seconds) == (7200.0, 3600.0)


def test_a_job_that_ends_settles_its_run(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job, tables.now() - HOUR)
    assert store.write_now(lambda session: records.move(session, job.uid, State.FAILED, "no", run=1))
    assert not store.write_now(lambda session: records.move(session, job.uid, State.CANCELLED, "again", run=1))
    assert project_of(store).cpu_seconds == pytest.approx(7200, abs=20)
    assert store.read_now(lambda session: session.get_one(tables.JobRun, (job.uid, 1))).end_time is not None


def test_a_job_that_ends_between_runs_spends_nothing_more(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job, BEGIN)

    def retried(session: Session) -> None:
        usage.settle(session, session.get_one(tables.Job, job.uid), session.get_one(tables.JobRun, (job.uid, 1)), BEGIN + HOUR)
        assert records.move(session, job.uid, State.QUEUED, "again")

    store.write_now(retried)
    assert store.write_now(lambda session: records.move(session, job.uid, State.CANCELLED, "enough"))
    assert project_of(store).cpu_seconds == 7200.0


def test_what_a_transaction_takes_back_is_not_spent(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job, BEGIN)

    def work(session: Session) -> None:
        usage.settle(session, session.get_one(tables.Job, job.uid), session.get_one(tables.JobRun, (job.uid, 1)))
        raise RuntimeError("the rest of the transaction fails")

    with pytest.raises(RuntimeError):
        store.write_now(work)
    assert project_of(store).cpu_seconds == 0.0
    assert settle(store, job, BEGIN + HOUR)


def test_runs_may_be_settled_in_any_order(store: Store, new_job: NewJob) -> None:
    early, late = new_job(), new_job()
    for job in (early, late):
        start(store, job, BEGIN, Demand(1.0))
    assert settle(store, late, BEGIN + 30 * HOUR)
    assert settle(store, early, BEGIN + 6 * HOUR)
    project = project_of(store)
    assert project.decay_time == BEGIN + 30 * HOUR
    parts = [
        usage.decayed(usage.decayed_spent(BEGIN, end, Demand(1.0)), end, BEGIN + 30 * HOUR)
        for end in (BEGIN + 6 * HOUR, BEGIN + 30 * HOUR)
    ]
    assert project.decayed_cpu_seconds == pytest.approx(sum(part.cpus for part in parts))
    assert project.cpu_seconds == 36 * 3600


def test_terms_see_what_still_runs_as_if_it_ended_now(store: Store, new_job: NewJob) -> None:
    moment = BEGIN + 40 * HOUR

    def bound(session: Session) -> None:
        project = session.get_one(tables.Project, "default")
        project.share, project.quota, project.ceiling = 2.5, {"cpus": 4.0}, {"gpus": 8.0}
        session.add(project)
        session.add(tables.Project(id="idle", create_time=BEGIN))

    store.write_now(bound)
    for _ in range(2):
        start(store, new_job(), BEGIN, Demand(1.0, 2.0))
    job = new_job()
    start(store, job, BEGIN, Demand(1.0))
    assert settle(store, job, BEGIN + 10 * HOUR)
    # Bounded last: jobs of a project that has spent its budget are refused.

    def give_budget(session: Session) -> None:
        project = session.get_one(tables.Project, "default")
        project.budget = {"cpu_seconds": 100 * 3600.0}
        session.add(project)

    store.write_now(give_budget)
    before = store.read_now(lambda session: usage.terms(session, moment))

    mine = before["default"]
    assert (mine.share, mine.quota, mine.limit) == (2.5, Demand(4.0, 0.0), Demand(math.inf, 8.0))
    assert mine.budget_left == Demand((100 - 10 - 2 * 40) * 3600.0, math.inf)
    idle = before["idle"]
    assert (idle.share, idle.quota, idle.limit, idle.decayed, idle.budget_left) == (1.0, Demand(), None, Demand(), None)
    later = store.read_now(lambda session: usage.terms(session, moment + 40 * HOUR))
    assert later["default"].budget_left == Demand(0.0, math.inf)

    def end_all(session: Session) -> None:
        for each, job_run in usage._live(session):
            assert usage.settle(session, each, job_run, moment)

    store.write_now(end_all)
    after = store.read_now(lambda session: usage.terms(session, moment))["default"]
    assert after.budget_left == mine.budget_left
    assert after.decayed.cpus == pytest.approx(mine.decayed.cpus)
    assert after.decayed.gpus == pytest.approx(mine.decayed.gpus)
    assert mine.decayed.cpus > mine.decayed.gpus / 2 > 0


def test_a_projects_standing_holds_jobs_and_endpoints_of_its_own(store: Store, new_job: NewJob) -> None:
    start(store, new_job(), BEGIN, Demand(1.25))
    new_job()

    def work(session: Session) -> None:
        session.add(tables.Project(id="other", create_time=BEGIN))
        session.flush()
        for project_id in ("default", "other"):
            session.add(
                tables.Endpoint(
                    project_id=project_id, id="desk", state="READY", cpus=2.0, gpus=1.0, create_time=BEGIN, update_time=BEGIN
                )
            )

    store.write_now(work)
    moment = BEGIN + HOUR

    def look(session: Session) -> dict[str, usage.Standing]:
        return usage.standings(session, [session.get_one(tables.Project, name) for name in ("default", "other")], moment)

    found = store.read_now(look)
    assert found["default"] == usage.Standing(Demand(3.25, 1.0), Demand(4500.0), {"RUNNING": 1, "QUEUED": 1})
    assert found["other"] == usage.Standing(Demand(2.0, 1.0), Demand(), {})


def test_a_run_from_before_runs_recorded_it_holds_what_its_job_asked_for(store: Store, new_job: NewJob) -> None:
    job = new_job(workers=2)
    start(store, job, BEGIN, Demand())
    assert settle(store, job, BEGIN + HOUR)
    assert project_of(store).cpu_seconds == 2.25 * 3600


def test_a_jobs_own_spending_goes_on_while_it_runs(store: Store, new_job: NewJob) -> None:
    job = new_job()
    start(store, job, BEGIN, Demand(1.0))

    def look(session: Session) -> Demand:
        row, run = session.get_one(tables.Job, job.uid), session.get_one(tables.JobRun, (job.uid, 1))
        return usage.job_spent(row, run, BEGIN + 2 * HOUR)

    assert store.read_now(look) == Demand(7200.0)
    assert settle(store, job, BEGIN + HOUR)
    assert store.read_now(look) == Demand(3600.0)
