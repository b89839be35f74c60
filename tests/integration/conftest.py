"""A private Ray for the tests of agents, in this very process: one for all of them, because a process joins one Ray at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

PRIVATE_CPUS = 3


@pytest.fixture(scope="session")
def private_ray() -> Iterator[None]:
    import ray

    folder = tempfile.mkdtemp(prefix="lt-", dir="/tmp")  # short: the paths of Ray's sockets have a limit
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_ADDRESS", "LUTHIER_NODE_HOME", "OMP_NUM_THREADS")}
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(RAY_AUTH_MODE="disabled", LUTHIER_NODE_HOME=f"{folder}/node", OMP_NUM_THREADS="1")
    # As many as two trials of a sweep take at a time, and no more: two drivers and two ranks.
    ray.init(address="local", num_cpus=PRIVATE_CPUS, _temp_dir=folder, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    shutil.rmtree(folder, ignore_errors=True)
