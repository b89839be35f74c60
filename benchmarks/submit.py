"""Submit to acknowledgement: CreateJob, durable, against Ray Jobs' `submit_job`, on one stack, call by call in turn.

Ray's answer means that the job is known to its head's memory; ours that job and event are on disk. Both peers are called through
their own Python clients with a connection that is already open. Neither job waits for capacity in what is measured: ours is
queued, Ray's is a no-op that asks for no CPUs.

Measured in two ways: one call on a rested machine, and one of several in a row, as a script submits them. Ray starts each job's
supervisor while the next one is submitted, and that is a part of what a submitter waits for.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Spread, keep, machine
from luthier.v1 import evaluation_pb2, job_pb2
from tests.support.stack import Stack

Samples = tuple[list[float], list[float]]

COMMAND = "python -m benchmarks.submit"
ROUNDS = 60
WARM_UP = 5
PAUSE_SECONDS = 1.5
"""After a call, so that what Ray starts for the last job is not measured as part of the next."""

ROWS, IN_A_ROW = 12, 10
REST_SECONDS = 12.0
"""After several in a row, for the same reason."""


def main() -> None:
    """Measure and keep the result."""
    home = Path(tempfile.mkdtemp(prefix="lt-"))
    stack = Stack(home)
    before = machine()
    try:
        stack.up("--num-cpus", "1")
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", str(home / "ray" / "token")
        single, row = measure(stack)
    finally:
        stack.down()
    result: dict[str, Any] = {
        "what": "milliseconds from call to acknowledgement",
        "one_call": {"rounds": ROUNDS, **figures(*single)},
        "each_of_several_in_a_row": {"rounds": ROWS, "in_a_row": IN_A_ROW, **figures(*row)},
        "machine": before,
    }
    path = keep("submit", COMMAND, result)
    for name, samples in (("one call", single), (f"each of {IN_A_ROW} in a row", row)):
        medians = [statistics.median(sample) for sample in (*samples, ratios(*samples))]
        print("{}: CreateJob {:.1f} ms, submit_job {:.1f} ms, ratio {:.1f}".format(name, *medians))
    print(path)


def figures(ours: list[float], peers: list[float]) -> dict[str, Any]:
    """The spreads of both and of their ratio."""
    return {
        "luthier_create_job_ms": vars(Spread.of(ours)),
        "ray_submit_job_ms": vars(Spread.of(peers)),
        "ratio_ray_to_luthier": vars(Spread.of(ratios(ours, peers))),
    }


def ratios(ours: list[float], peers: list[float]) -> list[float]:
    """Ray's time by Luthier's, round by round."""
    return [peer / our for our, peer in zip(ours, peers, strict=True)]


def measure(stack: Stack) -> tuple[Samples, Samples]:
    """Milliseconds of CreateJob and submit_job, one by one, and then the mean of each row of calls."""
    from ray.job_submission import JobSubmissionClient

    rows = stack.home / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(40)))
    ray = JobSubmissionClient(stack.status["ray"]["address"])
    with stack.client() as client:
        client.upload_dataset(rows, "rows")
        # The stack has one CPU and this asks for more, so that nothing of ours starts while Ray is measured.
        job = job_pb2.Job(evaluate=evaluation_pb2.EvaluateSpec(model="builtin:tiny", dataset="rows"))
        calls: list[Callable[[], object]] = [
            lambda: client.create_job(job, request_id=uuid.uuid4().hex),
            lambda: ray.submit_job(entrypoint="true", entrypoint_num_cpus=0),
        ]
        in_turn(calls, WARM_UP, 1, PAUSE_SECONDS)
        return in_turn(calls, ROUNDS, 1, PAUSE_SECONDS), in_turn(calls, ROWS, IN_A_ROW, REST_SECONDS)


def in_turn(calls: Sequence[Callable[[], object]], rounds: int, in_a_row: int, pause: float) -> Samples:
    """Milliseconds a call of each, by round; who comes first alternates."""
    samples: Samples = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            for _ in range(in_a_row):
                calls[which]()
            samples[which].append((time.perf_counter() - started) * 1000 / in_a_row)
            time.sleep(pause)
    return samples


if __name__ == "__main__":
    main()
