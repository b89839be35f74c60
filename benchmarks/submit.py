"""Submit to acknowledgement: CreateJob, durable, against Ray Jobs' `submit_job`, on one stack, call by call in turn.

Ray's answer means that the job is known to its head's memory; ours that job and event are on disk. Both peers are called through
their own Python clients with a connection that is already open. Neither job waits for capacity in what is measured: ours is
queued, Ray's is a no-op that asks for no CPUs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import uuid
from pathlib import Path

from benchmarks.report import Spread, keep, machine
from luthier.v1 import evaluation_pb2, job_pb2
from tests.support.stack import Stack

COMMAND = "python -m benchmarks.submit"
ROUNDS = 60
WARM_UP = 5
PAUSE_SECONDS = 1.5
"""Between rounds, so that what Ray starts for the last job is not measured as part of the next."""


def main() -> None:
    """Measure and keep the result."""
    home = Path(tempfile.mkdtemp(prefix="lt-"))
    stack = Stack(home)
    before = machine()
    try:
        stack.up("--num-cpus", "1")
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", str(home / "ray" / "token")
        ours, peers = measure(stack)
    finally:
        stack.down()
    ratios = [peer / our for our, peer in zip(ours, peers, strict=True)]
    result = {
        "what": "milliseconds from call to acknowledgement",
        "rounds": ROUNDS,
        "luthier_create_job_ms": vars(Spread.of(ours)),
        "ray_submit_job_ms": vars(Spread.of(peers)),
        "ratio_ray_to_luthier": vars(Spread.of(ratios)),
        "machine": before,
    }
    path = keep("submit", COMMAND, result)
    medians = [statistics.median(sample) for sample in (ours, peers, ratios)]
    print("CreateJob {:.1f} ms, submit_job {:.1f} ms, ratio {:.1f}".format(*medians), path)


def measure(stack: Stack) -> tuple[list[float], list[float]]:
    """Milliseconds of each round for CreateJob and submit_job."""
    from ray.job_submission import JobSubmissionClient

    rows = stack.home / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(40)))
    ray = JobSubmissionClient(stack.status["ray"]["address"])
    ours: list[float] = []
    peers: list[float] = []
    with stack.client() as client:
        client.upload_dataset(rows, "rows")
        # The stack has one CPU and this asks for more, so that nothing of ours starts while Ray is measured.
        job = job_pb2.Job(evaluate=evaluation_pb2.EvaluateSpec(model="builtin:tiny", dataset="rows"))
        for number in range(ROUNDS + WARM_UP):
            calls = [
                (ours, lambda: client.create_job(job, request_id=uuid.uuid4().hex)),
                (peers, lambda: ray.submit_job(entrypoint="true", entrypoint_num_cpus=0)),
            ]
            for sample, call in calls if number % 2 else reversed(calls):
                started = time.perf_counter()
                call()
                taken = (time.perf_counter() - started) * 1000
                if number >= WARM_UP:
                    sample.append(taken)
            time.sleep(PAUSE_SECONDS)
    return ours, peers


if __name__ == "__main__":
    main()
