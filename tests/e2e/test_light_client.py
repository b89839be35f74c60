"""A service that has installed the light client and nothing else of Luthier, against a real stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.v1 import dataset_pb2
from tests.support.client_wheel import build_wheel, empty_environment
from tests.support.stack import Stack, plain_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SERVICE = """
import json, sys
from luthier.client import Client, InvalidArgument
from luthier.v1 import evaluation_pb2, job_pb2

with Client(sys.argv[1], token=sys.argv[2]) as client:
    try:
        client.create_job(job_pb2.Job(evaluate=evaluation_pb2.EvaluateSpec(dataset="colours")))
    except InvalidArgument as error:
        refused = [violation.field for violation in error.violations]
    spec = evaluation_pb2.EvaluateSpec(model="builtin:tiny", dataset="colours", skip_generation=True)
    job = client.create_job(job_pb2.Job(evaluate=spec), request_id="from-a-service")
    again = client.create_job(job_pb2.Job(evaluate=spec), request_id="from-a-service")
    events = [item.event.sequence for item in client.watch(job.name) if item.WhichOneof("item") == "event"]
    done = client.wait(job.name)
    print(json.dumps({
        "refused": refused, "same": again.name == job.name, "events": events,
        "state": job_pb2.JobState.Name(done.state), "rows": done.result.after.rows, "loss": done.result.after.loss,
        "foreign": sorted(name for name in ("ray", "torch", "coordinator", "common") if name in sys.modules),
    }))
"""


def test_a_service_submits_watches_and_reads_the_result(
    stack: Stack, small_dataset: dataset_pb2.DatasetVersion, tmp_path: Path
) -> None:
    python = empty_environment(tmp_path, build_wheel(tmp_path))
    script = tmp_path / "service.py"
    script.write_text(SERVICE)
    done = subprocess.run(
        [str(python), str(script), stack.server, stack.token],
        env=plain_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["refused"] == ["job.evaluate.model"]
    assert said["same"]
    assert said["events"] == list(range(1, len(said["events"]) + 1))
    assert said["state"] == "JOB_STATE_SUCCEEDED"
    assert said["rows"] == next(int(split.row_count) for split in small_dataset.splits if split.name == "test")
    # A random base knows as much as a coin of 4,000 sides: the loss is near the logarithm of the vocabulary.
    assert 7.5 < said["loss"] < 9.5
    assert said["foreign"] == []
    assert python != Path(sys.executable)
