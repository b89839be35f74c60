"""Jobs that follow jobs, and jobs that are changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from sqlmodel import select

from common.errors import Aborted, FailedPrecondition, InvalidArgument
from coordinator.jobs.change import Change
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.states import EndReason
from coordinator.jobs.wishes import wish_end
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import job_pb2
from tests.support.job_runs import Agent, now_of, set_columns

NewJob = Callable[..., tables.Job]


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
