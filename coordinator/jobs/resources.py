"""What a job holds on the cluster while it runs."""

from __future__ import annotations

from coordinator.scheduling.model import Demand
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
    if kind == "sweep":
        job.sweep.max_concurrent_trials = job.sweep.max_concurrent_trials or 1


def demand(job: job_pb2.Job) -> Demand:
    """All that a job, with its defaults filled in, holds at a time."""
    kind = job.WhichOneof("spec")
    driver = Demand(DRIVER_CPUS)
    if kind == "finetune":
        return driver + _at_least_an_evaluation(_workers(job.finetune))
    if kind == "sweep":
        return driver + (Demand(TRIAL_CPUS) + _workers(job.sweep.finetune)).times(job.sweep.max_concurrent_trials)
    if kind == "evaluate":
        return driver + Demand(EVALUATION_CPUS)
    return driver


def _workers(spec: training_pb2.FinetuneSpec) -> Demand:
    return Demand(spec.worker_resources.cpus, spec.worker_resources.gpus).times(spec.workers)


def _at_least_an_evaluation(workers: Demand) -> Demand:
    return Demand(max(workers.cpus, EVALUATION_CPUS), workers.gpus)
