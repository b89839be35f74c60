"""Pausing, resuming, retrying, finishing early, following: what a job goes through between its runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlmodel import Session, col, select

from common.errors import FailedPrecondition
from coordinator.cluster.launcher import submission_id
from coordinator.cluster.ray_cluster import Submission
from coordinator.jobs import reconcile
from coordinator.jobs.reconcile import PAUSE_GRACE, Reconciler
from coordinator.jobs.states import EndReason
from coordinator.jobs.wishes import wish_end, wish_finish, wish_pause, wish_resume
from coordinator.services.agent import wish_of
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.fake_ray import FakeRay
from tests.support.job_runs import Agent, leaves, now_of, run_of, set_columns

NewJob = Callable[..., tables.Job]


async def test_a_running_job_saves_is_paused_and_goes_on_from_there(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    row = now_of(store, job)
    assert row.state == "PAUSING"
    assert wish_of(row)[0] == agent_pb2.WISH_PAUSE
    agent.saved(40)
    row = agent.ends("PAUSED")
    assert (row.state, row.run, row.attempt, row.pause_time) == ("PAUSED", 1, 0, None)
    assert run_of(store, job).end_time is not None
    await loop.round()
    assert now_of(store, job).state == "PAUSED"
    store.write_now(lambda session: wish_resume(session, job.uid))
    leaves(ray, job)
    await loop.round()
    assert (now_of(store, job).state, run_of(store, job, 2).resumed_step) == ("STARTING", 40)
    assert submission_id(job.uid, 2) in ray.jobs


async def test_pausing_and_resuming_twice_is_pausing_and_resuming_once(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    assert store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    assert not store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    await loop.round()
    assert now_of(store, job).state == "QUEUED"
    assert store.write_now(lambda session: wish_resume(session, job.uid))
    assert not store.write_now(lambda session: wish_resume(session, job.uid))
    await loop.round()
    assert now_of(store, job).state == "STARTING"


async def test_a_job_that_is_starting_pauses_once_it_is_claimed(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    assert now_of(store, job).state == "STARTING"
    assert Agent(store, job).job.state == "PAUSING"


async def test_resumed_while_it_saves_a_job_is_queued_at_once(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    store.write_now(lambda session: wish_resume(session, job.uid))
    assert agent.ends("PAUSED").state == "QUEUED"


async def test_what_was_preempted_is_queued_again_without_a_retry_being_counted(
    loop: Reconciler, store: Store, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.PREEMPTED))
    agent.saved(7)
    row = agent.ends("PAUSED")
    assert (row.state, row.attempt, row.pause_time) == ("QUEUED", 0, None)
    assert run_of(store, job).end_reason == "PREEMPTED"


async def test_a_run_that_dies_while_it_saves_is_paused_all_the_same(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    Agent(store, job).saved(5)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    ray.jobs[submission_id(job.uid, 1)] = Submission("FAILED", "killed")
    await loop.round()
    row = now_of(store, job)
    assert (row.state, row.attempt) == ("PAUSED", 0)


async def test_a_run_that_never_comes_to_saving_is_ended(loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    await loop.round()
    assert ray.stopped == []
    set_columns(store, job, pause_time=tables.now() - PAUSE_GRACE * 2)
    await loop.round()
    await loop.round()
    assert ray.stopped == [submission_id(job.uid, 1)]
    assert now_of(store, job).state == "PAUSED"


async def test_a_pausing_job_that_finished_first_has_succeeded(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    assert agent.ends("SUCCEEDED", "COMPLETED").state == "SUCCEEDED"


async def test_cancelled_while_it_saves_a_job_is_cancelled(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.USER))
    store.write_now(lambda session: wish_end(session, job.uid, EndReason.USER))
    assert wish_of(now_of(store, job))[0] == agent_pb2.WISH_CANCEL
    row = agent.ends("PAUSED")
    assert (row.state, row.end_reason) == ("CANCELLED", "USER")


@pytest.mark.parametrize("wish", [lambda session, uid: wish_pause(session, uid, EndReason.USER), wish_resume])
def test_what_has_ended_is_neither_paused_nor_resumed(
    store: Store, new_job: NewJob, wish: Callable[[Session, str], bool]
) -> None:
    job = new_job()
    store.write_now(lambda session: wish_end(session, job.uid, EndReason.USER))
    with pytest.raises(FailedPrecondition, match="in state CANCELLED"):
        store.write_now(lambda session: wish(session, job.uid))


async def test_out_of_memory_means_another_try_with_smaller_portions(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    agent.saved(3)
    row = agent.ends("FAILED", "OUT_OF_MEMORY", "OUT_OF_MEMORY")
    assert (row.state, row.attempt) == ("QUEUED", 1)
    assert row.spec["hyperparameters"] == {"batch_size": 4, "gradient_accumulation": 2}
    assert row.not_before is not None
    assert run_of(store, job).error["code"] == "OUT_OF_MEMORY"
    await loop.round()
    assert now_of(store, job).state == "QUEUED"
    set_columns(store, job, not_before=tables.now())
    leaves(ray, job)
    await loop.round()
    assert run_of(store, job, 2).resumed_step == 3


@pytest.mark.parametrize("reason", ["ERROR", "BAD_DATA"])
async def test_errors_of_the_user_are_not_tried_again(loop: Reconciler, store: Store, new_job: NewJob, reason: str) -> None:
    job = new_job()
    await loop.round()
    row = Agent(store, job).ends("FAILED", reason, "TRAINING_ERROR")
    assert (row.state, row.end_reason, row.attempt) == ("FAILED", reason, 0)


async def test_a_signal_from_outside_is_a_fault_and_not_a_cancellation(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    row = Agent(store, job).ends("CANCELLED", "USER")
    assert (row.state, row.attempt) == ("QUEUED", 1)
    assert run_of(store, job).error["code"] == "STOPPED_FROM_OUTSIDE"


@pytest.mark.parametrize(("state", "reason"), [("PAUSED", "UNSPECIFIED"), ("FAILED", "NODE_LOST")])
async def test_the_next_run_waits_until_ray_says_that_the_one_before_has_left(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob, state: str, reason: str
) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.PREEMPTED))
    assert agent.ends(state, reason, "LOST" if reason != "UNSPECIFIED" else "").state == "QUEUED"
    await loop.round()
    row = now_of(store, job)
    assert (row.state, row.run, row.queue_reason) == ("QUEUED", 1, "its run before to leave the cluster")
    assert loop.queue.decisions[job.uid].reason == row.queue_reason
    leaves(ray, job)
    await loop.round()
    assert (now_of(store, job).state, now_of(store, job).run) == ("STARTING", 2)


async def test_a_run_that_does_not_leave_after_its_outcome_is_ended(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_pause(session, job.uid, EndReason.PREEMPTED))
    agent.ends("PAUSED")
    await loop.round()
    assert not ray.stopped
    monkeypatch.setattr(reconcile, "LEAVE_GRACE", timedelta(0))
    await loop.round()
    assert ray.stopped == [submission_id(job.uid, 1)]
    await loop.round()
    assert submission_id(job.uid, 2) in ray.jobs


async def test_a_zombie_of_an_earlier_run_is_refused(loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    zombie = Agent(store, job)
    ray.jobs.clear()
    await loop.round()
    set_columns(store, job, not_before=None)
    await loop.round()
    Agent(store, job, run=2)
    with pytest.raises(FailedPrecondition, match="run 1 no longer counts"):
        zombie.ends("SUCCEEDED", "COMPLETED")
    assert now_of(store, job).state == "RUNNING"


async def test_a_spent_budget_asks_a_fine_tune_to_finish_with_what_it_has(
    loop: Reconciler, store: Store, new_job: NewJob
) -> None:
    job = new_job(budget=job_pb2.Budget(cpu_seconds=100))
    await loop.round()
    agent = Agent(store, job)
    await loop.round()
    assert wish_of(now_of(store, job))[0] == agent_pb2.WISH_UNSPECIFIED

    def long_ago(session: Session) -> None:
        run = session.get_one(tables.JobRun, (job.uid, 1))
        run.create_time = tables.now() - timedelta(seconds=100)  # 1.25 CPUs for 100 s are 125 CPU-seconds
        session.add(run)

    store.write_now(long_ago)
    await loop.round()
    assert wish_of(now_of(store, job)) == (agent_pb2.WISH_FINISH, job_pb2.END_REASON_BUDGET)
    row = agent.ends("SUCCEEDED", "BUDGET")
    assert (row.state, row.end_reason) == ("SUCCEEDED", "BUDGET")


async def test_finishing_early_is_asked_once(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    Agent(store, job)
    assert store.write_now(lambda session: wish_finish(session, job.uid, EndReason.BUDGET))
    assert not store.write_now(lambda session: wish_finish(session, job.uid, EndReason.BUDGET))


async def test_an_elastic_job_keeps_the_workers_that_its_checkpoints_were_written_by(
    loop: Reconciler, store: Store, new_job: NewJob
) -> None:
    job = new_job(workers=2)
    set_columns(store, job, shape=job.shape | {"least": 1})
    await loop.round()
    agent = Agent(store, job)
    granted = run_of(store, job).workers
    agent.saved(2)
    agent.ends("FAILED", "NODE_LOST", "WORKER_LOST")
    assert (now_of(store, job).shape["least"], now_of(store, job).shape["most"]) == (granted, granted)


async def test_checkpoints_that_the_ranks_collected_leave_the_records(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    for step in (10, 20, 30, 40):
        agent.saved(step)
    query = select(tables.Checkpoint.step).where(tables.Checkpoint.job_uid == job.uid).order_by(col(tables.Checkpoint.step))
    assert store.read_now(lambda session: list(session.exec(query).all())) == [30, 40]


async def test_what_is_known_early_is_kept_for_the_next_run(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    partial = job_pb2.JobResult()
    partial.before.loss = 8.25
    agent.say(partial=partial)
    row = agent.ends("FAILED", "NODE_LOST", "WORKER_LOST")
    assert (row.state, row.result["before"]["loss"]) == ("QUEUED", 8.25)


async def test_what_a_project_has_spent_ends_only_jobs_that_hold_it(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    Agent(store, job)

    def spend(session: Session, **budget: float) -> None:
        project = session.get_one(tables.Project, "default")
        project.budget, project.cpu_seconds, project.gpu_seconds = budget, 10.0, 10.0
        session.add(project)

    store.write_now(lambda session: spend(session, gpu_seconds=5.0))
    await loop.round()
    assert wish_of(now_of(store, job))[0] == agent_pb2.WISH_UNSPECIFIED
    store.write_now(lambda session: spend(session, cpu_seconds=5.0))
    await loop.round()
    assert wish_of(now_of(store, job)) == (agent_pb2.WISH_FINISH, job_pb2.END_REASON_BUDGET)


async def test_the_wish_to_finish_ends_with_the_run(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    store.write_now(lambda session: wish_finish(session, job.uid, EndReason.BUDGET))
    row = agent.ends("FAILED", "NODE_LOST", "WORKER_LOST")
    assert (row.state, row.finish_time) == ("QUEUED", None)


async def test_checkpoints_of_a_sweeps_trials_are_all_kept_and_nothing_goes_on_from_them(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    set_columns(store, job, kind="sweep")
    await loop.round()
    agent = Agent(store, job)
    for step in (10, 20, 30):
        agent.saved(step)
    query = select(tables.Checkpoint.step).where(tables.Checkpoint.job_uid == job.uid)
    assert len(store.read_now(lambda session: session.exec(query).all())) == 3
    agent.ends("FAILED", "NODE_LOST", "WORKER_LOST")
    leaves(ray, job)
    set_columns(store, job, not_before=None)
    await loop.round()
    assert run_of(store, job, 2).resumed_step == 0
