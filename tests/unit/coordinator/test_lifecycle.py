"""Pausing, resuming, retrying, finishing early, following: what a job goes through between its runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from sqlmodel import Session, col, select

from common.errors import Aborted, FailedPrecondition, InvalidArgument
from coordinator.cluster.launcher import Launcher, submission_id
from coordinator.cluster.ray_cluster import Submission
from coordinator.jobs import reconcile, report
from coordinator.jobs.change import Change
from coordinator.jobs.reconcile import PAUSE_GRACE, Reconciler
from coordinator.jobs.states import EndReason
from coordinator.jobs.tokens import claim_token
from coordinator.jobs.wishes import wish_end, wish_finish, wish_pause, wish_resume
from coordinator.notify import Notifier
from coordinator.services.agent import wish_of
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.fake_ray import FakeRay

NewJob = Callable[..., tables.Job]
SECRET = "s" * 40


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture
def loop(store: Store, ray: FakeRay) -> Reconciler:
    return Reconciler(store, Launcher(ray, "127.0.0.1:7420", "python", secret_of(store)), Notifier())  # type: ignore[arg-type]


def secret_of(store: Store) -> str:
    return store.read_now(lambda session: session.get_one(tables.StackFact, "secret").value)


def now_of(store: Store, job: tables.Job) -> tables.Job:
    return store.read_now(lambda session: session.get_one(tables.Job, job.uid))


def run_of(store: Store, job: tables.Job, run: int = 1) -> tables.JobRun:
    return store.read_now(lambda session: session.get_one(tables.JobRun, (job.uid, run)))


def set_columns(store: Store, job: tables.Job, **values: object) -> None:
    def work(session: Session) -> None:
        row = session.get_one(tables.Job, job.uid)
        for name, value in values.items():
            setattr(row, name, value)
        session.add(row)

    store.write_now(work)


class Agent:
    """Claims a run and reports on it, in order, as its driver would."""

    def __init__(self, store: Store, job: tables.Job, run: int = 1) -> None:
        self.store, self.uid, self.run, self.number = store, job.uid, run, 0
        token = claim_token(secret_of(store), job.uid, run)
        request = agent_pb2.ClaimRunRequest(job_uid=job.uid, run=run, claim_token=token, session_secret=SECRET)
        self.job = store.write_now(lambda session: report.claim(session, secret_of(store), request))

    def say(self, **body: object) -> tables.Job:
        self.number += 1
        said = agent_pb2.Report(sequence=self.number, **body)  # type: ignore[arg-type]
        request = agent_pb2.ReportRequest(job_uid=self.uid, run=self.run, source="driver", session_secret=SECRET, reports=[said])
        return self.store.write_now(lambda session: report.apply(session, request))[0]

    def saved(self, step: int) -> tables.Job:
        return self.say(checkpoint=job_pb2.Checkpoint(step=step, uri=f"mem://{self.run}/{step}", manifest_sha256="a" * 64))

    def ends(self, state: str, reason: str = "UNSPECIFIED", code: str = "") -> tables.Job:
        outcome = agent_pb2.OutcomeReport(
            state=job_pb2.JobState.Value(f"JOB_STATE_{state}"), end_reason=job_pb2.EndReason.Value(f"END_REASON_{reason}")
        )
        if code:
            outcome.error.CopyFrom(job_pb2.JobError(code=code, message=code.lower(), source="rank-0"))
        return self.say(outcome=outcome)


def leaves(ray: FakeRay, job: tables.Job, run: int = 1) -> None:
    """The process of a run is gone, as Ray sees it."""
    ray.jobs[submission_id(job.uid, run)] = Submission("SUCCEEDED", "")


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


def name_of(job: tables.Job) -> str:
    return f"projects/default/jobs/{job.job_id}"


async def test_a_job_starts_after_those_it_follows_have_succeeded(loop: Reconciler, store: Store, new_job: NewJob) -> None:
    first, second = new_job(), new_job()
    third = new_job(after=[name_of(first), name_of(second)])
    assert third.state == "BLOCKED"
    await loop.round()
    Agent(store, first).ends("SUCCEEDED", "COMPLETED")
    await loop.round()
    assert now_of(store, third).state == "BLOCKED"
    Agent(store, second).ends("SUCCEEDED", "COMPLETED")
    assert now_of(store, third).state == "QUEUED"
    await loop.round()
    assert now_of(store, third).state == "STARTING"


async def test_what_follows_a_job_that_did_not_succeed_ends_with_it_and_so_on(store: Store, new_job: NewJob) -> None:
    first = new_job()
    second = new_job(after=[name_of(first)])
    third = new_job(after=[name_of(second)])
    store.write_now(lambda session: wish_end(session, first.uid, EndReason.USER))
    for job in (second, third):
        row = now_of(store, job)
        assert (row.state, row.end_reason) == ("CANCELLED", "DEPENDENCY")


def test_a_job_that_follows_one_that_succeeded_already_waits_for_nothing(store: Store, new_job: NewJob) -> None:
    first = new_job()
    set_columns(store, first, state="SUCCEEDED")
    assert new_job(after=[name_of(first)]).state == "QUEUED"


@pytest.mark.parametrize("name", ["projects/default/jobs/ft-none", "projects/other/jobs/x", "ft-1"])
def test_nothing_follows_a_job_that_is_not_there(store: Store, new_job: NewJob, name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        new_job(after=[name])
    assert [violation.field for violation in caught.value.violations] == ["job.after[0]"]
    assert not store.read_now(lambda session: session.exec(select(tables.Job)).all())


def test_nothing_follows_a_job_that_failed(store: Store, new_job: NewJob) -> None:
    first = new_job()
    store.write_now(lambda session: wish_end(session, first.uid, EndReason.USER))
    with pytest.raises(InvalidArgument, match="ended CANCELLED"):
        new_job(after=[name_of(first)])


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


def change_of(etag: str = "", paths: list[str] | None = None, **fields: object) -> Change:
    job = job_pb2.Job(**fields)  # type: ignore[arg-type]
    mask = FieldMask(paths=list(fields) if paths is None else paths)
    return Change.of(job_pb2.UpdateJobRequest(job=job, update_mask=mask, etag=etag))


def test_a_change_is_told_in_an_event_and_changes_the_order(store: Store, new_job: NewJob) -> None:
    job = new_job()
    change = change_of(priority=7, time_limit=Duration(seconds=90), labels={"team": "search"})
    assert store.write_now(lambda session: change.apply(session, job.uid))
    row = now_of(store, job)
    assert (row.priority, row.time_limit_seconds, row.labels) == (7, 90.0, {"team": "search"})
    assert row.sequence == 2
    assert not store.write_now(lambda session: change.apply(session, job.uid))
    assert now_of(store, job).sequence == 2


def test_a_change_of_an_old_version_is_aborted(store: Store, new_job: NewJob) -> None:
    job = new_job()
    etag = f'"{job.version}"'
    store.write_now(lambda session: change_of(priority=1).apply(session, job.uid))
    with pytest.raises(Aborted):
        store.write_now(lambda session: change_of(etag=etag, priority=2).apply(session, job.uid))
    assert now_of(store, job).priority == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"paths": ["state"]}, "update_mask"),
        ({"paths": []}, "update_mask"),
        ({"priority": 101}, "job.priority"),
        ({"budget": job_pb2.Budget(cpu_seconds=-1)}, "job.budget.cpu_seconds"),
        ({"retry": job_pb2.RetryPolicy(max_retries=-1)}, "job.retry.max_retries"),
    ],
)
def test_what_cannot_be_changed_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        change_of(**change)  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [field]


def test_what_has_ended_is_not_changed(store: Store, new_job: NewJob) -> None:
    job = new_job()
    store.write_now(lambda session: wish_end(session, job.uid, EndReason.USER))
    with pytest.raises(FailedPrecondition, match="CANCELLED"):
        store.write_now(lambda session: change_of(priority=1).apply(session, job.uid))
