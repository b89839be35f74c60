"""Killed: the coordinator, an agent, a rank; and jobs that are cancelled or run too long. Nothing is lost, nothing stays."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from luthier.client import Client
from luthier.v1 import dataset_pb2, job_pb2
from tests.support.stack import Stack, spec, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RUNNING = (job_pb2.JOB_STATE_RUNNING,)
DOWN_SECONDS = 20.0
KEPT_BY_RAY = "_AutoscalingCoordinatorActor"


def training(steps: int, workers: int = 1, save_every: int = 0, cpus: float = 1, **more: object) -> job_pb2.Job:
    return spec(
        {
            "finetune": {
                "base": "builtin:tiny",
                "dataset": "colours",
                "method": "full",
                "workers": workers,
                "worker_resources": {"cpus": cpus},
                "hyperparameters": {"max_steps": steps, "batch_size": 8},
                "checkpoints": {"every_steps": save_every},
                "evaluation": {"disabled": True},
            },
            **more,
        }
    )


def processes_of(stack: Stack, job: job_pb2.Job) -> list[psutil.Process]:
    """The driver of a job and the workers of its ranks, without what Ray Train starts once for the whole cluster and keeps."""
    found = []
    for process in stack.processes():
        try:
            if process.environ().get("LUTHIER_JOB_UID") == job.uid and KEPT_BY_RAY not in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def driver_of(stack: Stack, job: job_pb2.Job) -> psutil.Process:
    return next(process for process in processes_of(stack, job) if "agents" in process.cmdline())


def wait_until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.5)
    raise AssertionError("not within the time")


@pytest.fixture
def prepared(stack: Stack, small_dataset: dataset_pb2.DatasetVersion) -> Iterator[Stack]:
    yield stack
    wait_until(lambda: stack.json("status")["ray"]["cpus_free"] == stack.json("status")["ray"]["cpus"])


def test_a_coordinator_killed_in_training_finds_the_same_run_again(prepared: Stack, client: Client) -> None:
    job = client.create_job(training(steps=150))
    before = wait_for(client, job.name, RUNNING, step=5)
    watch = client.watch(job.name)
    seen = [next(watch)]
    driver = driver_of(prepared, job).pid

    os.kill(prepared.coordinator_pid(), signal.SIGKILL)
    time.sleep(DOWN_SECONDS)
    assert psutil.pid_exists(driver)
    prepared.up()

    # The same watch goes on over the gap, and tells every number once.
    seen += list(watch)
    numbers = [item.event.sequence for item in seen if item.WhichOneof("item") == "event"]
    assert numbers == list(range(1, len(numbers) + 1))
    done = wait_for(client, job.name)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
    assert (done.run, done.attempt, before.run) == (1, 0, 1)
    ends = [item for item in seen if item.WhichOneof("item") == "event" and item.event.state == job_pb2.JOB_STATE_SUCCEEDED]
    assert len(ends) == 1
    # What was reported while it was away arrived after all: no step is missing from the curve.
    points = client.jobs.ListJobMetrics(job_pb2.ListJobMetricsRequest(parent=job.name)).points
    steps = sorted({point.step for point in points if "loss" in point.values})
    assert steps[-1] == 150
    gaps = {later - earlier for earlier, later in itertools.pairwise(steps)}
    assert len(gaps) == 1, f"steps are missing: {steps}"


def test_an_agent_that_is_killed_fails_its_job_and_frees_its_place(prepared: Stack, client: Client) -> None:
    job = client.create_job(training(steps=5000, retry={"max_retries": 0}))
    wait_for(client, job.name, RUNNING, step=1)
    driver_of(prepared, job).kill()
    done = wait_for(client, job.name)
    assert (done.state, done.end_reason) == (job_pb2.JOB_STATE_FAILED, job_pb2.END_REASON_AGENT_LOST)
    assert done.error.code == "AGENT_LOST"
    wait_until(lambda: not processes_of(prepared, job))


def test_a_killed_rank_is_named_and_the_next_run_goes_on_from_the_last_checkpoint(prepared: Stack, client: Client) -> None:
    job = client.create_job(training(steps=60, workers=2, save_every=10))
    wait_for(client, job.name, RUNNING, step=15)
    driver = driver_of(prepared, job).pid
    ranks = [
        process
        for process in processes_of(prepared, job)
        if process.pid != driver and "RayTrainWorker" in process.name() + " ".join(process.cmdline())
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    done = wait_for(client, job.name)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
    assert (done.run, done.attempt) == (2, 1)
    first, second = done.runs
    assert first.error.code == "WORKER_LOST"
    assert first.error.source in ("rank-0", "rank-1")
    assert "died" in first.error.message
    assert first.end_reason == job_pb2.END_REASON_NODE_LOST
    # At most one checkpoint interval is lost, and no step is missing from the curve.
    assert second.resumed_step >= 10
    points = client.jobs.ListJobMetrics(job_pb2.ListJobMetricsRequest(parent=job.name)).points
    assert min(point.step for point in points if point.run == 2) == second.resumed_step + 1
    assert {point.step for point in points if "loss" in point.values} == set(range(1, 61))


def test_a_more_urgent_job_takes_the_place_of_one_that_saves_and_comes_back(prepared: Stack, client: Client) -> None:
    # Either needs nearly the whole cluster. What several ranks save, and that they stop at one step, is held outside of Ray.
    job = client.create_job(training(steps=80, cpus=3))
    wait_for(client, job.name, RUNNING, step=5)
    urgent = client.create_job(training(steps=3, cpus=3, priority=50))
    done = wait_for(client, urgent.name)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
    done = wait_for(client, job.name)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
    assert (done.run, done.attempt) == (2, 0)
    first, second = done.runs
    assert first.end_reason == job_pb2.END_REASON_PREEMPTED
    points = client.jobs.ListJobMetrics(job_pb2.ListJobMetricsRequest(parent=job.name)).points
    steps = [point.step for point in points if "loss" in point.values]
    # It saved at the very step at which it stopped: none is missing, none was done twice.
    assert sorted(steps) == list(range(1, 81))
    assert second.resumed_step == max(point.step for point in points if point.run == 1)


def test_a_running_job_is_cancelled_and_its_processes_end(prepared: Stack, client: Client) -> None:
    job = client.create_job(training(steps=5000))
    wait_for(client, job.name, RUNNING, step=1)
    asked = client.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name)).job
    assert asked.cancel_requested
    done = wait_for(client, job.name, seconds=60)
    assert (done.state, done.end_reason) == (job_pb2.JOB_STATE_CANCELLED, job_pb2.END_REASON_USER)
    wait_until(lambda: not processes_of(prepared, job))


@pytest.mark.chaos
def test_a_job_over_its_time_limit_is_stopped(prepared: Stack, client: Client) -> None:
    job = client.create_job(training(steps=100_000, time_limit="25s"))
    done = wait_for(client, job.name, seconds=120)
    assert (done.state, done.end_reason) == (job_pb2.JOB_STATE_FAILED, job_pb2.END_REASON_TIME_LIMIT)
    assert "time limit of 25 s" in done.error.message
