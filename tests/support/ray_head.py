"""A Ray head of a test's own, started as `luthier up` starts one: on loopback, with a token, on ports of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
