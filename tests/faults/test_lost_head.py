"""Ray's head is killed with all that runs on it, and another one is started in its place, which knows nothing of the first."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.stack.state import RayState
from luthier.client import Client
from luthier.v1 import job_pb2, training_pb2
from tests.support import kill_checks, ray_head, tiny_agent
from tests.support.coordinator_process import CoordinatorProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CPUS = 2
"""A job holds 1.25 of them, so that a second one waits."""


@pytest.fixture
def ray() -> Iterator[RayState]:
    with ray_head.running(CPUS) as state:
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the agents find their plans and leave their traces."""
    folder = tmp_path / "seen"
    folder.mkdir()
    return folder


@pytest.fixture
def coordinator(ray: RayState, tmp_path: Path, folder: Path) -> Iterator[CoordinatorProcess]:
    program = tmp_path / "agent"
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    words = [sys.executable, str(Path(tiny_agent.__file__)), str(folder)]
    program.write_text(f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(path)}\nexec {shlex.join(words)}\n")
    program.chmod(0o755)
    settings = {"ray_address": ray.address, "ray_token_path": ray.token_path, "agent_python": str(program)}
    process = CoordinatorProcess(tmp_path / "home", **settings).start()
    yield process
    process.kill()


def submit(client: Client, folder: Path, acts: list[str]) -> job_pb2.Job:
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full")
    job = client.create_job(job_pb2.Job(finetune=spec))
    (folder / f"{job.uid}.plan").write_text(json.dumps({"acts": acts, "lingers": 0.0}))
    return job


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.1)


def test_what_ran_is_tried_again_and_what_waited_starts(
    ray: RayState, coordinator: CoordinatorProcess, folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"row number {number},{'ab'[number % 2]}\n" for number in range(20)))
    with coordinator.client() as client:
        client.upload_dataset(rows, "rows")
        running = submit(client, folder, ["be deaf", "succeed"])
        until(lambda: client.get_job(running.name).progress.phase == "training")
        waiting = submit(client, folder, ["succeed"])
        until(lambda: client.get_job(waiting.name).queue.position == 1)

        ray_head.kill(ray)
        until(lambda: "the Ray cluster to answer" in client.get_job(waiting.name).queue.waiting_for, 30)
        assert client.get_job(running.name).state == job_pb2.JOB_STATE_RUNNING  # nobody knows yet
        ray_head.start_again(ray)

        events = list(client.watch(running.name))
        (ended,) = {item.job.state for item in events[-1:]}
        assert ended == job_pb2.JOB_STATE_SUCCEEDED
        until(lambda: client.get_job(waiting.name).state == job_pb2.JOB_STATE_SUCCEEDED)
        tried, begun = client.get_job(running.name), client.get_job(waiting.name)
    assert (tried.run, tried.attempt) == (2, 1)
    assert (begun.run, begun.attempt) == (1, 0)
    told = [item.event.message for item in events if item.HasField("event")]
    assert any("no longer knows this run" in message for message in told)
    # The new head was given each of them once.
    assert sorted(kill_checks.ray_jobs(ray)) == sorted([f"luthier-{tried.uid}-r2", f"luthier-{begun.uid}-r1"])
