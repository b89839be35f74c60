"""A hung run says which rank the others waited for, and is tried again; a loss that is no number is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlmodel import Session

from coordinator.cluster.launcher import submission_id
from coordinator.cluster.ray_cluster import Submission
from coordinator.jobs import report
from coordinator.jobs.hang import hang, told
from coordinator.jobs.reconcile import Reconciler
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from tests.support.fake_ray import FakeRay
from tests.support.job_runs import SECRET, Agent, now_of, run_of

NewJob = Callable[..., tables.Job]

LOADING = {"moves": 75, "step": 37, "doing": "waits for the rows of step 38", "seconds": 602.4, "traceback": "in next(loader)"}
COMPUTING = {"moves": 76, "step": 37, "doing": "computes step 38 with the others", "seconds": 601.0}
GONE = {"gives_up": True}


@pytest.mark.parametrize(
    ("standings", "workers", "message"),
    [
        (
            {"rank-0": COMPUTING, "rank-1": LOADING | GONE},
            2,
            "rank 1 of 2 stood after step 37 for 10 min 2 s: waits for the rows of step 38; "
            "the others stood after step 37: computes step 38 with the others",
        ),
        (
            {"rank-0": COMPUTING | GONE, "rank-1": LOADING},
            2,
            "rank 1 of 2 stood after step 37 for 10 min 2 s: waits for the rows of step 38; "
            "the others stood after step 37: computes step 38 with the others",
        ),
        (
            {"rank-0": COMPUTING | GONE, "rank-2": COMPUTING},
            3,
            "rank 1 of 3 told nothing for 10 min 1 s: the process is frozen or cannot be reached; "
            "the others stood after step 37: computes step 38 with the others",
        ),
        (
            {"rank-0": COMPUTING | GONE, "rank-1": COMPUTING},
            2,
            "all 2 ranks stood after step 37 for 10 min 1 s: computes step 38 with the others",
        ),
        ({"rank-0": LOADING | GONE}, 1, "the only rank stood after step 37 for 10 min 2 s: waits for the rows of step 38"),
        ({"rank-0": COMPUTING, "rank-1": LOADING}, 2, None),
        ({"trial-00001/rank-0": LOADING | GONE}, 2, None),
        ({}, 2, None),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(standings: dict[str, Any], workers: int, message: str | None) -> None:
    found = hang(standings, workers)
    assert (found["message"] if found else None) == message


def test_the_stack_is_that_of_the_rank_behind() -> None:
    found = hang({"rank-0": COMPUTING | GONE | {"traceback": "in all_reduce"}, "rank-1": LOADING}, 2)
    assert found is not None
    assert (found["source"], found["traceback"], found["code"]) == ("rank-1", "in next(loader)", "HANG")


def test_a_rank_that_moves_again_stands_no_more() -> None:
    standings = told(told({}, "rank-0", COMPUTING), "rank-1", LOADING)
    assert told(standings, "rank-1", {}) == {"rank-0": COMPUTING}


def stands(store: Store, job: tables.Job, source: str, number: int, **standing: object) -> None:
    body = agent_pb2.Report(sequence=number, standing=agent_pb2.StandingReport(**standing))  # type: ignore[arg-type]
    request = agent_pb2.ReportRequest(job_uid=job.uid, run=1, source=source, session_secret=SECRET, reports=[body])

    def work(session: Session) -> None:
        report.apply(session, request)

    store.write_now(work)


@pytest.mark.parametrize("end", ["the driver tells", "nobody tells"])
async def test_a_run_with_a_rank_that_gave_up_ended_as_hung_and_is_tried_again(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob, end: str
) -> None:
    job = new_job(workers=2)
    await loop.round()
    agent = Agent(store, job)
    stands(store, job, "rank-0", 1, **COMPUTING)
    stands(store, job, "rank-1", 1, **LOADING, gives_up=True)
    if end == "the driver tells":
        agent.ends("FAILED", "NODE_LOST", "WORKER_LOST")
    else:
        ray.jobs[submission_id(job.uid, 1)] = Submission("FAILED", "killed")
        await loop.round()
    row, run = now_of(store, job), run_of(store, job)
    assert (row.state, row.attempt, run.end_reason) == ("QUEUED", 1, "HANG")
    assert run.error["message"].startswith("rank 1 of 2 stood after step 37 for 10 min 2 s")
    assert run.error["traceback"] == "in next(loader)"


async def test_what_a_rank_told_and_took_back_is_no_hang(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job(workers=2)
    await loop.round()
    agent = Agent(store, job)
    stands(store, job, "rank-1", 1, **LOADING)
    stands(store, job, "rank-1", 2)
    agent.ends("FAILED", "NODE_LOST", "WORKER_LOST")
    assert run_of(store, job).end_reason == "NODE_LOST"
    assert run_of(store, job).standings == {}


async def test_a_loss_that_is_no_number_ends_the_job_at_once(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    row = Agent(store, job).ends("FAILED", "ERROR", "LOSS_NOT_FINITE")
    assert (row.state, row.end_reason, row.attempt) == ("FAILED", "ERROR", 0)
