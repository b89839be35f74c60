"""`<home>/stack.json`: what runs for a home, so that the next command finds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any, Self

import psutil

from cli.failures import Failure


@dataclass(frozen=True)
class ProcessRef:
    """A process that cannot be taken for a later one with the same number."""

    pid: int
    create_time: float

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has this number now."""
        return cls(pid, psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """The process while it runs, else None."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.create_time) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


@dataclass(frozen=True)
class RayState:
    """The Ray cluster of a stack."""

    address: str
    """URL of the dashboard, which is also that of the job API."""
    token_path: str
    gcs: str = ""
    """host:port of its control store; empty for a cluster that was joined."""
    temp_dir: str = ""
    num_cpus: int = 0
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether the stack started it, and so has to stop it."""
        return bool(self.gcs)


@dataclass(frozen=True)
class StackState:
    """Addresses and processes of a stack."""

    server: str
    gateway_url: str
    ray: RayState
    storage_uri: str = ""
    coordinator_process: ProcessRef | None = None
    ray_process: ProcessRef | None = None

    @property
    def port(self) -> int:
        """Port of the coordinator."""
        return int(self.server.rpartition(":")[2])

    @property
    def gateway_port(self) -> int:
        """Port of the gateway."""
        return int(self.gateway_url.removesuffix("/v1").rpartition(":")[2])

    @property
    def alive(self) -> bool:
        """Whether any of its processes runs."""
        return any(ref is not None and ref.process() is not None for ref in (self.coordinator_process, self.ray_process))

    def with_processes(self, coordinator: ProcessRef | None, ray: ProcessRef | None) -> StackState:
        """The same stack with other processes."""
        return replace(self, coordinator_process=coordinator, ray_process=ray)


def state_path(home: Path) -> Path:
    """Where the state of a home lies."""
    return home / "stack.json"


def read_state(home: Path) -> StackState | None:
    """The stack of a home; None where there is none."""
    path = state_path(home)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        processes = {name: ProcessRef(**value) if value else None for name, value in content.pop("processes", {}).items()}
        return StackState(
            server=content["server"],
            gateway_url=content["gateway_url"],
            ray=RayState(**content["ray"]),
            storage_uri=content.get("storage_uri", ""),
            coordinator_process=processes.get("coordinator"),
            ray_process=processes.get("ray"),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{path} cannot be read ({error}); stop what it names by hand if it still runs, and remove it") from error


def write_state(home: Path, state: StackState) -> None:
    """Put the state in place in one step."""
    content = {
        "server": state.server,
        "gateway_url": state.gateway_url,
        "ray": asdict(state.ray),
        "storage_uri": state.storage_uri,
        "processes": {
            "coordinator": asdict(state.coordinator_process) if state.coordinator_process else None,
            "ray": asdict(state.ray_process) if state.ray_process else None,
        },
    }
    path = state_path(home)
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Let one command at a time start or stop a home's stack."""
    descriptor = os.open(home / "stack.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise Failure(f"another `luthier up` or `down` is at work in {home}; try again when it is done") from error
        yield
    finally:
        os.close(descriptor)
