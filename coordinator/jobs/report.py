"""Applying what a run reports: in order, each number once, and only from the run that counts."""

from __future__ import annotations

import secrets
from datetime import UTC
from typing import Any

from google.protobuf.json_format import MessageToDict
from sqlalchemy import update
from sqlmodel import Session, col, select

from common.causes import end_reason
from common.errors import FailedPrecondition, PermissionDenied
from common.keeping import Keep, kept
from common.names import parse_version_ref
from coordinator import messages, registry
from coordinator.jobs import records
from coordinator.jobs.ending import Ended, end_run
from coordinator.jobs.hang import hang, told
from coordinator.jobs.states import ACTIVE, TERMINAL, EndReason, State
from coordinator.jobs.tokens import claim_token, sha256
from coordinator.store import tables
from coordinator.store.tables import now
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2, model_pb2

MAX_LOG_LINE = 8000
_KINDS: dict[str, model_pb2.ModelKind.ValueType] = {
    "adapter": model_pb2.MODEL_KIND_ADAPTER,
    "reward": model_pb2.MODEL_KIND_REWARD,
}
"""Characters of a log line that are kept."""

STOPPED_FROM_OUTSIDE = {
    "code": "STOPPED_FROM_OUTSIDE",
    "message": "a signal stopped the run that nobody asked for here; its node is going down, or somebody stopped the Ray job",
    "source": "driver",
}


def claim(session: Session, stack_secret: str, request: agent_pb2.ClaimRunRequest) -> tables.Job:
    """Give a run to the process that holds its token: once, or again to the same process.

    Raises PermissionDenied for a wrong or spent token, FailedPrecondition for a run that no longer counts.
    """
    token = claim_token(stack_secret, request.job_uid, request.run)
    if not secrets.compare_digest(token, request.claim_token) or len(request.session_secret) < 32:
        raise PermissionDenied("this token does not claim this run", "CLAIM_REFUSED")
    job_run = session.get(tables.JobRun, (request.job_uid, request.run))
    job = session.get(tables.Job, request.job_uid)
    if job is None or job_run is None or job.run != request.run or State(job.state) not in ACTIVE:
        raise FailedPrecondition("this run no longer counts", "STALE_RUN")
    session_hash = sha256(request.session_secret)
    if job_run.session_sha256 and not secrets.compare_digest(job_run.session_sha256, session_hash):
        raise PermissionDenied("this run is claimed already", "CLAIM_REFUSED")
    if not job_run.session_sha256:
        job_run.session_sha256 = session_hash
        job_run.claim_time = job_run.report_time = now()
        session.add(job_run)
        session.flush()
        records.move(
            session,
            job.uid,
            State.RUNNING,
            f"run {request.run} claimed by its agent",
            run=request.run,
            start_time=job.start_time or now(),
        )
        job = session.get_one(tables.Job, request.job_uid)
        if job.pause_time is not None:
            records.move(session, job.uid, State.PAUSING, "to be paused, as was asked before it began", run=request.run)
            job = session.get_one(tables.Job, request.job_uid)
    return job


def apply(session: Session, request: agent_pb2.ReportRequest) -> tuple[tables.Job, int]:
    """Apply a batch of reports; return the job as it is then and the number of the last report that is recorded.

    Raises PermissionDenied for a wrong secret and FailedPrecondition where the run no longer counts. A run that has ended may
    still repeat what it reported: the answer tells it that all of it is recorded.
    """
    job = session.get(tables.Job, request.job_uid)
    job_run = session.get(tables.JobRun, (request.job_uid, request.run))
    if job is None or job_run is None or not job_run.session_sha256:
        raise PermissionDenied("unknown run", "REPORT_REFUSED")
    if not secrets.compare_digest(job_run.session_sha256, sha256(request.session_secret)):
        raise PermissionDenied("wrong session secret", "REPORT_REFUSED")
    key = (request.job_uid, request.run, request.source)
    cursor = session.get(tables.ReportCursor, key)
    last = cursor.last if cursor else 0
    fresh = [report for report in request.reports if report.sequence > last]
    if job.run != request.run or (State(job.state) in TERMINAL and fresh and request.source == "driver"):
        raise FailedPrecondition(f"run {request.run} no longer counts: the job is {job.state} in run {job.run}", "STALE_RUN")
    if fresh and fresh[0].sequence != last + 1:
        raise FailedPrecondition(f"report {last + 1} of {request.source} is missing before {fresh[0].sequence}", "REPORT_GAP")
    job_run.report_time = now()
    session.add(job_run)
    if State(job.state) in TERMINAL:
        return job, fresh[-1].sequence if fresh else last
    if fresh:
        # Before what they say: an outcome ends the run, and what it spent is added up by that.
        last = fresh[-1].sequence
        tokens = max(cursor.trained_tokens if cursor else 0, *(report.progress.trained_tokens for report in fresh))
        session.merge(tables.ReportCursor(job_uid=key[0], run=key[1], source=key[2], last=last, trained_tokens=tokens))
        session.flush()
    for report in fresh:
        _apply_one(session, request, report)
    session.flush()
    session.expire_all()
    return session.get_one(tables.Job, request.job_uid), last


def _apply_one(session: Session, request: agent_pb2.ReportRequest, report: agent_pb2.Report) -> None:
    uid, run, source = request.job_uid, request.run, request.source
    kind = report.WhichOneof("body")
    moment = report.time.ToDatetime(tzinfo=UTC)
    if "/" in source and kind in ("phase", "progress"):
        # A rank of a trial. What a sweep as a whole does, its driver tells.
        return
    if kind == "phase":
        records.add_event(session, uid, job_pb2.JOB_EVENT_TYPE_PHASE, report.phase.message or report.phase.phase, run=run)
        records.set_unnumbered(
            session, uid, run, progress={"phase": report.phase.phase}, progress_version=tables.Job.progress_version + 1
        )
    elif kind == "progress":
        records.set_unnumbered(
            session, uid, run, progress=messages.document(report.progress), progress_version=tables.Job.progress_version + 1
        )
    elif kind == "metrics":
        session.add(
            tables.Metric(
                job_uid=uid,
                run=run,
                step=report.metrics.step,
                trial=report.metrics.trial,
                time=moment,
                figures=MessageToDict(report.metrics).get("values", {}),
            )
        )
    elif kind == "log":
        _add_log(session, uid, run, source, report)
    elif kind == "checkpoint":
        point = report.checkpoint
        session.merge(
            tables.Checkpoint(
                job_uid=uid,
                run=run,
                step=point.step,
                uri=point.uri,
                manifest_sha256=point.manifest_sha256,
                size_bytes=point.size_bytes,
                figures=messages.document(point).get("metrics", {}),
                create_time=now(),
            )
        )
        _forget_collected(session, uid, run)
        message = f"checkpoint at step {point.step} published ({point.size_bytes / 1e6:.1f} MB)"
        records.add_event(session, uid, job_pb2.JOB_EVENT_TYPE_CHECKPOINT, message, run=run)
    elif kind == "engine":
        result = dict(session.get_one(tables.Job, uid).result)
        records.set_unnumbered(session, uid, run, result=result | {"engine": messages.document(report.engine)})
        session.expire_all()
    elif kind == "partial":
        result = messages.document(report.partial) | dict(session.get_one(tables.Job, uid).result)
        records.set_unnumbered(session, uid, run, result=result)
        session.expire_all()
    elif kind == "trial":
        _set_trial(session, uid, run, report)
    elif kind == "failure":
        job_run = session.get_one(tables.JobRun, (uid, run))
        failure = messages.document(report.failure) | {"source": report.failure.source or source, "time": moment.isoformat()}
        job_run.failures = [*job_run.failures, failure]
        session.add(job_run)
        session.flush()
    elif kind == "standing":
        job_run = session.get_one(tables.JobRun, (uid, run))
        job_run.standings = told(job_run.standings, source, messages.document(report.standing))
        session.add(job_run)
        session.flush()
    elif kind == "outcome" and source == "driver":
        end(session, uid, run, report.outcome)


def _forget_collected(session: Session, uid: str, run: int) -> None:
    """Take the checkpoints of the run out of the records that its own ranks have deleted, by the same rule."""
    job = session.get_one(tables.Job, uid)
    if job.kind != "finetune":
        return  # each trial of a sweep keeps its own
    session.flush()
    point = tables.Checkpoint
    points = session.exec(select(point).where(point.job_uid == uid, point.run == run)).all()
    staying = kept(Keep.of(job.spec.get("checkpoints", {})), {each.step: messages.numbers(each.figures) for each in points})
    for each in points:
        if each.step not in staying:
            session.delete(each)
    session.flush()


def _add_log(session: Session, uid: str, run: int, source: str, report: agent_pb2.Report) -> None:
    lines = report.log.lines
    if not lines:
        return
    statement: Any = (
        update(tables.Job)
        .where(col(tables.Job.uid) == uid)
        .values(log_sequence=tables.Job.log_sequence + len(lines))
        .returning(col(tables.Job.log_sequence))
        .execution_options(synchronize_session=False)
    )
    first = session.execute(statement).scalar_one() - len(lines) + 1
    session.add_all(
        tables.JobLog(
            job_uid=uid,
            sequence=first + offset,
            time=line.time.ToDatetime(tzinfo=UTC) if line.HasField("time") else now(),
            run=run,
            source=line.source or source,
            level=line.level or "info",
            message=line.message[:MAX_LOG_LINE],
        )
        for offset, line in enumerate(lines)
    )


def _set_trial(session: Session, uid: str, run: int, report: agent_pb2.Report) -> None:
    trial = report.trial
    known = session.get(tables.Trial, (uid, trial.id))
    changed = known is None or known.document.get("state") != messages.document(trial).get("state")
    session.merge(tables.Trial(job_uid=uid, trial_id=trial.id, document=messages.document(trial)))
    if changed:
        state = messages.document(trial).get("state", "").removeprefix("TRIAL_STATE_").lower()
        drawn = ", ".join(f"{path.split('.')[-1]}={value}" for path, value in sorted(trial.parameters.items()))
        message = f"{trial.id} {state} ({drawn})"
        records.add_event(session, uid, job_pb2.JOB_EVENT_TYPE_TRIAL, message, run=run)


def end(session: Session, uid: str, run: int, outcome: agent_pb2.OutcomeReport) -> bool:
    """End a run as its outcome says, registering what it made, all in one. False where it has ended already."""
    job = session.get_one(tables.Job, uid)
    state = State(job_pb2.JobState.Name(outcome.state).removeprefix("JOB_STATE_"))
    reason = EndReason.of(outcome.end_reason)
    result = dict(job.result) | messages.document(outcome.result)
    error = messages.document(outcome.error) if outcome.HasField("error") else {}
    if reason is EndReason.TIME_LIMIT:
        error = over_time(job)
    elif state is State.FAILED:
        error, reason = cause(session.get_one(tables.JobRun, (uid, run)), error, reason)
    if state is State.PAUSED and job.cancel_time is not None:
        # It saved and stopped, and in the meantime somebody wanted more than that.
        state, reason, error = as_wished(job)
    elif state is State.CANCELLED and job.cancel_time is None:
        # A signal reached it that was none of ours, or one that we sent because it had not been heard of.
        state, reason, error = State.FAILED, EndReason.AGENT_LOST, dict(STOPPED_FROM_OUTSIDE)
    if state is State.SUCCEEDED and outcome.HasField("model"):
        row = _register(session, job, run, outcome)
        result["model_version"] = f"{row.model_id}@{row.version}"
    said = {State.SUCCEEDED: "succeeded", State.CANCELLED: "cancelled"}.get(state, error.get("message", "failed"))
    if "model_version" in result and state is State.SUCCEEDED:
        said += f": {result['model_version']} registered"
    if state is State.SUCCEEDED and reason is EndReason.BUDGET:
        said += ", with what it had learned when its budget was spent"
    return end_run(session, uid, run, Ended(state, reason, said, error, result))


def as_wished(job: tables.Job) -> tuple[State, EndReason, dict[str, Any]]:
    """How a job ends that was told to."""
    if job.cancel_reason == EndReason.TIME_LIMIT:
        return State.FAILED, EndReason.TIME_LIMIT, over_time(job)
    return State.CANCELLED, EndReason(job.cancel_reason), {}


def over_time(job: tables.Job) -> dict[str, Any]:
    """The error of a job that was stopped at its time limit."""
    limit = f"{job.time_limit_seconds or 0:g} s"
    return {"code": "TIME_LIMIT", "message": f"stopped after its time limit of {limit}; raise time_limit, or do less"}


def cause(job_run: tables.JobRun, error: dict[str, Any], reason: EndReason) -> tuple[dict[str, Any], EndReason]:
    """Why a run failed, and what a retry policy should see; `error` and `reason` are what its driver, or Ray, said.

    A rank that gave itself up as hung leaves, and all the others see is that it went.
    """
    hung = hang(job_run.standings, job_run.workers)
    if hung is not None:
        return hung, EndReason.HANG
    found = root_cause(job_run.failures, error)
    if reason is EndReason.AGENT_LOST and found.get("code") != error.get("code"):
        # What a rank had told before the agent died is why, and decides whether another try makes sense.
        reason = EndReason(end_reason(found["code"]))
    return found, reason


def root_cause(failures: list[dict[str, Any]], error: dict[str, Any]) -> dict[str, Any]:
    """What the driver names as the cause if it names a process, else the failure that the run's processes reported first.

    A rank that dies takes the others with it, so that all later exceptions tell of a broken connection, not of the cause. A
    driver that lived to tell knows more: a rank that was killed reports nothing, and its peers are then the first to complain.
    """
    if error.get("source", "driver") != "driver":
        return error
    evidence = sorted((failure for failure in failures if failure.get("source") != "driver"), key=lambda failure: failure["time"])
    if not evidence:
        return {name: value for name, value in error.items() if name != "time"}
    return {name: value for name, value in evidence[0].items() if name != "time"}


def _register(session: Session, job: tables.Job, run: int, outcome: agent_pb2.OutcomeReport) -> tables.ModelVersion:
    made = outcome.model
    spec = job.spec.get("finetune", job.spec)
    dataset = job.inputs["artifacts"].get("dataset", {})
    rows = (
        registry.find_dataset(session, job.project_id, parse_version_ref(dataset["name"], "dataset", "datasets"))
        if dataset
        else None
    )
    base = made.base
    version = model_pb2.ModelVersion(
        base=base.name or spec.get("base", ""),
        method=made.parameters.get("method") or spec.get("method", "import"),
        metrics=made.metrics,
        lineage=model_pb2.Lineage(
            job=messages.job_name(job),
            run=run,
            dataset_version=dataset.get("name", ""),
            dataset_content_hash=rows.content_hash if rows else "",
            base=base.name,
            base_content_hash=base.content_hash,
            base_revision=base.revision,
            sweep=messages.job_name(job) if job.kind == "sweep" else "",
            trial=made.trial,
            parameters=made.parameters,
        ),
        content_hash=made.content_hash,
        artifact_uri=made.uri,
        kind=_KINDS.get(made.model_kind, model_pb2.MODEL_KIND_FULL),
        size_bytes=made.size_bytes,
        chat_template_sha256=made.chat_template_sha256,
    )
    if made.model_kind == "adapter":
        version.base_artifact_uri = base.uri
        version.base_content_hash = base.content_hash
    return registry.add_model_version(session, job.project_id, spec["output_model"], version, job_uid=job.uid)
