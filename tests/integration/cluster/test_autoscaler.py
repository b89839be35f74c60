"""A cluster that grows and shrinks with the queue, by Ray's own autoscaler; its machines are processes on this one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.v1 import job_pb2
from tests.support import autoscaling_ray
from tests.support.coordinator_process import CoordinatorProcess, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TYPES: dict[str, dict[str, Any]] = {
    "plain": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    "with-h100": {
        "resources": {"CPU": 1, "GPU": 1},
        "labels": {"ray.io/accelerator-type": "H100"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    },
}


def until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_cluster_grows_and_shrinks_with_the_queue(tmp_path: Path) -> None:
    with autoscaling_ray.running(TYPES, idle_minutes=0.05) as ray:
        process = CoordinatorProcess(
            tmp_path / "home",
            ray_address=ray.address,
            ray_token_path=ray.token_path,
            ray_gcs_address=ray.gcs,
            agent_python=sys.executable,
            gateway_port=str(free_port()),
        ).start()
        try:
            with process.client() as client:

                def nodes() -> list[str]:
                    """Types of accelerators of the nodes that are there, the head left out."""
                    found = [node for node in client.status().ray.each_node if node.cpus]
                    return sorted(node.labels.get("ray.io/accelerator-type", "none") for node in found)

                until(lambda: client.status().ray.connected)
                assert nodes() == []
                import_model = {"source": "builtin:tiny", "output_model": "m"}
                anywhere = client.create_job(job_pb2.Job(import_model=import_model))  # type: ignore[arg-type]
                until(lambda: nodes() == ["none"])
                placement = job_pb2.Placement(gpu_types=["H100"])
                there = client.create_job(job_pb2.Job(import_model=import_model, placement=placement))  # type: ignore[arg-type]
                until(lambda: nodes() == ["H100", "none"])
                assert client.status().ray.autoscaler.startswith("told of ")
                for job in (anywhere, there):
                    until(lambda name=job.name: client.get_job(name).HasField("end_time"))  # type: ignore[misc]
                    assert client.get_job(job.name).state == job_pb2.JOB_STATE_SUCCEEDED, client.get_job(job.name).error
                until(lambda: nodes() == [])
                assert client.status().ray.autoscaler == "told of 0 places for what runs and waits"
        finally:
            process.kill()
