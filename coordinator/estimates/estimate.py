"""What a job would need: its workers' memory, its duration, its place in the queue. Reads, and changes nothing."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from sqlmodel import Session

from common import methods, storage
from common.errors import LuthierError
from common.names import parse_version_ref
from coordinator import messages, registry
from coordinator.cluster.ray_cluster import Capacity
from coordinator.estimates import duration, memory
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import shape
from coordinator.jobs.situation import Records
from coordinator.scheduling import labels
from coordinator.scheduling.model import Shape, Situation, Waiting
from coordinator.scheduling.plan import plan
from coordinator.store.database import Store
from coordinator.store.tables import now
from luthier.agent.v1 import agent_pb2
from luthier.v1 import dataset_pb2, estimate_pb2, job_pb2, training_pb2

CANDIDATE = "the job that is asked about"
MAX_CONFIG_BYTES = 2**20

TINY = memory.Model(parameters=2_556_000, hidden=192, layers=4, intermediate=512, key_value=192)
"""builtin:tiny, which agents build on the spot (agents/models/builtin.py)."""

GPU_BYTES = {
    **{"H200": 141, "B200": 180, "H100": 80, "A100-80G": 80, "A100": 40, "A100-40G": 40, "L40S": 48, "L40": 48, "A6000": 48},
    **{"A10G": 24, "A10": 24, "L4": 24, "RTX4090": 24, "T4": 16, "V100": 16},
}
"""Memory of accelerators in GB, by Ray's names of their types. Ray itself does not tell."""


async def estimate(
    store: Store, project: str, job: job_pb2.Job, resolved: Resolved, capacity: Capacity | None
) -> estimate_pb2.JobEstimate:
    """Tell what a job that is checked, with its defaults and its names looked up, would need."""
    found = estimate_pb2.JobEstimate()
    spec = job.finetune if job.WhichOneof("spec") == "finetune" else job.sweep.finetune
    if job.WhichOneof("spec") in ("finetune", "sweep"):
        found.memory.CopyFrom(await _memory(store, project, spec, resolved, capacity, shape(job)))
    found.duration.CopyFrom(await _duration(store, project, job))
    found.queue.CopyFrom(await _queue(store, project, job, capacity))
    return found


async def _memory(
    store: Store,
    project: str,
    spec: training_pb2.FinetuneSpec,
    resolved: Resolved,
    capacity: Capacity | None,
    form: Shape,
) -> estimate_pb2.MemoryEstimate:
    unknown = partial(estimate_pb2.MemoryEstimate, fit=estimate_pb2.FIT_UNKNOWN)
    model = await _model(store, project, resolved.inputs["base"])
    if isinstance(model, str):
        return unknown(reason=model)
    setup = _setup(spec)
    parts = memory.parts(model, setup)
    total = sum(parts.values())
    available, reason = _available(capacity, form, setup)
    told = estimate_pb2.MemoryEstimate(bytes=total, parts=parts, available_bytes=available, reason=reason)
    told.fit = estimate_pb2.FIT_UNKNOWN
    if available:
        told.fit = estimate_pb2.FIT_FITS if total <= available else estimate_pb2.FIT_DOES_NOT_FIT
    if told.fit == estimate_pb2.FIT_DOES_NOT_FIT:
        told.advice.extend(memory.advice(model, setup, available, adapters=spec.method == "full"))
    return told


async def _model(store: Store, project: str, base: agent_pb2.Artifact) -> memory.Model | str:
    """What is known of a base model, or why nothing is."""
    if base.kind == "builtin":
        return TINY
    if base.kind != "registry":
        return f"{base.name} is measured once it is in the registry: `luthier model import` brings it there"
    ref = parse_version_ref(base.name, "base", "models", project)
    row = await store.read(lambda session: registry.find_model(session, project, ref))
    size = int(row.document.get("size_bytes", 0))
    try:
        text = await asyncio.to_thread(storage.read_bytes, storage.join(base.uri, "config.json"), MAX_CONFIG_BYTES)
        config: Any = json.loads(text)
        model = memory.Model.of(config, size) if isinstance(config, dict) else None
    except (LuthierError, ValueError) as error:
        return f"the config.json of {base.name} cannot be read: {error}"
    return model or f"the config.json of {base.name} does not say its size, layers and number format"


def _setup(spec: training_pb2.FinetuneSpec) -> memory.Setup:
    hyper, gpu = spec.hyperparameters, spec.worker_resources.gpus > 0
    bf16 = gpu if spec.precision == training_pb2.PRECISION_UNSPECIFIED else spec.precision == training_pb2.PRECISION_BF16
    facts = methods.METHODS.get(spec.method)
    return memory.Setup(
        workers=spec.workers,
        zero_stage=spec.sharding.zero_stage if spec.sharding.HasField("zero_stage") else 2,
        batch_size=hyper.batch_size or 8,
        gradient_accumulation=hyper.gradient_accumulation or 1,
        length=hyper.max_length or 512,
        bf16=bf16,
        gpu=gpu,
        lora_rank=(spec.lora.rank or 16) if methods.trains_adapter(spec) else 0,
        reference=methods.holds_reference(spec),
        sequences=2 if facts is not None and facts.shapes == methods.PAIRS else 1,
        generates=facts is not None and facts.settings == "reinforcement",
        four_bits=spec.method == "qlora",
    )


def _available(capacity: Capacity | None, form: Shape, setup: memory.Setup) -> tuple[int, str]:
    """What one worker can have on the best of the nodes that it may lie on, and what that rests on."""
    if capacity is None:
        return 0, "the Ray cluster does not answer"
    nodes = [node for node in capacity.nodes if form.worker.fits(node.total) and labels.matches(form.selector, node.labels)]
    if not nodes:
        return 0, "no node of the cluster can hold a worker"
    if setup.gpu:
        types = {node.labels.get("ray.io/accelerator-type", "") for node in nodes}
        known = {each: GPU_BYTES[each] for each in types if each in GPU_BYTES}
        if not known:
            return 0, "Ray does not tell how much memory the GPUs have, and their type is not known here"
        best = max(known, key=lambda each: known[each])
        return int(known[best] * 1e9), f"one {best} has {known[best]} GB"
    shares = []
    for node in nodes:
        beside = max(1, min(setup.workers, int(node.total.cpus / form.worker.cpus) if form.worker.cpus else setup.workers))
        if capacity.memory.get(node.id):
            shares.append((capacity.memory[node.id] // beside, beside))
    if not shares:
        return 0, "Ray does not tell how much memory the nodes have"
    share, beside = max(shares)
    shared = f", shared by {beside} workers" if beside > 1 else ""
    return share, f"a node's memory as Ray counts it{shared}"


async def _duration(store: Store, project: str, job: job_pb2.Job) -> estimate_pb2.DurationEstimate:
    if job.WhichOneof("spec") != "finetune":
        return estimate_pb2.DurationEstimate(reason="told for fine-tunes only")
    spec = job.finetune
    document = messages.document(spec)
    ref = parse_version_ref(spec.dataset, "dataset", "datasets", project)

    def look(session: Session) -> tuple[int, list[duration.Past]]:
        version = messages.parse(registry.find_dataset(session, project, ref).document, dataset_pb2.DatasetVersion())
        rows = sum(split.row_count for split in version.splits if split.name == "train")
        return rows, duration.past_runs(session, project, document)

    rows, past = await store.read(look)
    hyper, setup = spec.hyperparameters, _setup(spec)
    count = duration.steps(
        rows,
        hyper.epochs if hyper.HasField("epochs") else 3.0,
        hyper.max_steps,
        setup.batch_size,
        setup.gradient_accumulation,
        setup.workers,
    )
    told = estimate_pb2.DurationEstimate(steps=count, runs=len(past))
    if not past:
        told.reason = "no run of this project with this base, method and sizes has succeeded yet"
        return told
    low, middle, high = duration.seconds(past, count)
    for field, value in ((told.low, low), (told.expected, middle), (told.high, high)):
        field.FromMilliseconds(int(value * 1000))
    held = shape(job).total()
    told.cpu_seconds, told.gpu_seconds = middle * held.cpus, middle * held.gpus
    told.reason = f"seconds a step, and around the steps, of the last {len(past)} such runs"
    return told


async def _queue(store: Store, project: str, job: job_pb2.Job, capacity: Capacity | None) -> estimate_pb2.QueueEstimate:
    if capacity is None:
        return estimate_pb2.QueueEstimate(waiting_for="the Ray cluster to answer; nobody knows before")
    if job.after:
        return estimate_pb2.QueueEstimate(waiting_for="the jobs that it follows")
    moment = now()
    situation = await store.read(lambda session: Records().read(session, capacity.nodes, moment))
    limit = job.time_limit.ToMilliseconds() / 1000 if job.HasField("time_limit") else None
    candidate = Waiting(CANDIDATE, project, job.priority, moment.timestamp(), shape(job), limit)
    decided = await asyncio.to_thread(plan, _with(situation, candidate))
    decision = next(each for each in decided.decisions if each.uid == CANDIDATE)
    told = estimate_pb2.QueueEstimate(starts_at_once=decision.start, position=decision.position)
    if not decision.start:
        told.waiting_for = decision.reason
    if decision.estimated_start is not None:
        told.estimated_start.FromMilliseconds(int(decision.estimated_start * 1000))
    return told


def _with(situation: Situation, candidate: Waiting) -> Situation:
    return Situation(situation.now, [*situation.queue, candidate], situation.holding, situation.nodes, situation.terms)
