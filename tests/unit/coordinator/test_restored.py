"""After a restore the records are older than the world: runs that Ray and storage know and the records do not are kept out of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import Session

from coordinator.cluster.launcher import Launcher, run_of_submission, submission_id
from coordinator.cluster.ray_cluster import Submission
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.tokens import claim_token
from coordinator.notify import Notifier
from coordinator.services.agent import AgentService
from coordinator.store import backup, tables
from coordinator.store.backup import dump
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.store.restore import restore, restored
from coordinator.vault import Vault
from luthier.agent.v1 import agent_pb2
from tests.support.fake_ray import FakeRay
from tests.support.job_runs import SECRET, Agent, now_of, run_of, secret_of, set_columns

NewJob = Callable[..., tables.Job]
DAYS = timedelta(days=3)


class Restored:
    """A store as it was, in another database, and a loop on it; the same Ray."""

    def __init__(self, store: Store, ray: FakeRay, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        number = len(list(folder.iterdir()))
        file = folder / f"backup-{number}"
        with monkeypatch.context() as patch, file.open("w+b") as written:
            # So old is the backup when it is restored.
            patch.setattr(backup, "now", lambda: tables.now() - DAYS)
            dump(store.engine, written)
        url = f"sqlite:///{folder / f'restored-{number}.db'}"
        restore(url, file)
        self.store = Store(url)
        self.mark = self.store.read_now(restored)
        self.leadership = Leadership(self.store, "127.0.0.1:7421")
        self.leadership.look()
        launcher = Launcher(ray, "127.0.0.1:7421", "python", secret_of(self.store))  # type: ignore[arg-type]
        self.loop = Reconciler(self.store, launcher, Notifier(), self.leadership, restored=True)

    def close(self) -> None:
        self.leadership.stop()
        self.store.close()


@pytest.fixture
def back(store: Store, ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Restored]]:
    """Back the store up and restore it."""
    made: list[Restored] = []

    def make() -> Restored:
        made.append(Restored(store, ray, tmp_path, monkeypatch))
        return made[-1]

    yield make
    for each in made:
        each.close()


def soon(store: Store, job: tables.Job) -> None:
    """Have its pause after a fault be over."""
    set_columns(store, job, not_before=None)


async def test_a_run_that_was_begun_after_the_backup_is_not_begun_again(
    back: Callable[[], Restored], loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    again = back()
    await loop.round()
    Agent(store, job).ends("SUCCEEDED", "COMPLETED")
    ray.jobs[submission_id(job.uid, 1)] = Submission("SUCCEEDED", "")
    await again.loop.round()
    row = now_of(again.store, job)
    assert (row.state, row.run, row.attempt) == ("STARTING", 2, 0)
    assert ray.jobs[submission_id(job.uid, 2)].status == "RUNNING"
    assert ray.refused == []


async def test_what_still_runs_of_it_is_ended_before_another_begins(
    back: Callable[[], Restored], loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    again = back()
    # What the records that were lost knew: run 1 was lost, and run 2 runs.
    ray.jobs[submission_id(job.uid, 1)] = Submission("FAILED", "")
    ray.jobs[submission_id(job.uid, 2)] = Submission("RUNNING", "")
    await again.loop.round()
    assert (now_of(again.store, job).state, now_of(again.store, job).attempt) == ("QUEUED", 1)
    soon(again.store, job)
    await again.loop.round()
    assert ray.stopped == [submission_id(job.uid, 2)]
    assert now_of(again.store, job).state == "QUEUED"
    await again.loop.round()
    row = now_of(again.store, job)
    assert (row.state, row.run) == ("STARTING", 3)
    assert ray.refused == []


async def test_a_run_that_ray_has_lost_meanwhile_is_tried_again_and_the_time_between_does_not_count(
    back: Callable[[], Restored], loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    Agent(store, job).saved(40)
    set_columns(store, job, time_limit_seconds=3600.0)

    def begun(session: Session) -> None:
        """Ten minutes before the backup, which is days old."""
        session.get_one(tables.JobRun, (job.uid, 1)).create_time = tables.now() - DAYS - timedelta(minutes=10)

    store.write_now(begun)
    again = back()
    ray.jobs.clear()
    await again.loop.round()
    row = now_of(again.store, job)
    assert (row.state, row.run, row.attempt, row.end_reason) == ("QUEUED", 1, 1, "UNSPECIFIED")
    assert row.cpu_seconds == pytest.approx(600 * row.cpus, rel=0.1)
    soon(again.store, job)
    await again.loop.round()
    assert (now_of(again.store, job).state, run_of(again.store, job, 2).resumed_step) == ("STARTING", 40)


async def test_a_run_that_goes_on_is_heard_as_if_nothing_had_been(
    back: Callable[[], Restored], loop: Reconciler, store: Store, new_job: NewJob
) -> None:
    job = new_job()
    await loop.round()
    agent = Agent(store, job)
    agent.saved(10)
    again = back()
    await again.loop.round()
    agent.store = again.store
    agent.saved(20)
    assert agent.ends("SUCCEEDED", "COMPLETED").state == "SUCCEEDED"
    await again.loop.round()
    assert run_of(again.store, job).end_time is not None


async def test_new_runs_write_where_no_run_of_the_same_number_wrote(
    back: Callable[[], Restored], loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob, vault: Vault
) -> None:
    job = new_job()
    once, twice = back(), back()
    folders = []
    for each, its_loop, mark in ((store, loop, ""), *((each.store, each.loop, each.mark) for each in (once, twice))):
        ray.jobs.clear()  # also where Ray has forgotten everything
        await its_loop.round()
        token = claim_token(secret_of(each), job.uid, 1)
        request = agent_pb2.ClaimRunRequest(job_uid=job.uid, run=1, claim_token=token, session_secret=SECRET)
        service = AgentService(each, Notifier(), secret_of(each), "mem://", vault, mark)
        folders.append((await service.ClaimRun(request, None)).run_uri)  # type: ignore[arg-type]
    assert folders == [f"mem:///jobs/{job.uid}/run-1{suffix}" for suffix in ("", f"-{once.mark}", f"-{twice.mark}")]
    assert len(set(folders)) == 3


def test_nobody_leads_a_restored_store_by_a_number_that_was_used(
    back: Callable[[], Restored], store: Store, leadership: Leadership
) -> None:
    again = back()
    assert again.leadership.epoch == 3  # the old one had 1, and the restore took 2

    def leader(session: Session) -> str:
        return session.get_one(tables.Leader, 1).holder

    assert again.store.read_now(leader) == "127.0.0.1:7421"


@pytest.mark.parametrize("name", ["raysubmit_x", "luthier-", "luthier-a-r", "luthier-a-rx", "other-a-r1", ""])
def test_submissions_of_others_are_no_runs(name: str) -> None:
    assert run_of_submission(name) == ("", 0)
    assert run_of_submission(submission_id("a-r2", 7)) == ("a-r2", 7)
