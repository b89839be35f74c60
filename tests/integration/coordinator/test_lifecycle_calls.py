"""Changing, holding and following jobs over the wire, on a coordinator that has no Ray behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.client import Aborted, AlreadyExists, Client, FailedPrecondition, InvalidArgument
from luthier.v1 import dataset_pb2, job_pb2, training_pb2


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dataset_pb2.DatasetVersion:
    path: Path = tmp_path_factory.mktemp("lifecycle") / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(60)))
    return client.upload_dataset(path, "lifecycle-rows")


def finetune(**fields: object) -> job_pb2.Job:
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="lifecycle-rows", method="full")
    return job_pb2.Job(finetune=spec, **fields)  # type: ignore[arg-type]


def test_a_queued_job_is_held_and_let_go(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    job = client.create_job(finetune())
    held = client.pause_job(job.name)
    assert held.pause_requested
    assert held.state == job_pb2.JOB_STATE_QUEUED
    assert held.queue.waiting_for == "somebody to resume it"
    assert not client.resume_job(job.name).pause_requested


def test_what_was_cancelled_is_neither_paused_nor_changed(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    job = client.create_job(finetune())
    client.cancel_job(job.name)
    with pytest.raises(FailedPrecondition, match="CANCELLED"):
        client.pause_job(job.name)
    with pytest.raises(FailedPrecondition, match="CANCELLED"):
        client.update_job(job.name, job_pb2.Job(priority=3), "priority")


def test_a_change_of_what_was_read_earlier_is_aborted(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    job = client.create_job(finetune())
    changed = client.update_job(job.name, job_pb2.Job(priority=3), "priority", etag=job.etag)
    assert changed.priority == 3
    with pytest.raises(Aborted):
        client.update_job(job.name, job_pb2.Job(priority=4), "priority", etag=job.etag)
    with pytest.raises(InvalidArgument) as caught:
        client.update_job(job.name, job_pb2.Job(), "spec")
    assert [violation.field for violation in caught.value.violations] == ["update_mask"]


def test_a_blocked_job_names_what_it_follows_alone_and_in_the_list(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    first = client.create_job(finetune())
    second = client.create_job(finetune(after=[first.name]))
    assert second.state == job_pb2.JOB_STATE_BLOCKED
    shown = client.get_job(second.name)
    assert list(shown.after) == [first.name]
    listed = next(job for job in client.list_jobs() if job.name == second.name)
    for found in (shown, listed):
        assert first.name.rpartition("/")[2] in found.queue.waiting_for
    client.cancel_job(first.name)
    assert client.get_job(second.name).end_reason == job_pb2.END_REASON_DEPENDENCY


def test_the_same_request_with_another_policy_is_another_request(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    first = client.create_job(finetune(retry=job_pb2.RetryPolicy(max_retries=1)), request_id="policy")
    assert client.create_job(finetune(retry=job_pb2.RetryPolicy(max_retries=1)), request_id="policy").name == first.name
    assert first.retry.max_retries == 1
    with pytest.raises(AlreadyExists, match=r"job\.retry"):
        client.create_job(finetune(retry=job_pb2.RetryPolicy(max_retries=2)), request_id="policy")


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"retry": job_pb2.RetryPolicy(max_retries=1000)}, "job.retry.max_retries"),
        ({"budget": job_pb2.Budget(cpu_seconds=float("nan"))}, "job.budget.cpu_seconds"),
        ({"budget": job_pb2.Budget(gpu_seconds=0)}, "job.budget.gpu_seconds"),
        ({"after": ["projects/default/jobs/none"]}, "job.after[0]"),
        ({"after": ["projects/other/jobs/ft-1"]}, "job.after[0]"),
        ({"priority": -101}, "job.priority"),
    ],
)
def test_bad_terms_are_named(client: Client, dataset: dataset_pb2.DatasetVersion, fields: dict[str, object], blamed: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.create_job(finetune(**fields))
    assert [violation.field for violation in caught.value.violations] == [blamed]
