"""Trained tokens: each process of a run tells how many there were so far, and they are added up once, when the run ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.jobs import report, usage
from coordinator.services.job_lookup import whole_job
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.job_runs import SECRET, Agent, now_of, set_columns

NewJob = Callable[..., tables.Job]


def running(store: Store, new_job: NewJob, run: int = 1, job: tables.Job | None = None) -> tuple[tables.Job, Agent]:
    job = job or new_job()
    set_columns(store, job, state="STARTING", run=run)
    row = tables.JobRun(job_uid=job.uid, run=run, submission_id=f"{job.uid}-{run}", create_time=tables.now(), workers=2)
    store.write_now(lambda session: session.add(row))
    return job, Agent(store, job, run)


def tell(store: Store, job: tables.Job, source: str, number: int, *tokens: int, run: int = 1) -> None:
    """Reports of a process on how many tokens there were so far, the first of them with a number."""
    reports = [
        agent_pb2.Report(sequence=number + index, progress=job_pb2.Progress(step=1, trained_tokens=so_far))
        for index, so_far in enumerate(tokens)
    ]
    request = agent_pb2.ReportRequest(job_uid=job.uid, run=run, source=source, session_secret=SECRET, reports=reports)
    store.write_now(lambda session: report.apply(session, request))


def shown(store: Store, job: tables.Job) -> int:
    return store.read_now(lambda session: whole_job(session, session.get_one(tables.Job, job.uid))).usage.trained_tokens


def of_project(store: Store) -> tuple[int, int]:
    """What is recorded of ended runs, and what is shown."""

    def look(session: object) -> tuple[int, int]:
        project = session.get_one(tables.Project, "default")  # type: ignore[attr-defined]
        standing = usage.standings(session, [project], tables.now())["default"]  # type: ignore[arg-type]
        return project.trained_tokens, standing.trained_tokens

    return store.read_now(look)


def test_tokens_are_seen_while_a_run_goes_on_and_added_when_it_ends(store: Store, new_job: NewJob) -> None:
    job, agent = running(store, new_job)
    tell(store, job, "rank-0", 1, 1000, 2500)
    assert (shown(store, job), of_project(store)) == (2500, (0, 2500))
    tell(store, job, "rank-0", 1, 1000, 2500)  # said again, as after a lost answer
    tell(store, job, "rank-0", 3, 4000)
    agent.ends("SUCCEEDED", "COMPLETED")
    assert now_of(store, job).trained_tokens == 4000
    assert (shown(store, job), of_project(store)) == (4000, (4000, 4000))
    tell(store, job, "rank-0", 4, 9000)  # too late to count
    assert of_project(store) == (4000, 4000)


def test_tokens_of_all_trials_count(store: Store, new_job: NewJob) -> None:
    job, agent = running(store, new_job)
    tell(store, job, "trial-1/rank-0", 1, 300)
    tell(store, job, "trial-2/rank-0", 1, 500, 0)  # the last word of a source that trains no more takes nothing back
    tell(store, job, "trial-2/rank-0", 3, 0)
    assert shown(store, job) == 800
    agent.ends("FAILED", "ERROR", "SOME_ERROR")
    assert of_project(store) == (800, 800)


def test_what_is_trained_again_after_a_fault_counts_again(store: Store, new_job: NewJob) -> None:
    job, agent = running(store, new_job)
    tell(store, job, "rank-0", 1, 700)
    agent.ends("FAILED", "AGENT_LOST", "WORKER_LOST")
    assert now_of(store, job).state == "QUEUED"
    assert (shown(store, job), of_project(store)) == (700, (700, 700))
    _, agent = running(store, new_job, run=2, job=job)
    tell(store, job, "rank-0", 1, 200, run=2)
    assert (shown(store, job), of_project(store)) == (900, (700, 900))
    agent.ends("SUCCEEDED", "COMPLETED")
    assert (now_of(store, job).trained_tokens, of_project(store)) == (900, (900, 900))


def test_the_last_tokens_may_come_with_the_outcome(store: Store, new_job: NewJob) -> None:
    job, _ = running(store, new_job)
    outcome = agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_SUCCEEDED, end_reason=job_pb2.END_REASON_COMPLETED)
    request = agent_pb2.ReportRequest(
        job_uid=job.uid,
        run=1,
        source="driver",
        session_secret=SECRET,
        reports=[
            agent_pb2.Report(sequence=1, progress=job_pb2.Progress(trained_tokens=60)),
            agent_pb2.Report(sequence=2, outcome=outcome),
        ],
    )
    store.write_now(lambda session: report.apply(session, request))
    assert now_of(store, job).trained_tokens == 60


@pytest.mark.parametrize("tokens", [2**40])
def test_many_tokens_fit(store: Store, new_job: NewJob, tokens: int) -> None:
    job, agent = running(store, new_job)
    tell(store, job, "rank-0", 1, tokens)
    agent.ends("SUCCEEDED", "COMPLETED")
    assert of_project(store) == (tokens, tokens)
