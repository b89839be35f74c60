"""Versions are deleted once nobody reads them, their folders once nothing refers to them; nobody publishes there meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, select

from common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from common.names import VersionRef
from coordinator import garbage, registry
from coordinator.collector import Collector
from coordinator.garbage import HOLD_TIME, publishing
from coordinator.jobs import create, submit
from coordinator.jobs.resolve import registered
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from tests.support.deleting import Bytes, add_dataset, add_model, asked, drop_dataset, drop_model, ended, read_by


async def test_a_data_set_version_goes_with_its_bytes_and_its_number_is_never_used_again(
    store: Store, collector: Collector, files: Bytes
) -> None:
    first, second = files.put("datasets", "1" * 64), files.put("datasets", "2" * 64)
    add_dataset(store, first)
    add_dataset(store, second)
    drop_dataset(store, version="2")
    assert files.there(second)
    await collector.round()
    assert files.gone(second)
    assert files.there(first)
    found = store.read_now(lambda session: registry.find_dataset(session, "default", VersionRef("rows")))
    assert found.version == 1
    with pytest.raises(NotFound) as caught:
        drop_dataset(store, version="2")
    assert "its latest is 1" in caught.value.message
    add_dataset(store, first)
    assert store.read_now(lambda session: registry.find_dataset(session, "default", VersionRef("rows"))).version == 3


async def test_rows_that_another_project_has_too_stay_until_it_deletes_them(
    store: Store, collector: Collector, files: Bytes
) -> None:
    store.write_now(lambda session: session.add(tables.Project(id="other", create_time=tables.now())))
    shared = files.put("datasets", "3" * 64)
    add_dataset(store, shared)
    add_dataset(store, shared, "theirs", "other")
    drop_dataset(store)
    await collector.round()
    assert files.there(shared)
    drop_dataset(store, "theirs", project="other")
    await collector.round()
    assert files.gone(shared)


async def test_what_is_needed_again_by_the_time_that_it_would_be_deleted_stays(
    store: Store, collector: Collector, files: Bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = files.put("datasets", "d" * 64)
    add_dataset(store, uri)
    drop_dataset(store)

    def looks_unneeded(session: Session, storage_uri: str) -> list[str]:
        return [uri]

    add_dataset(store, uri)  # after the collector has looked, so to say
    monkeypatch.setattr("coordinator.collector._garbage", looks_unneeded)
    await collector.round()
    assert files.there(uri)


async def test_a_base_stays_until_the_last_adapter_of_it_is_deleted(store: Store, collector: Collector, files: Bytes) -> None:
    base, adapter = files.put("bases", "4" * 64), files.put("jobs", "ft1", "run-1", "model")
    add_model(store, base)
    add_model(store, adapter, "tuned", base_uri=base)
    drop_model(store)
    await collector.round()
    assert files.there(base)
    drop_model(store, "tuned")
    await collector.round()
    assert files.gone(base)
    assert files.gone(adapter)


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_what_a_job_reads_that_has_not_ended_is_not_deleted(store: Store, files: Bytes, kind: str) -> None:
    uri = files.put("datasets" if kind == "dataset" else "bases", "5" * 64)
    add, drop = (add_dataset, drop_dataset) if kind == "dataset" else (add_model, drop_model)
    add(store, uri)
    job = read_by(store, kind, uri)
    with pytest.raises(FailedPrecondition) as caught:
        drop(store)
    assert f"in use by job {job.job_id}" in caught.value.message
    ended(store, job)
    drop(store)


def test_the_base_of_an_adapter_that_a_job_reads_is_not_deleted(store: Store, files: Bytes) -> None:
    base = files.put("bases", "6" * 64)
    add_model(store, base)
    add_model(store, files.put("jobs", "ft1", "run-1", "model"), "tuned", base_uri=base)
    artifact = store.read_now(lambda session: registered(registry.find_model(session, "default", VersionRef("tuned", "1"))))
    store.write_now(lambda session: create.insert(session, *asked("model", artifact)))
    with pytest.raises(FailedPrecondition):
        drop_model(store)


def test_what_an_endpoint_serves_is_not_deleted(store: Store, files: Bytes) -> None:
    add_model(store, files.put("bases", "7" * 64))
    moment = tables.now()
    artifacts = {"own@1": {"name": "own@1", "uri": files.uri("bases", "7" * 64)}}
    endpoint = tables.Endpoint(
        project_id="default",
        id="desk",
        state="ENDPOINT_STATE_READY",
        desired={"endpoint": {}, "artifacts": artifacts},
        create_time=moment,
        update_time=moment,
    )
    store.write_now(lambda session: session.add(endpoint))
    with pytest.raises(FailedPrecondition) as caught:
        drop_model(store)
    assert caught.value.message == "own@1 is in use by endpoint desk, so it cannot be deleted yet"


@pytest.mark.parametrize("word", ["latest", "champion"])
def test_a_version_is_deleted_by_its_number_only(store: Store, files: Bytes, word: str) -> None:
    add_model(store, files.put("bases", "8" * 64))
    with pytest.raises(InvalidArgument):
        drop_model(store, version=word)


def test_the_aliases_of_a_version_go_with_it(store: Store, files: Bytes) -> None:
    add_model(store, files.put("bases", "8" * 64))

    def promote(session: Session) -> None:
        registry.set_alias(session, registry.find_model(session, "default", VersionRef("own", "1")), "champion")

    store.write_now(promote)
    drop_model(store)
    assert store.read_now(lambda session: session.exec(select(tables.ModelAlias)).all()) == []


@pytest.mark.parametrize("way", ["alone", "together"])
def test_a_job_that_was_being_created_while_what_it_reads_was_deleted_is_refused(store: Store, files: Bytes, way: str) -> None:
    uri = files.put("datasets", "9" * 64)
    add_dataset(store, uri)
    artifact = agent_pb2.Artifact(name="rows@1", kind="dataset", uri=uri, content_hash="m")
    request, job, resolved = asked("dataset", artifact)
    drop_dataset(store)

    def work(session: Session) -> object:
        if way == "alone":
            return create.insert(session, request, job, resolved)
        return submit.record(session, [submit.Submission.of(request, job, resolved)])[0]

    if way == "alone":
        with pytest.raises(NotFound):
            store.write_now(work)
    else:
        assert isinstance(store.write_now(work), NotFound)
    assert store.read_now(lambda session: session.exec(select(tables.Job)).all()) == []


async def test_models_by_content_wait_for_jobs_that_bring_one_in(store: Store, collector: Collector, files: Bytes) -> None:
    uri = files.put("bases", "a" * 64)
    add_model(store, uri)
    hub = agent_pb2.Artifact(name="hf:org/name", kind="hub", model_kind="full")
    job = store.write_now(lambda session: create.insert(session, *asked("base", hub)))
    drop_model(store)
    await collector.round()
    assert files.there(uri)
    ended(store, job)
    await collector.round()
    assert files.gone(uri)


async def test_nobody_publishes_where_files_are_being_deleted(
    store: Store, collector: Collector, files: Bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = files.put("bases", "b" * 64)
    add_model(store, uri)
    drop_model(store)
    deleting, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(work: Callable[..., None], *arguments: Any) -> None:
        deleting.set()
        await go_on.wait()
        work(*arguments)

    monkeypatch.setattr(collector, "_outside", slowly)
    round_ = asyncio.create_task(collector.round())
    await deleting.wait()
    hub = agent_pb2.Artifact(name="hf:org/name", kind="hub", model_kind="full")
    with pytest.raises(Unavailable):
        await store.write(lambda session: create.insert(session, *asked("base", hub)))
    monkeypatch.setattr(garbage, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(Unavailable):
        async with publishing(store, "bases"):
            pass
    async with publishing(store, "datasets"):
        pass
    go_on.set()
    await round_
    async with publishing(store, "bases"):
        pass
    assert files.gone(uri)


async def test_what_is_being_published_is_not_deleted_unless_its_publisher_died(
    store: Store, collector: Collector, files: Bytes
) -> None:
    uri = files.put("datasets", "c" * 64)
    add_dataset(store, uri)
    async with publishing(store, "datasets"):
        drop_dataset(store)
        await collector.round()
        assert files.there(uri)

        def grow_old(session: Session) -> None:
            for hold in session.exec(select(tables.Hold)).all():
                hold.expire_time -= HOLD_TIME

        store.write_now(grow_old)
        await collector.round()
        assert files.gone(uri)


async def test_what_lies_outside_of_the_storage_is_left_alone(store: Store, collector: Collector, tmp_path: Path) -> None:
    elsewhere = Bytes((tmp_path / "elsewhere").as_uri())
    uri = elsewhere.put("precious")
    add_dataset(store, uri)
    drop_dataset(store)
    await collector.round()
    assert elsewhere.there(uri)
    assert store.read_now(lambda session: session.exec(select(tables.Garbage)).all()) == []
