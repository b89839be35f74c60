"""A rank whose data loader stands still: it is found, named with its stack, and leaves. Two real ranks over gloo, no Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from google.protobuf.json_format import MessageToDict

from agents.training.watch import EXIT_STATUS
from common import manifest, storage
from common.keeping import Keep, kept
from coordinator.jobs.hang import hang, told
from tests.support import hanging_ranks, micro_model
from tests.support.fake_coordinator import FakeCoordinator

pytestmark = pytest.mark.slow

STEPS = 4
HANG_SECONDS = 4.0


@dataclass
class Ran:
    """What was left when both ranks had gone."""

    fake: FakeCoordinator
    statuses: list[int]
    logs: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("hung")
    micro_model.build_micro(folder / "base")
    micro_model.build_data(folder / "data")
    base, data = (manifest.publish(folder / name, (folder / "storage" / name).as_uri()) for name in ("base", "data"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    policy = {"every_steps": 1, "keep": 1, "keep_best": 1, "metric": "eval_loss"}
    with FakeCoordinator() as fake:
        fake.secret = "s" * 40
        plan = {
            "port": port,
            "address": fake.address,
            "stuck": 1,
            "after": STEPS,
            "spec": {
                "base": "micro",
                "method": "full",
                "workers": 2,
                "hyperparameters": {"max_steps": 50, "batch_size": 4, "learning_rate": 1e-3},
                "checkpoints": policy,
                "evaluation": {"split": "train", "max_rows": 16},
            },
            "base": (folder / "storage" / "base").as_uri(),
            "base_hash": base.content_hash,
            "data": (folder / "storage" / "data").as_uri(),
            "data_hash": data.content_hash,
            "run": (folder / "storage" / "run").as_uri(),
            "hang_seconds": HANG_SECONDS,
        }
        path = folder / "plan.json"
        path.write_text(json.dumps(plan))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LUTHIER_NODE_HOME": str(folder / "node")}
        logs = [folder / f"rank-{rank}.log" for rank in range(2)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                command = [sys.executable, hanging_ranks.__file__, str(path), str(rank)]
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        try:
            statuses = [process.wait(180) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        yield Ran(fake, statuses, [log.read_text()[-4000:] for log in logs])


def test_the_rank_that_gets_no_rows_is_named_with_its_stack(ran: Ran) -> None:
    standings: dict[str, object] = {}
    for source in ("rank-0", "rank-1"):
        for standing in ran.fake.of(source, "standing"):
            standings = told(standings, source, MessageToDict(standing, preserving_proto_field_name=True))  # type: ignore[arg-type]
    found = hang(standings, 2)  # type: ignore[arg-type]
    assert found is not None, ran.logs
    assert found["message"].startswith(f"rank 1 of 2 stood after step {STEPS} for")
    assert f"waits for the rows of step {STEPS + 1}; the others stood after step {STEPS}: has rows for" in found["message"]
    assert found["source"] == "rank-1"
    assert "get_batch_samples" in found["traceback"]


def test_both_ranks_leave_and_say_where_their_threads_were(ran: Ran) -> None:
    assert EXIT_STATUS in ran.statuses, ran.logs
    assert 0 not in ran.statuses
    lines = [line.message for report in ran.fake.of("rank-1", "log") for line in report.lines]
    assert any("MainThread" in line and "get_batch_samples" in line for line in lines)


def test_what_it_kept_by_the_held_out_loss_is_there(ran: Ran) -> None:
    points = {point.step: dict(point.metrics) for point in ran.fake.of("rank-0", "checkpoint")}
    assert list(points) == [1, 2, 3, 4]
    assert all(figures["eval_loss"] > 0 for figures in points.values())
    uris = {point.step: point.uri for point in ran.fake.of("rank-0", "checkpoint")}
    there = {step for step, uri in uris.items() if storage.exists(storage.join(uri, manifest.NAME))}
    assert there == kept(Keep(latest=1, best=1, metric="eval_loss"), points)
