"""What a job holds on the cluster while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common.errors import InvalidArgument, Violation
from common.placement import selector_of
from coordinator.scheduling.model import Demand, Shape
from luthier.v1 import job_pb2, training_pb2

DRIVER_CPUS = 0.25
"""Logical CPUs of a job's driver: it waits most of the time, but a node takes only so many of them."""

TRIAL_CPUS = 0.25
"""Logical CPUs of the driver of one trial of a sweep."""

EVALUATION_CPUS = 1.0
"""Logical CPUs of an evaluation's task."""


def fill_in(job: job_pb2.Job, cluster_has_gpus: bool) -> None:
    """Write the defaults that depend on the cluster into the job, so that its record says what it ran with."""
    kind = job.WhichOneof("spec")
    job.kind = kind or ""
    spec = job.finetune if kind == "finetune" else job.sweep.finetune if kind == "sweep" else None
    if spec is None:
        return
    spec.workers = spec.workers or 1
    if not spec.worker_resources.HasField("cpus"):
        spec.worker_resources.cpus = 1.0
    if not spec.worker_resources.HasField("gpus"):
        spec.worker_resources.gpus = 1.0 if cluster_has_gpus else 0.0
    if spec.method == "qlora" and not spec.worker_resources.gpus:
        where = "job.finetune.method" if kind == "finetune" else "job.sweep.finetune.method"
        why = "4-bit weights take GPUs, and the cluster has none or does not answer, or the job asks for none; use lora"
        raise InvalidArgument.of([Violation(where, why)])
    if kind == "sweep":
        job.sweep.max_concurrent_trials = job.sweep.max_concurrent_trials or 1


def shape(job: job_pb2.Job) -> Shape:
    """What a job, with its defaults filled in, holds at a time, which parts of it have to lie on one node each, and on which."""
    return replace(_shape(job), selector=tuple(selector_of(job.placement).items()))


def _shape(job: job_pb2.Job) -> Shape:
    kind = job.WhichOneof("spec")
    driver = Demand(DRIVER_CPUS)
    if kind == "finetune":
        spec = job.finetune
        worker, most = _worker(spec), spec.workers
        least = min(spec.min_workers, most) if spec.HasField("min_workers") else most
        # Scoring takes the place of the workers, and a whole CPU at least.
        missing = max(0.0, EVALUATION_CPUS - worker.times(least).cpus)
        return Shape(driver + Demand(missing), worker, most, least)
    if kind == "sweep":
        trials = job.sweep.max_concurrent_trials
        workers = job.sweep.finetune.workers * trials
        return Shape(driver + Demand(TRIAL_CPUS).times(trials), _worker(job.sweep.finetune), workers, workers)
    if kind == "evaluate":
        return Shape(driver, Demand(EVALUATION_CPUS), 1, 1)
    return Shape(driver)


def shape_document(shape: Shape) -> dict[str, Any]:
    """A shape as the store keeps it."""
    document = {
        "driver": [shape.driver.cpus, shape.driver.gpus],
        "worker": [shape.worker.cpus, shape.worker.gpus],
        "most": shape.most,
        "least": shape.least,
    }
    return document | ({"selector": [list(each) for each in shape.selector]} if shape.selector else {})


def shape_of(document: dict[str, Any], total: Demand) -> Shape:
    """Read what `shape_document` wrote. A job that was recorded before shapes were holds its total in one piece."""
    if not document:
        return Shape(total)
    selector = tuple((label, condition) for label, condition in document.get("selector", ()))
    return Shape(Demand(*document["driver"]), Demand(*document["worker"]), document["most"], document["least"], selector)


def _worker(spec: training_pb2.FinetuneSpec) -> Demand:
    return Demand(spec.worker_resources.cpus, spec.worker_resources.gpus)
