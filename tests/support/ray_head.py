"""A Ray head of a test's own, started as `luthier up` starts one: on loopback, with a token, on ports of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cli.stack import processes, ray_head
from cli.stack.ports import ray_block
from cli.stack.state import RayState


@contextmanager
def running(num_cpus: int) -> Iterator[RayState]:
    """Run a head with so many logical CPUs. At the end nothing of it is left."""
    # Not below pytest's own folders: Ray's socket paths have to stay short.
    home = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
    try:
        with ray_block() as ports:
            state = ray_head.describe(home, num_cpus, ports)
            process = ray_head.start(state, home)
            ray_head.wait_until_up(state, process, home, timeout=300)
        yield state
    finally:
        processes.reap(home, folders=[str(home)])
        shutil.rmtree(home, ignore_errors=True)


def kill(state: RayState) -> None:
    """SIGKILL the head and all that runs under it, as a machine that loses its power."""
    home = home_of(state)
    while members := processes.members(home, folders=[str(home)]):
        for process in members:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(members, timeout=10)


def start_again(state: RayState) -> None:
    """Start a head at the same addresses, which knows nothing of the one before."""
    home = home_of(state)
    process = ray_head.start(state, home)
    ray_head.wait_until_up(state, process, home, timeout=300)


def home_of(state: RayState) -> Path:
    """The folder that a head of this module was started in."""
    return Path(state.token_path).parents[1]
