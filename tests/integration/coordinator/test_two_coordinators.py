"""Two coordinators on one PostgreSQL: both answer, one leads, and the other takes over when it is killed or hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luthier.client import Client
from luthier.v1 import admin_pb2, job_pb2, training_pb2
from tests.support.coordinator_process import TOKEN, CoordinatorProcess, free_port
from tests.support.postgres import Postgres

pytestmark = pytest.mark.postgres
TAKEOVER_SECONDS = 10.0

Fresh = Callable[..., CoordinatorProcess]
Pair = tuple[CoordinatorProcess, CoordinatorProcess]


@pytest.fixture
def pair(fresh: Fresh, postgres: Postgres, tmp_path: Path) -> Iterator[Pair]:
    """A leader and its follower, on an empty database that both may find first. Their storage is one, their homes are not."""
    name = postgres.database()
    # An address at which no Ray answers: what is decided there waits for it.
    settings = {"store_url": postgres.url(name), "ray_address": f"http://127.0.0.1:{free_port()}"}
    settings["storage_uri"] = (tmp_path / "storage").as_uri()
    processes = [fresh(**settings).start(wait=False) for _ in range(2)]
    for process in processes:
        process.wait_until_serving()
    first = next(process for process in processes if leads(process, TAKEOVER_SECONDS, wait_for=None))
    yield first, next(process for process in processes if process is not first)
    for process in processes:
        if process.process is not None and process.process.poll() is None:
            os.kill(process.process.pid, signal.SIGCONT)
        process.kill()
    postgres.drop(name)


def status(process: CoordinatorProcess) -> admin_pb2.CoordinatorStatus:
    with process.client() as client:
        return client.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=20).coordinator


def leads(process: CoordinatorProcess, seconds: float, wait_for: bool | None = True) -> bool:
    """Whether it leads; with `wait_for`, once it does or does not, or when the time is up. Without, once anybody leads."""
    deadline = time.monotonic() + seconds
    while True:
        told = status(process)
        if (wait_for is None and told.leader) or told.leads == wait_for or time.monotonic() > deadline:
            return told.leads
        time.sleep(0.1)


def said(process: CoordinatorProcess, words: str, seconds: float = 5.0) -> bool:
    """Whether its log says so within the time."""
    deadline = time.monotonic() + seconds
    while words not in process.log():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_both_answer_and_one_leads(pair: Pair, rows: Path) -> None:
    first, second = pair
    assert (status(first).leads, status(second).leads) == (True, False)
    assert status(second).leader == first.address
    # What is asked of one is known to the other, and done by the leader.
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full")
    with second.client() as following, first.client() as leading:
        following.upload_dataset(rows, "rows")
        job = following.create_job(job_pb2.Job(finetune=spec))
        assert leading.jobs.GetJob(job_pb2.GetJobRequest(name=job.name)).job.state == job_pb2.JOB_STATE_QUEUED
        leading.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
        ended = list(following.watch(job.name))[-1].job
    assert ended.state == job_pb2.JOB_STATE_CANCELLED


def test_the_follower_takes_over_when_the_leader_is_killed(pair: Pair) -> None:
    first, second = pair
    first.kill()
    assert leads(second, TAKEOVER_SECONDS)
    assert status(second).epoch == 2
    # Who comes back follows.
    first.start()
    assert not leads(first, 1, wait_for=False)
    assert status(first).leader == second.address


def test_a_leader_that_hangs_is_followed_too_and_leads_no_longer_when_it_wakes_up(pair: Pair) -> None:
    first, second = pair
    assert first.process is not None
    os.kill(first.process.pid, signal.SIGSTOP)
    assert leads(second, TAKEOVER_SECONDS)
    os.kill(first.process.pid, signal.SIGCONT)
    assert not leads(first, TAKEOVER_SECONDS, wait_for=False)
    assert leads(second, 0)
    assert said(first, "leads no longer")


def test_a_client_with_both_addresses_goes_on_with_the_one_that_lives(pair: Pair) -> None:
    first, second = pair
    both = f"ipv4:{first.address},{second.address}"
    with Client(both, TOKEN) as client:
        client.admin.GetStatus(admin_pb2.GetStatusRequest())
        for process in pair:
            process.kill()
            answer = client.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=20, wait_for_ready=True).coordinator
            assert answer.address != process.address
            process.start()
