"""Ports: which are free, and a block of them for Ray that no other stack has its eye on."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from cli.failures import Failure

LOOPBACK = "127.0.0.1"
BLOCK = 256
NEARBY = 400
# Below the range from which systems hand out ports by themselves (32768 on Linux, 49152 on macOS).
BLOCKS = range(10_240, 32_256, BLOCK)

RAY_PORTS: tuple[str, ...] = (
    "gcs",
    "dashboard",
    "dashboard_agent",
    "dashboard_agent_grpc",
    "node_manager",
    "object_manager",
    "ray_client",
    "metrics_export",
    "runtime_env_agent",
    "autoscaler_metrics",
    "dashboard_metrics",
    "haproxy_stats",
    "haproxy_metrics",
)
FIRST_WORKER = 32


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server can listen on the port. Connections of an earlier server that linger do not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def near(default: int, taken: Sequence[int] = ()) -> int:
    """A free port just above `default`; which one is left to chance, so that two stacks that start at once seldom agree."""
    for port in random.sample(range(default + 1, default + 1 + NEARBY), NEARBY):
        if port not in taken and is_free(port):
            return port
    raise Failure(f"every port from {default} to {default + NEARBY} is in use; stop what listens there")


def choose(what: str, flag: str, given: int | None, default: int, taken: Sequence[int] = ()) -> int:
    """The port for `what`: the given one, or where none was given the default, or where that is taken a free one."""
    if given:
        if given in taken or not is_free(given):
            raise Failure(f"port {given} for the {what} is in use; stop what listens there or choose another with {flag}")
        return given
    return default if default not in taken and is_free(default) else near(default, taken)


@contextmanager
def ray_block() -> Iterator[dict[str, int]]:
    """Free ports for one Ray: one for each of `RAY_PORTS`, and `min_worker` to `max_worker`.

    The block is reserved for as long as the context lasts, which should be until Ray listens.
    """
    folder = Path(tempfile.gettempdir()) / f"luthier-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    starts = random.sample(BLOCKS, len(BLOCKS))
    for start in starts:
        descriptor = os.open(folder / str(start), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                flock(descriptor, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                continue
            if all(is_free(port) for port in range(start, start + BLOCK)):
                named = {name: start + offset for offset, name in enumerate(RAY_PORTS)}
                yield named | {"min_worker": start + FIRST_WORKER, "max_worker": start + BLOCK - 1}
                return
        finally:
            os.close(descriptor)
    raise Failure(f"no block of {BLOCK} free ports between {BLOCKS.start} and {BLOCKS.stop} for Ray; stop what holds them")
