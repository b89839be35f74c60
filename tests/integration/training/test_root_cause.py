"""Of all that breaks when one rank breaks, the driver names the cause. Ray's classes, no cluster."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from agents.failures import RunFailed, end_reason_of, job_error_of
from agents.link import LinkConfig
from agents.training.ray_entry import root_cause
from agents.training.worker import TrainPayload
from common.errors import InvalidArgument
from luthier.v1 import job_pb2, training_pb2


def _payload(trial: str = "", spec: bytes = b"") -> TrainPayload:
    link = LinkConfig("127.0.0.1:1", "job", 1, "s" * 40)
    return TrainPayload(spec, link, "file:///b", "", "b", "file:///d", "", "file:///r", trial=trial)


def _failed(error: BaseException, rank: int) -> RunFailed:
    return RunFailed.of(job_error_of(error, f"rank-{rank}", "TRAINING_ERROR"))


LOST = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:3041")


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_lost_peer_is_never_the_cause(culprit: int) -> None:
    failures: dict[int, Exception] = {culprit: _failed(ZeroDivisionError("x"), culprit), 1 - culprit: _failed(LOST, 1 - culprit)}
    cause = root_cause(WorkerGroupError("two failed", failures), _payload())
    assert (cause.source, cause.exception) == (f"rank-{culprit}", "builtins.ZeroDivisionError")
    assert "ZeroDivisionError" in cause.traceback


def test_a_cause_survives_what_ray_wraps_around_it() -> None:
    inner = _failed(InvalidArgument("bad rows", "BAD_DATA"), 1)
    wrapped = RayTaskError("train_fn", "traceback", inner)
    cause = root_cause(WorkerGroupError("one failed", {1: wrapped}), _payload())
    assert (cause.code, cause.message, cause.source) == ("BAD_DATA", "bad rows", "rank-1")


def test_a_process_that_died_without_a_word_is_told_so_unless_another_said_why() -> None:
    died = WorkerHealthCheckFailedError("a worker health check failed", ActorDiedError())
    cause = root_cause(WorkerGroupError("gone", {1: died}), _payload("trial-00002"))
    assert (cause.code, cause.source) == ("WORKER_LOST", "trial-00002/rank-1")
    said = root_cause(WorkerGroupError("gone", {0: died, 1: _failed(MemoryError(), 1)}), _payload())
    assert (said.code, said.source) == ("OUT_OF_MEMORY", "rank-1")


def test_a_process_that_died_outranks_those_that_lost_it() -> None:
    cause = root_cause(WorkerGroupError("gone", {0: _failed(LOST, 0), 1: ActorDiedError()}), _payload())
    assert (cause.code, cause.source) == ("WORKER_LOST", "rank-1")


def test_a_fault_of_the_controller_is_the_drivers() -> None:
    cause = root_cause(ControllerError(ValueError("no room")), _payload())
    assert (cause.source, cause.message) == ("driver", "ValueError: no room")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (WorkerGroupStartupTimeoutError(8), "8 workers with 2 CPUs and 1 GPUs each found no place on the cluster within 600 s"),
        (InsufficientClusterResourcesError("too small"), "8 workers with 2 CPUs and 1 GPUs each found no place on the cluster"),
        (WorkerGroupStartupFailedError("died"), "8 workers with 2 CPUs and 1 GPUs each were placed but did not start"),
    ],
)
def test_workers_that_found_no_place_are_tried_again_later(failure: Exception, said: str) -> None:
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="d@1", method="full", workers=8)
    spec.worker_resources.cpus, spec.worker_resources.gpus = 2, 1
    cause = root_cause(ControllerError(failure), _payload(spec=spec.SerializeToString()))
    assert cause.message.startswith(said)
    assert (cause.code, cause.source) == ("NOT_PLACED", "driver")
    assert end_reason_of(cause) == job_pb2.END_REASON_LAUNCH_FAILED


def test_a_process_that_answers_ray_no_more_hangs() -> None:
    failures: dict[int, Exception] = {0: _failed(LOST, 0), 1: WorkerHealthCheckTimeoutError("a health check hangs")}
    cause = root_cause(WorkerGroupError("gone", failures), _payload())
    assert (cause.code, cause.source) == ("HANG", "rank-1")
    assert end_reason_of(cause) == job_pb2.END_REASON_HANG
