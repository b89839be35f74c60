"""One job over two nodes, a worker on each; they share nothing but the storage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.v1 import job_pb2
from tests.support.coordinator_process import CoordinatorProcess, free_port
from tests.support.stack import plain_environment, spec, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SUPPORT = Path(__file__).parent.parent / "support"


@pytest.fixture
def root() -> Iterator[Path]:
    # Not below pytest's own folders: Ray's socket paths have to stay short.
    root = Path(tempfile.mkdtemp(prefix="lt-"))
    (root / "token").write_text("n" * 64)
    (root / "fence").mkdir()
    shutil.copy(SUPPORT / "fence.py", root / "fence" / "sitecustomize.py")
    (root / "trespasses").touch()
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def dashboard(root: Path) -> Iterator[str]:
    """Address of the two-node cluster's dashboard."""
    with (root / "cluster.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "two_nodes.py"), str(root), str(free_port())],
            env=plain_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    assert process.stdin is not None
    line = process.stdout.readline()
    assert line, (root / "cluster.log").read_text()
    yield json.loads(line)["dashboard"]
    process.stdin.close()
    try:
        process.wait(60)
    finally:
        process.kill()


@pytest.fixture
def coordinator(root: Path, dashboard: str) -> Iterator[CoordinatorProcess]:
    process = CoordinatorProcess(
        root / "coordinator",
        ray_address=dashboard,
        ray_token_path=str(root / "token"),
        storage_uri=(root / "storage").as_uri(),
        agent_python=sys.executable,
    )
    process.start()
    yield process
    process.stop()


def test_the_fence_holds(root: Path) -> None:
    secret = root / "coordinator" / "secret"
    secret.parent.mkdir()
    secret.write_text("x")
    environment = os.environ | {
        "PYTHONPATH": str(root / "fence"),
        "FENCE_FORBIDDEN": str(root / "coordinator"),
        "FENCE_LOG": str(root / "trespasses"),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"open({str(secret)!r})"], env=environment, capture_output=True, text=True, check=False
    )
    assert "belongs to another node" in done.stderr
    assert str(secret) in (root / "trespasses").read_text()


def test_a_worker_on_each_node_and_nothing_shared_but_the_storage(root: Path, coordinator: CoordinatorProcess) -> None:
    rows = root / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"thing {number},{'ab'[number % 2]}\n" for number in range(80)))
    with coordinator.client() as client:
        client.upload_dataset(rows, "things")
        job = client.create_job(
            spec(
                {
                    "finetune": {
                        "base": "builtin:tiny",
                        "dataset": "things",
                        "method": "full",
                        "workers": 2,
                        # Two CPUs for each: the first node has three and the second two, so neither can hold both.
                        "worker_resources": {"cpus": 2},
                        "sharding": {"zero_stage": 3},
                        "hyperparameters": {"max_steps": 4, "batch_size": 4},
                        "checkpoints": {"every_steps": 2},
                    }
                }
            )
        )
        done = wait_for(client, job.name, seconds=300)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
        points = client.jobs.ListCheckpoints(job_pb2.ListCheckpointsRequest(parent=job.name)).checkpoints
        small = {"base": "builtin:tiny", "dataset": "things", "method": "lora", "evaluation": {"disabled": True}}
        there = {"finetune": {**small, "hyperparameters": {"max_steps": 2}}, "placement": {"node_labels": {"zone": "b"}}}
        placed = wait_for(client, client.create_job(spec(there)).name, seconds=200)
        assert placed.state == job_pb2.JOB_STATE_SUCCEEDED, placed.error
        (node_b,) = [node.id for node in client.status().ray.each_node if node.labels.get("zone") == "b"]
        assert [rank.node for rank in placed.result.engine.ranks] == [node_b]
    ranks = done.result.engine.ranks
    assert [rank.rank for rank in ranks] == [0, 1]
    assert ranks[0].node != ranks[1].node
    # Stage 3 shares out the parameters too.
    whole = 4 * done.result.engine.parameters
    assert all(rank.parameter_bytes < 0.6 * whole for rank in ranks)
    assert {point.step for point in points} == {2, 4}
    assert (root / "trespasses").read_text() == ""
    for name in ("node-a", "node-b"):
        assert list((root / name).rglob("*.safetensors")), f"{name} fetched no model of its own"
    assert list((root / "storage").rglob("manifest.json"))
