"""The ranks of a fine-tune inside Ray Train; the only file of training, with `job.py`, that knows Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import ray
import ray.train
from ray.exceptions import OutOfMemoryError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)

from agents.failures import TRACEBACK_LIMIT, RunFailed, is_out_of_memory, is_peer_loss, job_error_of
from agents.training import environment
from agents.training.config import TrainConfig
from agents.training.worker import TRAINING_ERROR, TrainPayload, TrainResult, train_worker
from common import storage
from common.causes import HANG, NOT_PLACED, OUT_OF_MEMORY, WORKER_LOST
from common.errors import Internal, LuthierError
from luthier.v1 import job_pb2

logger = logging.getLogger(__name__)

# Who stands still is found by the ranks' own watch (watch.py); a collective that gives up earlier names nobody, and may be wrong:
# the others wait in one while rank 0 uploads a large checkpoint.
COLLECTIVE_TIMEOUT_SECONDS = 86_400
# The scheduler starts what has room: a gang that waits for longer than an autoscaler takes has lost it to something else.
PLACEMENT_TIMEOUT_SECONDS = 600
NOT_STARTED = (InsufficientClusterResourcesError, WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
# Read by Ray Train's controller, which takes them from the driver's environment.
_CONTROLLER = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(PLACEMENT_TIMEOUT_SECONDS),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Pauses come from the coordinator; Ray's own watcher would cost a process a run, and tell nobody who listens.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def resources(config: TrainConfig) -> tuple[dict[str, float], bool]:
    """What each worker holds, and whether it trains on a GPU. A cluster with GPUs gives one a worker unless told otherwise."""
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    held = {"CPU": config.cpus_per_worker}
    return (held | {"GPU": gpus}, True) if gpus else (held, False)


def run_training(payload: TrainPayload, *, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Train with Ray Train and return rank 0's result. Blocks; also works inside a trial of Ray Tune.

    In a sweep, `payload.trial_every` makes the ranks report their held-out loss through `ray.train.report`, and `callbacks`
    (Tune's report callback) carry it on. Raises RunFailed with the root cause where a rank failed.
    """
    config = payload.config
    held, use_gpu = resources(config)
    os.environ.update(_CONTROLLER)
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"payload": payload},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=use_gpu,
            resources_per_worker=held,
            label_selector=dict(payload.selector) or None,
        ),
        run_config=RunConfig(
            name=payload.trial or "train",
            storage_path=storage.join(payload.run_uri, "ray"),
            # Ray Train's default is to wait for a place for ever, again and again.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}} if not use_gpu else {},
        ),
    )
    try:
        # In the main thread Ray Train would take SIGINT for itself, and abort the run before its ranks can stop by themselves.
        with ThreadPoolExecutor(1, thread_name_prefix="train") as thread:
            fitting = thread.submit(trainer.fit)
            while not fitting.done():
                wait([fitting], timeout=1.0)
            value = fitting.result().return_value
    except ray.train.TrainingFailedError as error:
        raise RunFailed.of(root_cause(error, payload)) from None
    finally:
        with suppress(LuthierError):  # Ray Train's notes on itself, of no use to anybody
            storage.delete_tree(storage.join(payload.run_uri, "ray"))
    if not isinstance(value, TrainResult):
        raise Internal("the training ended without a result of rank 0", "NO_RESULT")
    return value


def root_cause(error: BaseException, payload: TrainPayload) -> job_pb2.JobError:
    """The failure that came first: what a rank raised by itself, before what others raised because that rank was gone."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [_cause(failure, payload.source(rank)) for rank, failure in sorted(failures.items())]
    if not causes:
        failure = getattr(error, "controller_failure", error)
        source = f"{payload.trial}/driver" if payload.trial else "driver"
        if any(isinstance(layer, NOT_STARTED) for layer in _layers(failure)):
            return _not_placed(failure, source, payload)
        return _cause(failure, source)
    return min(causes, key=lambda cause: (is_peer_loss(cause), cause.code == WORKER_LOST))


def _not_placed(error: BaseException, source: str, payload: TrainPayload) -> job_pb2.JobError:
    config = payload.config
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(payload.use_gpu)
    each = f"{config.cpus_per_worker:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    why = "found no place on the cluster"
    if isinstance(error, WorkerGroupStartupTimeoutError):
        why += f" within {PLACEMENT_TIMEOUT_SECONDS} s; a node was lost, or something beside Luthier holds it"
    elif isinstance(error, WorkerGroupStartupFailedError):
        why = "were placed but did not start; their node was lost"
    message = f"{config.workers} workers with {each} each {why}"
    return job_pb2.JobError(
        code=NOT_PLACED, source=source, exception=type(error).__name__, message=message, traceback=str(error)[-TRACEBACK_LIMIT:]
    )


def _cause(error: BaseException, source: str) -> job_pb2.JobError:
    layers = list(_layers(error))
    for layer in layers:
        if isinstance(layer, RunFailed):
            return layer.job_error
    innermost = layers[-1]
    name = type(innermost).__name__
    if any(isinstance(layer, OutOfMemoryError) or is_out_of_memory(layer) for layer in layers):
        message = f"the node of {source} ran out of memory; use a smaller batch_size, more workers or a higher zero_stage"
        return job_pb2.JobError(code=OUT_OF_MEMORY, source=source, exception=name, message=message)
    if any(isinstance(layer, WorkerHealthCheckTimeoutError) for layer in layers):
        message = f"the process of {source} has not answered Ray for too long: it stands still, or its node cannot be reached"
        return job_pb2.JobError(code=HANG, source=source, exception=name, message=message)
    if isinstance(innermost, RayError):
        message = f"the process of {source} died without a word; it was killed, or its node was lost"
        return job_pb2.JobError(
            code=WORKER_LOST, source=source, exception=name, message=message, traceback=str(innermost)[-TRACEBACK_LIMIT:]
        )
    return job_error_of(innermost, source, TRAINING_ERROR)


def _layers(error: BaseException) -> Iterator[BaseException]:
    """An exception and what Ray wrapped into it, from the outermost to the innermost."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = (getattr(current, name, None) for name in ("health_check_failure", "_base_exc", "cause"))
        current = next((found for found in inner if isinstance(found, BaseException)), current.__cause__)


def _rank(config: dict[str, Any]) -> TrainResult | None:
    """Runs in each worker, with torch.distributed initialised by Ray Train."""
    payload: TrainPayload = config["payload"]
    environment.prepare(payload.use_gpu)
    return train_worker(
        payload,
        node=ray.get_runtime_context().get_node_id(),
        report=lambda figures: ray.train.report(figures),
    )
