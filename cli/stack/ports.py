"""Ports: which are free, and a block of them for Ray that no other stack has its eye on."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from cli.failures import Failure
from cli.stack.state import read_state

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


def choose(
    what: str, flag: str, given: int | None, default: int, home: Path, reserved: ExitStack, taken: Sequence[int] = ()
) -> int:
    """The port for `what`: the given one, or where none was given the default, or where that is taken one just above it.

    A port that another home's stack will listen on later (a gateway starts with its first endpoint) counts as taken. The
    port is reserved for `home` as long as `reserved` lasts, so that two stacks that start at once do not agree on one.
    """
    # Above the default chance decides, which keeps stacks that start at once from trying the same ones in a row.
    candidates = [given] if given else [default, *random.sample(range(default + 1, default + 1 + NEARBY), NEARBY)]
    for port in candidates:
        if port in taken or not is_free(port):
            continue
        if reserved.enter_context(_reservation(f"p{port}")) and _claim(port, home):
            return port
    if given:
        raise Failure(f"port {given} for the {what} is in use; stop what listens there or choose another with {flag}")
    raise Failure(f"every port from {default} to {default + NEARBY} is in use; stop what listens there, or name one with {flag}")


@contextmanager
def _reservation(name: str) -> Iterator[bool]:
    """Hold a name against other commands of this user. False where another one holds it."""
    descriptor = os.open(_folder() / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"luthier-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _claim(port: int, home: Path) -> bool:
    """Write down that a port is this home's. False where it is that of another home's running stack."""
    note = _folder() / f"p{port}"
    other = note.read_text(encoding="utf-8").strip()
    if other and other != str(home):
        with suppress(Failure):
            state = read_state(Path(other))
            if state is not None and port in (state.port, state.gateway_port) and state.alive:
                return False
    note.write_text(str(home), encoding="utf-8")
    return True


@contextmanager
def ray_block() -> Iterator[dict[str, int]]:
    """Free ports for one Ray: one for each of `RAY_PORTS`, and `min_worker` to `max_worker`.

    The block is reserved for as long as the context lasts, which should be until Ray listens.
    """
    for start in random.sample(BLOCKS, len(BLOCKS)):
        with _reservation(f"block-{start}") as held:
            if held and all(is_free(port) for port in range(start, start + BLOCK)):
                named = {name: start + offset for offset, name in enumerate(RAY_PORTS)}
                yield named | {"min_worker": start + FIRST_WORKER, "max_worker": start + BLOCK - 1}
                return
    raise Failure(f"no block of {BLOCK} free ports between {BLOCKS.start} and {BLOCKS.stop} for Ray; stop what holds them")
