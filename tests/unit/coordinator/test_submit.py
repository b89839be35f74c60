"""Jobs that are recorded together are what they would have been one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlmodel import Session, select

from common.errors import AlreadyExists
from coordinator import messages
from coordinator.jobs import create, submit
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import fill_in
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import job_pb2, training_pb2

DIFFERENT = ("uid", "job_id", "create_time", "update_time", "request_id")


def submission(request_id: str = "", workers: int = 1) -> tuple[create.Request, job_pb2.Job]:
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="t@1", method="full", workers=workers, output_model="m")
    job = job_pb2.Job(finetune=spec, display_name="x", labels={"team": "search"}, priority=3)
    job.time_limit.seconds = 60
    job.hang_timeout.seconds = 600
    job.budget.gpu_seconds = 3600
    job.retry.max_retries = 5
    job.placement.gpu_types.append("H100")
    request = create.request_of("default", "tester", job_pb2.CreateJobRequest(job=job, request_id=request_id))
    fill_in(job, cluster_has_gpus=False)
    return request, job


def together(*wanted: tuple[create.Request, job_pb2.Job]) -> Callable[[Session], list[tables.Job | AlreadyExists]]:
    made = [submit.Submission.of(request, job, Resolved()) for request, job in wanted]
    return lambda session: list(submit.record(session, made))


def rows(store: Store) -> list[tables.Job]:
    return list(store.read_now(lambda session: session.exec(select(tables.Job)).all()))


def events(store: Store) -> list[tables.JobEvent]:
    return list(store.read_now(lambda session: session.exec(select(tables.JobEvent)).all()))


def test_every_column_is_as_if_recorded_alone(store: Store) -> None:
    request, job = submission("alone")
    alone = store.write_now(lambda session: create.insert(session, request, job, Resolved()))
    (beside,) = store.write_now(together(submission("beside")))
    assert not isinstance(beside, AlreadyExists)
    by_uid = {row.uid: row for row in rows(store)}
    first, second = by_uid[alone.uid], by_uid[beside.uid]
    kept = [name for name in tables.Job.model_fields if name not in DIFFERENT]
    assert {name: getattr(second, name) for name in kept} == {name: getattr(first, name) for name in kept}
    one, two = events(store)
    assert (one.sequence, one.type, one.state, one.message) == (two.sequence, two.type, two.state, two.message)


def test_the_answer_is_what_is_read_later(store: Store) -> None:
    (answer,) = store.write_now(together(submission("r1")))
    assert not isinstance(answer, AlreadyExists)
    read = messages.job(rows(store)[0])
    assert messages.job(answer) == read
    asked = submission("r1")[1]
    asked.name, asked.state, asked.result.model_version = "set by the caller", job_pb2.JOB_STATE_FAILED, "m@9"
    assert messages.new_job(answer, asked) == read


def test_many_are_recorded_each_with_its_event(store: Store) -> None:
    made = store.write_now(together(*(submission(f"r{number}") for number in range(30)), submission(), submission()))
    uids = [one.uid for one in made if not isinstance(one, AlreadyExists)]
    assert len(set(uids)) == 32
    assert sorted(event.job_uid for event in events(store)) == sorted(uids)


@pytest.mark.parametrize("apart", [False, True])
def test_the_same_request_makes_one_job(store: Store, apart: bool) -> None:
    asked = [submission("r1"), submission("other"), submission("r1"), submission("r1", workers=2)]
    if apart:
        store.write_now(together(asked[0]))
    first, other, again, reused = store.write_now(together(*asked))
    assert not isinstance(first, AlreadyExists)
    assert not isinstance(again, AlreadyExists)
    assert first.uid == again.uid
    assert isinstance(reused, AlreadyExists)
    assert "differs in job.finetune.workers" in str(reused)
    assert {row.uid for row in rows(store)} == {first.uid, other.uid}  # type: ignore[union-attr]
    assert len(events(store)) == 2
