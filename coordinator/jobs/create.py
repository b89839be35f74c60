"""Recording a new job: once acknowledged it is durable, and the same request makes it only once."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel import Session, col, select

from common import tracing
from common.errors import AlreadyExists, InvalidArgument, Violation
from common.names import parse
from coordinator import messages
from coordinator.jobs import records
from coordinator.jobs import secrets as job_secrets
from coordinator.jobs.admission import check_entitlement
from coordinator.jobs.change import budget
from coordinator.jobs.inputs import check_inputs
from coordinator.jobs.resolve import Resolved
from coordinator.jobs.resources import shape, shape_document
from coordinator.jobs.states import TERMINAL, State
from coordinator.store import tables
from luthier.v1 import job_pb2

PREFIXES = {"finetune": "ft", "sweep": "sw", "evaluate": "ev", "import_model": "im"}
"""First letters of a job's id, so that a list of ids says what they are."""


@dataclass(frozen=True)
class Request:
    """Who asked for what: the identity of a CreateJob call."""

    project: str
    creator: str
    request_id: str
    sha256: str
    body: dict[str, Any]
    # Of the call; another call of the same identity may well have another.
    trace_parent: str = ""


def request_of(project: str, creator: str, request: job_pb2.CreateJobRequest) -> Request:
    """Reduce a call to its identity; output-only fields do not count."""
    body = job_pb2.Job()
    body.CopyFrom(request.job)
    for name in messages.OUTPUT_ONLY:
        body.ClearField(name)
    digest = hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()
    return Request(project, creator, request.request_id, digest, messages.document(body), tracing.traceparent())


def earlier(session: Session, request: Request) -> tables.Job | None:
    """The job that the same request made before.

    Raises AlreadyExists where the request id was used for another body, saying which fields differ.
    """
    if not request.request_id:
        return None
    row = session.exec(
        select(tables.Job).where(tables.Job.project_id == request.project, tables.Job.request_id == request.request_id)
    ).first()
    if row is not None and row.request_sha256 != request.sha256:
        differing = ", ".join(_differences(row.inputs.get("request", {}), request.body)) or "its fields"
        raise AlreadyExists(
            f"request_id {request.request_id!r} made {messages.job_name(row)} from another body; it differs in {differing}",
            "REQUEST_ID_REUSED",
        )
    return row


def insert(session: Session, request: Request, job: job_pb2.Job, resolved: Resolved) -> tables.Job:
    """Record a job and its first event, or return the one that the same request made before.

    Raises FailedPrecondition where its project may never hold so much or has spent its budget, InvalidArgument where a job that
    it is to follow does not exist or did not succeed, NotFound where what it reads was deleted meanwhile or a secret is missing.
    """
    before = earlier(session, request)
    if before is not None:
        return before
    form = shape(job)
    check_entitlement(session, request.project, form.total(form.least))
    row = tables.Job(**columns(request, job, resolved))
    check_inputs(session, request.project, row.inputs["artifacts"])
    job_secrets.check(session, request.project, row.secrets)
    followed = [_find(session, request.project, name, index) for index, name in enumerate(job.after)]
    if any(State(other.state) is not State.SUCCEEDED for other in followed):
        row.state = State.BLOCKED.value
    session.add(row)
    session.flush()
    session.add_all(tables.JobDependency(job_uid=row.uid, after_uid=other) for other in {other.uid for other in followed})
    number = records.take_numbers(session, request.project)
    session.add(tables.JobEvent(**created(row.uid, row.kind, row.state, row.create_time, request, number)))
    return row


def columns(request: Request, job: job_pb2.Job, resolved: Resolved) -> dict[str, Any]:
    """The columns of a new job's row that are not their defaults."""
    kind = job.WhichOneof("spec") or ""
    moment = tables.now()
    unique = secrets.token_hex(5)
    form = shape(job)
    needs = form.total()
    return {
        "uid": f"{PREFIXES[kind]}{unique}{secrets.token_hex(3)}",
        "project_id": request.project,
        "job_id": f"{PREFIXES[kind]}-{unique}",
        "kind": kind,
        "display_name": job.display_name,
        "labels": dict(job.labels),
        "priority": job.priority,
        "time_limit_seconds": job.time_limit.ToMilliseconds() / 1000 if job.HasField("time_limit") else None,
        "hang_timeout_seconds": job.hang_timeout.ToMilliseconds() / 1000 if job.HasField("hang_timeout") else None,
        "spec": messages.document(getattr(job, kind)),
        "inputs": {
            "artifacts": {role: messages.document(artifact) for role, artifact in resolved.inputs.items()},
            "labels": resolved.labels,
            "request": request.body,
        },
        "cpus": needs.cpus,
        "gpus": needs.gpus,
        "shape": shape_document(form),
        "retry": messages.document(job.retry),
        "budget": budget(job),
        "request_id": request.request_id or None,
        "request_sha256": request.sha256,
        "creator": request.creator,
        "trace_parent": request.trace_parent,
        "secrets": dict(job.secrets),
        "placement": messages.document(job.placement),
        "state": State.QUEUED.value,
        "sequence": 1,
        "create_time": moment,
        "update_time": moment,
    }


def created(uid: str, kind: str, state: str, moment: datetime, request: Request, number: int) -> dict[str, Any]:
    """The columns of a new job's first event, which has `number` within its project."""
    return {
        "job_uid": uid,
        "sequence": 1,
        "time": moment,
        "type": job_pb2.JOB_EVENT_TYPE_CREATED,
        "state": state,
        "message": f"{kind} created by {request.creator}",
        "project_id": request.project,
        "project_sequence": number,
    }


def _find(session: Session, project: str, name: str, index: int) -> tables.Job:
    """A job that the new one is to follow. Raises InvalidArgument where there is none, or where it will never succeed."""
    field = f"job.after[{index}]"
    owner, job_id = parse(name, "projects", "jobs", field=field)
    query = select(tables.Job).where(
        tables.Job.project_id == project, tables.Job.job_id == job_id, col(tables.Job.delete_time).is_(None)
    )
    row = session.exec(query).first() if owner == project else None
    if row is None:
        raise InvalidArgument.of([Violation(field, f"there is no job {name!r}")])
    if State(row.state) in TERMINAL and State(row.state) is not State.SUCCEEDED:
        raise InvalidArgument.of([Violation(field, f"{name} ended {row.state}, so nothing can follow it")])
    return row


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "job") -> list[str]:
    """Paths of the fields in which two documents differ."""
    differing = []
    for name in sorted(old.keys() | new.keys()):
        here, there = old.get(name), new.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            differing += _differences(here, there, f"{path}.{name}")
        elif here != there:
            differing.append(f"{path}.{name}")
    return differing
