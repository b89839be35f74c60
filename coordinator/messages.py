"""Between rows and the contract's messages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.jobs.states import EndReason, State
from coordinator.store import tables
from luthier.v1 import admin_pb2, job_pb2, sweep_pb2

M = TypeVar("M", bound=Message)

OUTPUT_ONLY: list[Any] = [field.name for field in job_pb2.Job.DESCRIPTOR.fields if field.number >= 40 or field.number <= 2]
"""Fields of a job that no caller sets."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def document(message: Message) -> dict[str, Any]:
    """A message as the JSON that the store keeps: the contract's own field names, absent fields left out."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def parse(values: dict[str, Any], message: M) -> M:
    """Read what `document` wrote into `message`. Fields that this version does not know are left out."""
    return json_format.ParseDict(values, message, ignore_unknown_fields=True)


def stamp(moment: datetime | None) -> Timestamp | None:
    """A moment as a proto timestamp."""
    if moment is None:
        return None
    since = moment - EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Figures as numbers: JSON keeps NaN and infinities as words."""
    return {name: float(value) for name, value in figures.items()}


def job_name(row: tables.Job) -> str:
    """Resource name of a job."""
    return f"projects/{row.project_id}/jobs/{row.job_id}"


def job(
    row: tables.Job, trials: Sequence[tables.Trial] = (), runs: Sequence[tables.JobRun] = (), after: Sequence[str] = ()
) -> job_pb2.Job:
    """A job's row as the contract's message, with the trials of a sweep that has not ended, its runs, and the jobs it follows."""
    message = job_pb2.Job(
        name=job_name(row),
        uid=row.uid,
        kind=row.kind,
        display_name=row.display_name,
        labels=row.labels,
        priority=row.priority,
        state=State(row.state).proto,
        end_reason=EndReason(row.end_reason).proto,
        run=row.run,
        attempt=row.attempt,
        create_time=stamp(row.create_time),
        start_time=stamp(row.start_time),
        end_time=stamp(row.end_time),
        update_time=stamp(row.update_time),
        etag=f'"{row.version}"',
        sequence=row.sequence,
        creator=row.creator,
        secrets=row.secrets,
        cancel_requested=row.cancel_time is not None and row.end_time is None,
        pause_requested=row.pause_time is not None and row.end_time is None,
        after=after,
        runs=[job_run(each) for each in runs],
        usage=job_pb2.Usage(cpu_seconds=row.cpu_seconds, gpu_seconds=row.gpu_seconds, trained_tokens=row.trained_tokens),
        schedule=f"projects/{row.project_id}/schedules/{row.schedule}" if row.schedule else "",
    )
    if row.retry:
        parse(row.retry, message.retry)
    if row.budget:
        parse(row.budget, message.budget)
    if row.placement:
        parse(row.placement, message.placement)
    parse({row.kind: row.spec}, message)
    if row.time_limit_seconds is not None:
        message.time_limit.FromMilliseconds(int(row.time_limit_seconds * 1000))
    if row.hang_timeout_seconds is not None:
        message.hang_timeout.FromMilliseconds(int(row.hang_timeout_seconds * 1000))
    if row.progress:
        parse(row.progress, message.progress)
    if row.result:
        parse(row.result, message.result)
    if row.error:
        parse(row.error, message.error)
    if trials and not message.result.trials:
        message.result.trials.extend(
            parse(trial.document, sweep_pb2.Trial()) for trial in sorted(trials, key=lambda trial: trial.trial_id)
        )
    return message


def new_job(row: tables.Job, asked: job_pb2.Job) -> job_pb2.Job:
    """The same as `job` of a row that has just been made of `asked`, which need not be read out of JSON then."""
    message = job_pb2.Job()
    message.CopyFrom(asked)
    for name in OUTPUT_ONLY:
        message.ClearField(name)
    made = stamp(row.create_time)
    message.MergeFrom(
        job_pb2.Job(
            name=job_name(row),
            uid=row.uid,
            kind=row.kind,
            state=State(row.state).proto,
            create_time=made,
            update_time=made,
            etag=f'"{row.version}"',
            sequence=row.sequence,
            creator=row.creator,
            usage=job_pb2.Usage(cpu_seconds=0, gpu_seconds=0),
        )
    )
    return message


def job_run(row: tables.JobRun) -> job_pb2.JobRun:
    """A run's row as the contract's message."""
    message = job_pb2.JobRun(
        run=row.run,
        create_time=stamp(row.create_time),
        claim_time=stamp(row.claim_time),
        end_time=stamp(row.end_time),
        end_reason=EndReason(row.end_reason).proto,
        workers=row.workers,
        resumed_step=row.resumed_step,
    )
    if row.error:
        parse(row.error, message.error)
    return message


def job_event(row: tables.JobEvent) -> job_pb2.JobEvent:
    """An event's row as the contract's message."""
    return job_pb2.JobEvent(
        sequence=row.sequence,
        time=stamp(row.time),
        type=job_pb2.JobEventType.ValueType(row.type),
        state=State(row.state).proto,
        end_reason=EndReason(row.end_reason).proto,
        run=row.run,
        message=row.message,
    )


def checkpoint(job: tables.Job, row: tables.Checkpoint) -> job_pb2.Checkpoint:
    """A checkpoint's row as the contract's message."""
    return job_pb2.Checkpoint(
        name=f"{job_name(job)}/checkpoints/{row.run}-{row.step}",
        run=row.run,
        step=row.step,
        uri=row.uri,
        manifest_sha256=row.manifest_sha256,
        size_bytes=row.size_bytes,
        metrics=numbers(row.figures),
        create_time=stamp(row.create_time),
    )


def key(row: tables.ApiKey) -> admin_pb2.Key:
    """A key's row as the contract's message."""
    return admin_pb2.Key(
        name=f"projects/{row.project_id}/keys/{row.id}",
        display_name=row.display_name,
        role=admin_pb2.Role.ValueType(row.role),
        create_time=stamp(row.create_time),
        expire_time=stamp(row.expire_time),
        revoke_time=stamp(row.revoke_time),
        scopes=row.scopes,
        member=row.member,
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
    )
