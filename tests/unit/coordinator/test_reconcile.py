"""The loop between store and Ray, with a cluster that does what the test says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlmodel import Session, col, select

from coordinator.cluster.launcher import submission_id
from coordinator.cluster.ray_cluster import Submission
from coordinator.jobs import reconcile, report
from coordinator.jobs.lease import LOOK_SECONDS, SILENCE_SECONDS, Lease
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.states import EndReason
from coordinator.jobs.tokens import claim_token
from coordinator.jobs.wishes import wish_end
from coordinator.notify import Notifier
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.fake_ray import FakeRay
from tests.support.job_runs import SECRET, secret_of, set_columns

NewJob = Callable[..., tables.Job]


ONCE = job_pb2.RetryPolicy(max_retries=0)


def events_of(store: Store, job: tables.Job) -> list[tables.JobEvent]:
    query = select(tables.JobEvent).where(tables.JobEvent.job_uid == job.uid).order_by(col(tables.JobEvent.sequence))
    return list(store.read_now(lambda session: session.exec(query).all()))


def job_of(store: Store, job: tables.Job) -> tables.Job:
    return store.read_now(lambda session: session.get_one(tables.Job, job.uid))


def claim(store: Store, job: tables.Job) -> None:
    token = claim_token(secret_of(store), job.uid, 1)
    request = agent_pb2.ClaimRunRequest(job_uid=job.uid, run=1, claim_token=token, session_secret=SECRET)
    store.write_now(lambda session: report.claim(session, secret_of(store), request))


async def test_what_fits_is_started_once_and_the_rest_says_what_it_waits_for(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    first, second = new_job(workers=3), new_job(workers=3)
    await loop.round()
    await loop.round()
    assert list(ray.jobs) == [submission_id(first.uid, 1)]
    assert (job_of(store, first).state, job_of(store, second).state) == ("STARTING", "QUEUED")
    assert loop.queue.decisions[second.uid].reason == "3.25 CPUs; 0.75 CPUs are free"


async def test_a_run_is_started_on_the_nodes_that_its_job_asks_for(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    ray.labels = {"ray.io/accelerator-type": "A100", "zone": "a"}
    there = new_job(placement=job_pb2.Placement(gpu_types=["A100", "H100"], node_labels={"zone": "!b"}))
    elsewhere = new_job(placement=job_pb2.Placement(gpu_types=["H100"]))
    await loop.round()
    assert ray.selectors == {submission_id(there.uid, 1): {"ray.io/accelerator-type": "in(A100,H100)", "zone": "!b"}}
    assert loop.queue.decisions[elsewhere.uid].reason == "a node with accelerator-type H100; nodes have A100 (1)"


async def test_nothing_that_a_user_wrote_reaches_the_command_line(loop: Reconciler, ray: FakeRay, new_job: NewJob) -> None:
    job = new_job(display_name="x; rm -rf /")
    await loop.round()
    environment = ray.environments[submission_id(job.uid, 1)]
    assert "rm -rf" not in str(environment)
    assert set(environment) >= {"LUTHIER_COORDINATOR", "LUTHIER_JOB_UID", "LUTHIER_RUN", "LUTHIER_CLAIM_TOKEN"}


async def test_a_coordinator_that_died_before_submitting_submits_with_the_same_token(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    ray.down = True
    loop._capacity = None
    decision = reconcile.Decision(job.uid, True, 0, "fits", 1)
    assert store.write_now(lambda session: reconcile._begin_run(session, decision)) is not None
    ray.down = False
    again = Reconciler(store, loop._launcher, Notifier(), loop._leadership)
    await again.round()
    environment = ray.environments[submission_id(job.uid, 1)]
    assert environment["LUTHIER_CLAIM_TOKEN"] == claim_token(secret_of(store), job.uid, 1)
    await again.round()
    assert ray.refused == []
    assert job_of(store, job).run == 1


async def test_an_agent_that_dies_without_a_word_fails_the_job_with_its_last_lines(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job(retry=ONCE)
    await loop.round()
    claim(store, job)
    ray.jobs[submission_id(job.uid, 1)] = Submission("FAILED", "Job entrypoint command failed with exit code -9")
    await loop.round()
    row = job_of(store, job)
    assert (row.state, row.end_reason, row.error["code"]) == ("FAILED", "AGENT_LOST", "AGENT_LOST")
    assert "exit code -9" in row.error["message"]
    assert row.error["traceback"].endswith("last line")


async def test_a_rank_that_told_of_its_failure_is_the_cause_of_a_lost_agent(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    # With retries left: another try would fail the same way.
    job = new_job()
    await loop.round()
    claim(store, job)
    failure = agent_pb2.Report(sequence=1, failure=job_pb2.JobError(code="TRAINING_ERROR", message="division by zero"))
    request = agent_pb2.ReportRequest(job_uid=job.uid, run=1, source="rank-1", session_secret=SECRET, reports=[failure])
    store.write_now(lambda session: report.apply(session, request))
    ray.jobs[submission_id(job.uid, 1)] = Submission("FAILED", "gone")
    await loop.round()
    row = job_of(store, job)
    assert (row.state, row.end_reason, row.attempt) == ("FAILED", "ERROR", 0)
    assert row.error == {"code": "TRAINING_ERROR", "message": "division by zero", "source": "rank-1"}


async def test_a_run_that_ray_forgot_is_tried_again(loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    claim(store, job)
    ray.jobs.clear()
    await loop.round()
    row = job_of(store, job)
    assert (row.state, row.run, row.attempt) == ("QUEUED", 1, 1)
    assert not ray.jobs
    set_columns(store, job, not_before=tables.now())
    await loop.round()
    assert list(ray.jobs) == [submission_id(job.uid, 2)]
    assert (job_of(store, job).state, job_of(store, job).run) == ("STARTING", 2)


async def test_a_run_that_ray_forgot_fails_for_good_after_its_last_retry(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job(retry=ONCE)
    await loop.round()
    claim(store, job)
    ray.jobs.clear()
    await loop.round()
    assert (job_of(store, job).state, job_of(store, job).end_reason) == ("FAILED", "NODE_LOST")


async def test_a_silent_agent_is_ended_by_our_own_clock(loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob) -> None:
    clock = [0.0]
    loop._lease = Lease(lambda: clock[0])
    job = new_job()
    await loop.round()
    claim(store, job)
    await loop.round()
    # The wall clock of the store jumps by an hour: that alone ends nobody.
    set_columns(store, job, update_time=tables.now() - timedelta(hours=1))
    while clock[0] < SILENCE_SECONDS:
        await loop.round()
        assert ray.stopped == []
        clock[0] += LOOK_SECONDS / 2
    clock[0] += 1
    await loop.round()
    assert ray.stopped == [submission_id(job.uid, 1)]
    await loop.round()
    assert (job_of(store, job).state, job_of(store, job).attempt) == ("QUEUED", 1)


async def test_an_agent_that_reports_keeps_its_lease(loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob) -> None:
    clock = [0.0]
    loop._lease = Lease(lambda: clock[0])
    job = new_job()
    await loop.round()
    claim(store, job)
    request = agent_pb2.ReportRequest(job_uid=job.uid, run=1, source="driver", session_secret=SECRET)
    while clock[0] < 3 * SILENCE_SECONDS:
        clock[0] += LOOK_SECONDS
        if clock[0] % (SILENCE_SECONDS * 0.8) < LOOK_SECONDS:
            store.write_now(lambda session: report.apply(session, request))
        await loop.round()
    assert ray.stopped == []
    assert job_of(store, job).state == "RUNNING"
    set_columns(store, job, state="SUCCEEDED")
    await loop.round()
    assert loop._lease._heard == {}


async def test_a_silence_that_was_ours_ends_nobody(loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob) -> None:
    clock = [0.0]
    loop._lease = Lease(lambda: clock[0])
    job = new_job()
    await loop.round()
    claim(store, job)
    await loop.round()
    clock[0] = 10 * SILENCE_SECONDS
    await loop.round()
    assert ray.stopped == []


async def test_what_a_job_waits_for_is_told_once_and_again_when_it_changes(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    new_job(workers=3)
    waiting = new_job(workers=3)
    for _ in range(3):
        await loop.round()
    told = [event.message for event in events_of(store, waiting) if event.type == job_pb2.JOB_EVENT_TYPE_WAITING]
    assert len(told) == 1
    assert told[0].startswith("waits for 3.25 CPUs")
    ray.cpus, loop._capacity_until = 2.0, 0.0
    await loop.round()
    told = [event.message for event in events_of(store, waiting) if event.type == job_pb2.JOB_EVENT_TYPE_WAITING]
    assert len(told) == 2


async def test_while_ray_is_away_nothing_is_decided(loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob) -> None:
    running, queued = new_job(workers=3), new_job(workers=3)
    await loop.round()
    claim(store, running)
    ray.down = True
    with pytest.raises(reconcile.Unavailable):
        await loop.round()
    assert (job_of(store, running).state, job_of(store, queued).state) == ("RUNNING", "QUEUED")


async def test_while_ray_is_away_and_something_runs_a_new_job_is_told_what_it_waits_for(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    running = new_job(workers=3)
    await loop.round()
    claim(store, running)
    ray.down, loop._capacity_until = True, 0.0
    queued = new_job(workers=3)
    with pytest.raises(reconcile.Unavailable):
        await loop.round()
    decision = loop.queue.decisions[queued.uid]
    assert (decision.position, decision.start) == (1, False)
    assert "cluster" in decision.reason


async def test_cancelling_a_queued_job_ends_it_at_once(store: Store, new_job: NewJob) -> None:
    job = new_job()
    assert store.write_now(lambda session: wish_end(session, job.uid, EndReason.USER))
    row = job_of(store, job)
    assert (row.state, row.end_reason, row.sequence) == ("CANCELLED", "USER", 2)
    assert not store.write_now(lambda session: wish_end(session, job.uid, EndReason.USER))
    assert job_of(store, job).sequence == 2


async def test_cancelling_a_run_that_nobody_claimed_stops_it_at_ray(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    store.write_now(lambda session: wish_end(session, job.uid, EndReason.USER))
    assert job_of(store, job).state == "STARTING"
    await loop.round()
    assert ray.stopped == [submission_id(job.uid, 1)]
    await loop.round()
    assert job_of(store, job).state == "CANCELLED"


async def test_a_run_over_its_time_limit_is_asked_then_told_to_stop(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    from google.protobuf.duration_pb2 import Duration

    job = new_job(time_limit=Duration(seconds=60))
    await loop.round()
    claim(store, job)
    await loop.round()
    assert job_of(store, job).cancel_time is None

    def long_ago(session: Session) -> None:
        run = session.get_one(tables.JobRun, (job.uid, 1))
        run.create_time = tables.now() - timedelta(seconds=61)
        session.add(run)

    store.write_now(long_ago)
    await loop.round()
    assert job_of(store, job).cancel_reason == "TIME_LIMIT"
    assert ray.stopped == []

    def grace_over(session: Session) -> None:
        row = session.get_one(tables.Job, job.uid)
        row.cancel_time = tables.now() - reconcile.CANCEL_GRACE * 2
        session.add(row)

    store.write_now(grace_over)
    await loop.round()
    await loop.round()
    row = job_of(store, job)
    assert (row.state, row.end_reason) == ("FAILED", "TIME_LIMIT")
    assert "stopped after its time limit of 60 s" in row.error["message"]
