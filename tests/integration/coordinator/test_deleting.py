"""Deleting through the API: what is in use is refused by name, the rest is gone from the storage soon after."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.client import Client, FailedPrecondition, NotFound
from luthier.v1.job_pb2 import JOB_STATE_CANCELLED, Job
from luthier.v1.training_pb2 import FinetuneSpec
from tests.support.coordinator_process import CoordinatorProcess


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not come to pass"
        time.sleep(0.05)


def test_rows_in_use_stay_and_go_once_they_are_not(coordinator: CoordinatorProcess, client: Client, rows: Path) -> None:
    version = client.upload_dataset(rows, "fleeting")
    folder = coordinator.home / "storage" / "datasets" / version.content_hash
    assert (folder / "train.parquet").exists()
    job = client.create_job(Job(finetune=FinetuneSpec(base="builtin:tiny", dataset="fleeting", method="full")))
    short = job.name.rpartition("/")[2]
    with pytest.raises(FailedPrecondition) as caught:
        client.delete_dataset_version("fleeting@1")
    assert caught.value.message == f"fleeting@1 is in use by job {short}, so it cannot be deleted yet"
    with pytest.raises(FailedPrecondition) as caught:
        client.delete_job(job.name)
    assert "cancel it first" in caught.value.message
    assert client.cancel_job(job.name).state == JOB_STATE_CANCELLED
    client.delete_dataset_version("fleeting@1")
    with pytest.raises(NotFound):
        client.get_dataset_version("fleeting@1")
    assert "fleeting" not in [dataset.name.rpartition("/")[2] for dataset in client.list_datasets()]
    eventually(lambda: not folder.exists())
    client.delete_job(job.name)
    for call in (client.get_job, client.delete_job):
        with pytest.raises(NotFound):
            call(job.name)
    again = client.upload_dataset(rows, "fleeting")
    assert again.name.endswith("/versions/2")
    assert (folder / "train.parquet").exists()
