"""What is deleted is seen by nobody at once, and its bytes go with the collector's next round; what others need stays."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlmodel import Session, col, select

from common import storage
from common.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from common.names import VersionRef
from coordinator.collector import SETTLE, Collector
from coordinator.jobs.states import TERMINAL
from coordinator.jobs.usage import standings
from coordinator.removal import delete_job
from coordinator.services.job_lookup import find_job
from coordinator.services.models import lineage
from coordinator.services.principal import EDITOR, Principal
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from tests.support.deleting import Bytes, add_model, delete, drop_model, ended, fill, rows_of
from tests.support.job_runs import set_columns

NewJob = Callable[..., tables.Job]
WHO = Principal("default", "key-1", "tester", EDITOR)


async def test_a_deleted_job_is_gone_at_once_and_its_bytes_with_the_next_round(
    store: Store, collector: Collector, files: Bytes, new_job: NewJob
) -> None:
    job, other = ended(store, new_job(request_id="r")), new_job()
    fill(store, job.uid)
    folder, kept = files.put("jobs", job.uid, "run-1", "checkpoints", "step-5"), files.put("jobs", other.uid, "run-1")
    await collector.round()
    assert files.there(folder)
    delete(store, job)
    with pytest.raises(NotFound):
        store.read_now(lambda session: find_job(session, WHO, f"projects/default/jobs/{job.job_id}"))
    with pytest.raises(NotFound):
        store.write_now(lambda session: delete_job(session, find_job(session, WHO, f"projects/default/jobs/{job.job_id}")))
    assert store.read_now(lambda session: _jobs_by_state(session)) == {"QUEUED": 1}
    assert files.there(folder)
    await collector.round()
    assert files.gone(files.uri("jobs", job.uid))
    assert rows_of(store, job.uid) == 0
    assert files.there(kept)
    assert rows_of(store, other.uid) == 2
    await collector.round()


def _jobs_by_state(session: Session) -> dict[str, int]:
    project = session.get_one(tables.Project, "default")
    return dict(standings(session, [project], tables.now())["default"].jobs)


async def test_a_kill_between_bytes_and_rows_is_made_good_by_the_next_round(
    store: Store, collector: Collector, files: Bytes, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ended(store, new_job())
    fill(store, job.uid)
    folder = files.put("jobs", job.uid, "run-1", "model")
    delete(store, job)

    class Killed(BaseException):
        pass

    def dies(*_: object, **__: object) -> bool:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("coordinator.collector._delete_rows", dies)
        with pytest.raises(Killed):
            await collector.round()
    assert files.gone(folder)
    assert rows_of(store, job.uid) > 0
    await collector.round()
    assert rows_of(store, job.uid) == 0


@pytest.mark.parametrize("state", ["BLOCKED", "QUEUED", "STARTING", "RUNNING", "PAUSING", "PAUSED"])
def test_a_job_that_has_not_ended_is_not_deleted(store: Store, new_job: NewJob, state: str) -> None:
    job = new_job()
    set_columns(store, job, state=state)
    with pytest.raises(FailedPrecondition) as caught:
        delete(store, job)
    assert caught.value.message == f"the job is in state {state}, so it cannot be deleted; cancel it first"
    assert state not in {each.value for each in TERMINAL}


def test_a_job_that_a_waiting_one_follows_is_not_deleted(store: Store, new_job: NewJob) -> None:
    first, second = new_job(), new_job()
    waiting = new_job(after=[f"projects/default/jobs/{each.job_id}" for each in (first, second)])
    ended(store, first)
    with pytest.raises(FailedPrecondition) as caught:
        delete(store, first)
    assert waiting.job_id in caught.value.message
    ended(store, waiting, "CANCELLED")
    delete(store, first)


def test_a_job_that_was_changed_meanwhile_is_not_deleted(store: Store, new_job: NewJob) -> None:
    job = ended(store, new_job())
    with pytest.raises(Aborted):
        delete(store, job, '"77"')
    delete(store, job, f'"{job.version}"')


def test_nothing_follows_a_deleted_job_and_its_request_makes_a_new_one(store: Store, new_job: NewJob) -> None:
    job = ended(store, new_job(request_id="again"))
    assert new_job(request_id="again").uid == job.uid
    delete(store, job)
    with pytest.raises(InvalidArgument):
        new_job(after=[f"projects/default/jobs/{job.job_id}"])
    assert new_job(request_id="again").uid != job.uid


async def test_files_are_left_alone_while_the_processes_of_a_run_may_still_be_leaving(
    store: Store, collector: Collector, files: Bytes, new_job: NewJob
) -> None:
    job = ended(store, new_job(), "FAILED", ago=SETTLE / 2)
    folder = files.put("jobs", job.uid, "run-1")
    delete(store, job)
    await collector.round()
    assert files.there(folder)
    set_columns(store, job, end_time=tables.now() - SETTLE * 2)
    await collector.round()
    assert files.gone(folder)


async def test_models_and_their_lineage_outlive_the_job_that_made_them(
    store: Store, collector: Collector, files: Bytes, new_job: NewJob
) -> None:
    job = ended(store, new_job())
    model, rest = files.put("jobs", job.uid, "run-2", "model"), files.put("jobs", job.uid, "run-2", "checkpoints", "step-9")
    name = f"projects/default/jobs/{job.job_id}"
    add_model(store, model, job=name)
    delete(store, job)
    await collector.round()
    assert files.there(model)
    assert files.gone(rest)
    nodes = store.read_now(lambda session: lineage(session, "default", VersionRef("own", "1")))
    assert name in [node.name for node in nodes]
    drop_model(store)
    await collector.round()
    assert files.gone(model)


async def test_what_a_deleted_job_spent_stays_counted(store: Store, collector: Collector, new_job: NewJob) -> None:
    job = ended(store, new_job())

    def spend(session: Session) -> None:
        session.get_one(tables.Project, "default").cpu_seconds = 77.0

    store.write_now(spend)
    delete(store, job)
    await collector.round()
    assert store.read_now(lambda session: session.get_one(tables.Project, "default").cpu_seconds) == 77.0


async def test_checkpoints_of_a_registered_model_are_deleted_after_a_week(
    store: Store, collector: Collector, files: Bytes, new_job: NewJob
) -> None:
    week = timedelta(days=7)
    old, young, failed, unregistered = (new_job() for _ in range(4))
    ended(store, old, ago=week + SETTLE, result={"model_version": "m@1"})
    ended(store, young, ago=week - SETTLE, result={"model_version": "m@2"})
    ended(store, failed, "FAILED", ago=10 * week, result={"model_version": "m@3"})
    ended(store, unregistered, ago=10 * week)
    uris = {}
    for job in (old, young, failed, unregistered):
        uris[job.uid] = files.put("jobs", job.uid, "run-1", "checkpoints", "step-5")
        point = tables.Checkpoint(
            job_uid=job.uid, run=1, step=5, uri=uris[job.uid], manifest_sha256="a", create_time=tables.now()
        )
        store.write_now(lambda session, point=point: session.add(point))  # type: ignore[misc]
    await collector.round()
    assert files.gone(uris[old.uid])
    assert files.there(uris[young.uid])
    assert files.there(uris[failed.uid])
    left = store.read_now(lambda session: session.exec(select(col(tables.Checkpoint.job_uid))).all())
    assert set(left) == {young.uid, failed.uid, unregistered.uid}


async def test_a_coordinator_that_follows_removes_nothing(
    store: Store, collector: Collector, leadership: Leadership, files: Bytes, new_job: NewJob
) -> None:
    job = ended(store, new_job())
    folder = files.put("jobs", job.uid, "run-1")
    delete(store, job)
    leadership.resign()
    await collector.round()
    assert files.there(folder)


async def test_one_that_cannot_be_removed_does_not_hold_up_the_others(
    store: Store, collector: Collector, files: Bytes, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ended(store, new_job()) for _ in range(2)]
    folders = [files.put("jobs", job.uid, "run-1") for job in jobs]
    real = storage.delete_but

    def fails_once(uri: str, kept: list[str]) -> None:
        monkeypatch.setattr(storage, "delete_but", real)
        raise Unavailable("the storage is away")

    monkeypatch.setattr(storage, "delete_but", fails_once)
    for job in jobs:
        delete(store, job)
    await collector.round()
    assert sorted(files.gone(folder) for folder in folders) == [False, True]
    await collector.round()
    assert all(files.gone(folder) for folder in folders)
