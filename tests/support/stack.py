"""A whole stack, started and stopped as a user would: by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from luthier.client import Client
from luthier.v1 import endpoint_pb2, job_pb2

LUTHIER = str(Path(sys.executable).parent / "luthier")
TERMINAL = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


def plain_environment(**more: str) -> dict[str, str]:
    """The environment without anything that would lead to another stack or cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LUTHIER_", "RAY_"))}
    return kept | {"NO_COLOR": "1", "COLUMNS": "200"} | more


class Stack:
    """`luthier up` in a home of its own."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.environment = plain_environment(LUTHIER_HOME=str(home), **environment)
        self.status: dict[str, Any] = {}

    def cli(
        self, *arguments: str, check: bool = True, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `luthier …` on this home."""
        done = subprocess.run(
            [LUTHIER, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"luthier {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        return done

    def json(self, *arguments: str) -> Any:
        """Run `luthier … --output json` and read its one document."""
        return json.loads(self.cli(*arguments, "--output", "json").stdout)

    def up(self, *arguments: str) -> Stack:
        self.cli("up", *arguments)
        self.status = self.json("status")
        return self

    def down(self) -> None:
        self.cli("down")

    @property
    def token(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    @property
    def server(self) -> str:
        return str(self.status["coordinator"]["address"])

    @property
    def gateway_url(self) -> str:
        return str(self.status["gateway"]["url"])

    def client(self) -> Client:
        return Client(self.server, token=self.token)

    def coordinator_pid(self) -> int:
        return int(self.json("status")["coordinator"]["pid"])

    def processes(self) -> list[psutil.Process]:
        """Every live process that this stack started, by the mark in its environment."""
        return list(marked(str(self.home)))


def marked(home: str) -> Iterator[psutil.Process]:
    """Live processes whose environment carries the mark of a home."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("LUTHIER_STACK") == home and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def wait_for(client: Client, name: str, states: tuple[int, ...] = TERMINAL, seconds: float = 300.0, step: int = 0) -> job_pb2.Job:
    """Wait until a job is in one of the states (and, where given, has trained that many steps)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = client.jobs.GetJob(job_pb2.GetJobRequest(name=name)).job
        if job.state in states and job.progress.step >= step:
            return job
        if job.state in TERMINAL:
            break
        time.sleep(0.3)
    raise AssertionError(
        f"{name} is {job_pb2.JobState.Name(job.state)}, not as expected after {seconds} s: {explain(client, job)}"
    )


def wait_for_endpoint(client: Client, name: str, state: str = "READY", seconds: float = 180.0) -> endpoint_pb2.Endpoint:
    """Wait until an endpoint is in a state."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        endpoint = client.endpoints.GetEndpoint(endpoint_pb2.GetEndpointRequest(name=name)).endpoint
        if endpoint_pb2.EndpointState.Name(endpoint.state) == f"ENDPOINT_STATE_{state}":
            return endpoint
        time.sleep(0.5)
    raise AssertionError(f"{name} is not {state} after {seconds} s: {endpoint}")


def explain(client: Client, job: job_pb2.Job) -> str:
    """What a person would look at next."""
    lines = [
        f"{line.source} {line.level}: {line.message}"
        for part in client.jobs.TailLogs(job_pb2.TailLogsRequest(name=job.name))
        for line in part.lines
    ]
    return f"{job.error}\nqueue: {job.queue}\nprogress: {job.progress}\n" + "\n".join(lines[-30:])


def spec(document: Mapping[str, Any]) -> job_pb2.Job:
    """A job from the JSON form of the contract."""
    from google.protobuf.json_format import ParseDict

    return ParseDict(dict(document), job_pb2.Job())
