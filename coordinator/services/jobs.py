"""JobService."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from functools import partial

from sqlalchemy import tuple_
from sqlmodel import Session, col, select

from common.errors import InvalidArgument, NotFound, Unavailable, Violation
from coordinator import messages
from coordinator.jobs import create
from coordinator.jobs.reconcile import Reconciler, wish_end
from coordinator.jobs.resolve import resolve
from coordinator.jobs.resources import fill_in
from coordinator.jobs.states import TERMINAL, EndReason, State
from coordinator.jobs.validate import validate
from coordinator.notify import Notifier
from coordinator.services import paging
from coordinator.services.principal import ADMIN, Context, Principal, principal
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import job_pb2, job_pb2_grpc

BOOKMARK_SECONDS = 10.0
"""Silence after which a watch sends a bookmark."""

LOOK_SECONDS = 1.0
"""How often a watch looks by itself, should no hint come."""

BATCH = 500
"""Events or lines read at a time."""


class JobService(job_pb2_grpc.JobServiceServicer):
    """Translates calls about jobs."""

    def __init__(self, store: Store, notifier: Notifier, reconciler: Reconciler) -> None:
        self._store = store
        self._notifier = notifier
        self._reconciler = reconciler

    async def CreateJob(self, request: job_pb2.CreateJobRequest, context: Context) -> job_pb2.CreateJobResponse:
        """See job.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        if len(request.request_id) > 128:
            raise InvalidArgument.of([Violation("request_id", "longer than 128 characters")])
        identity = create.request_of(who.project, who.display_name, request)
        row = await self._store.read(lambda session: create.earlier(session, identity))
        if row is not None:
            return job_pb2.CreateJobResponse(job=messages.job(row))
        job = job_pb2.Job()
        job.CopyFrom(request.job)
        validate(job)
        capacity = self._reconciler.queue.capacity
        fill_in(job, capacity is not None and capacity.total.gpus > 0)
        resolved = await resolve(self._store, who.project, job, paths_allowed=who.role >= ADMIN)
        if request.validate_only:
            return job_pb2.CreateJobResponse(job=job)
        row = await self._store.write(lambda session: create.insert(session, identity, job, resolved))
        self._notifier.notify("scheduler")
        return job_pb2.CreateJobResponse(job=messages.job(row))

    async def GetJob(self, request: job_pb2.GetJobRequest, context: Context) -> job_pb2.GetJobResponse:
        """See job.proto."""
        return job_pb2.GetJobResponse(job=await self._job(principal(), request.name))

    async def ListJobs(self, request: job_pb2.ListJobsRequest, context: Context) -> job_pb2.ListJobsResponse:
        """See job.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 2)
        wanted = parse_filter(request.filter)

        def work(session: Session) -> Sequence[tables.Job]:
            query = select(tables.Job).where(tables.Job.project_id == who.project)
            for name, value in wanted.items():
                if name.startswith("label."):
                    query = query.where(col(tables.Job.labels)[name.removeprefix("label.")].as_string() == value)
                else:
                    query = query.where(getattr(tables.Job, name) == value)
            if after is not None:
                point = (datetime.fromisoformat(after[0]), after[1])
                query = query.where(tuple_(col(tables.Job.create_time), col(tables.Job.uid)) < point)
            query = query.order_by(col(tables.Job.create_time).desc(), col(tables.Job.uid).desc()).limit(size + 1)
            return session.exec(query).all()

        rows = await self._store.read(work)
        response = job_pb2.ListJobsResponse(jobs=[self._with_queue(messages.job(row)) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].create_time.isoformat(), rows[size - 1].uid)
        return response

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: Context) -> job_pb2.CancelJobResponse:
        """See job.proto."""
        who = principal()

        def work(session: Session) -> str:
            row = find_job(session, who, request.name)
            wish_end(session, row.uid, EndReason.USER)
            return row.uid

        uid = await self._store.write(work)
        self._notifier.notify(uid, "scheduler")
        return job_pb2.CancelJobResponse(job=await self._job(who, request.name))

    async def WatchJob(self, request: job_pb2.WatchJobRequest, context: Context) -> AsyncIterator[job_pb2.WatchJobResponse]:
        """See job.proto."""
        who = principal()
        uid = (await self._store.read(lambda session: find_job(session, who, request.name))).uid
        sent, progress_sent, silent = request.after_sequence, 0, 0.0
        while True:
            events, row = await self._store.read(partial(_events_after, uid=uid, sequence=sent))
            if request.after_sequence > row.sequence:
                bad = Violation("after_sequence", f"{request.after_sequence} is beyond the last event, {row.sequence}")
                raise InvalidArgument.of([bad])
            for event in events:
                message = job_pb2.WatchJobResponse(event=messages.job_event(event))
                sent = event.sequence
                if State(event.state) in TERMINAL and sent == row.sequence:
                    message.job.CopyFrom(await self._job(who, request.name))
                yield message
            if State(row.state) in TERMINAL and sent >= row.sequence:
                return
            if row.progress_version != progress_sent and row.progress:
                progress_sent, silent = row.progress_version, 0.0
                yield job_pb2.WatchJobResponse(progress=messages.parse(row.progress, job_pb2.Progress()))
            elif events:
                silent = 0.0
            elif silent >= BOOKMARK_SECONDS:
                silent = 0.0
                yield job_pb2.WatchJobResponse(bookmark=sent)
            if len(events) < BATCH:
                await self._pause(uid)
                silent += LOOK_SECONDS

    async def TailLogs(self, request: job_pb2.TailLogsRequest, context: Context) -> AsyncIterator[job_pb2.TailLogsResponse]:
        """See job.proto."""
        who = principal()
        uid = (await self._store.read(lambda session: find_job(session, who, request.name))).uid
        sent = request.after_sequence
        while True:
            lines, state = await self._store.read(partial(_lines_after, uid=uid, sequence=sent, source=request.source))
            if lines:
                sent = lines[-1].sequence
                yield job_pb2.TailLogsResponse(lines=[_log_line(line) for line in lines])
            if len(lines) == BATCH:
                continue
            if not request.follow or State(state) in TERMINAL:
                return
            await self._pause(uid)

    async def ListCheckpoints(self, request: job_pb2.ListCheckpointsRequest, context: Context) -> job_pb2.ListCheckpointsResponse:
        """See job.proto."""
        who = principal()
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 2)

        def work(session: Session) -> Sequence[tables.Checkpoint]:
            point = tables.Checkpoint
            query = select(point).where(point.job_uid == find_job(session, who, request.parent, "parent").uid)
            if after is not None:
                query = query.where(tuple_(col(point.run), col(point.step)) < tuple(after))
            return session.exec(query.order_by(col(point.run).desc(), col(point.step).desc()).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = job_pb2.ListCheckpointsResponse(
            checkpoints=[
                job_pb2.Checkpoint(
                    name=f"{request.parent}/checkpoints/{row.run}-{row.step}",
                    run=row.run,
                    step=row.step,
                    uri=row.uri,
                    manifest_sha256=row.manifest_sha256,
                    size_bytes=row.size_bytes,
                    create_time=messages.stamp(row.create_time),
                )
                for row in rows[:size]
            ]
        )
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].run, rows[size - 1].step)
        return response

    async def ListJobMetrics(self, request: job_pb2.ListJobMetricsRequest, context: Context) -> job_pb2.ListJobMetricsResponse:
        """See job.proto."""
        who = principal()
        size = paging.page_size(request.page_size, default=1000, most=10_000)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> Sequence[tables.Metric]:
            query = select(tables.Metric).where(tables.Metric.job_uid == find_job(session, who, request.parent, "parent").uid)
            if after is not None:
                query = query.where(col(tables.Metric.id) > after[0])
            return session.exec(query.order_by(col(tables.Metric.id)).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = job_pb2.ListJobMetricsResponse(
            points=[
                job_pb2.MetricPoint(
                    run=row.run, step=row.step, time=messages.stamp(row.time), values=_numbers(row.figures), trial=row.trial
                )
                for row in rows[:size]
            ]
        )
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def _job(self, who: Principal, name: str) -> job_pb2.Job:
        def work(session: Session) -> job_pb2.Job:
            row = find_job(session, who, name)
            trials = session.exec(select(tables.Trial).where(tables.Trial.job_uid == row.uid)).all()
            return messages.job(row, list(trials))

        return self._with_queue(await self._store.read(work))

    def _with_queue(self, job: job_pb2.Job) -> job_pb2.Job:
        """Say why a queued job waits, by the scheduler's last round."""
        if job.state == job_pb2.JOB_STATE_QUEUED:
            decision = self._reconciler.queue.decisions.get(job.uid)
            job.queue.waiting_for = decision.reason if decision else "the scheduler's next round"
            job.queue.position = decision.position if decision else 0
        return job

    async def _pause(self, uid: str) -> None:
        if self._notifier.closing.is_set():
            raise Unavailable("the coordinator is stopping; watch again from the last number", "STOPPING")
        await self._notifier.wait(uid, LOOK_SECONDS)


def find_job(session: Session, who: Principal, name: str, field: str = "name") -> tables.Job:
    """The job of that name in the caller's project; NotFound otherwise."""
    (job_id,) = who.own(name, "jobs", field=field)
    row = session.exec(select(tables.Job).where(tables.Job.project_id == who.project, tables.Job.job_id == job_id)).first()
    if row is None:
        raise NotFound(f"there is no job {job_id!r}; `luthier job list` shows those there are", "JOB_NOT_FOUND")
    return row


def parse_filter(text: str) -> dict[str, str]:
    """Read `state=RUNNING AND label.team=search`; InvalidArgument names the term that cannot be read."""
    wanted = {}
    for term in re.split(r"\s+AND\s+|\s+", text.strip()) if text.strip() else []:
        name, equals, value = term.partition("=")
        value = value.strip('"')
        if name == "state":
            value = value.upper().removeprefix("JOB_STATE_")
        good = name in ("state", "kind", "display_name", "creator") or re.fullmatch(r"label\.[\w./-]{1,63}", name)
        if not (equals and good) or (name == "state" and value not in State.__members__):
            why = (
                f"cannot read {term[:80]!r}; write state=RUNNING, kind=sweep, display_name=x or label.team=search, joined by AND"
            )
            raise InvalidArgument.of([Violation("filter", why)])
        wanted[name] = value
    return wanted


def _events_after(session: Session, uid: str, sequence: int) -> tuple[Sequence[tables.JobEvent], tables.Job]:
    # The job's row is read first: an event that comes in between is then found in the next round, never skipped.
    row = session.get_one(tables.Job, uid)
    events = session.exec(
        select(tables.JobEvent)
        .where(tables.JobEvent.job_uid == uid, tables.JobEvent.sequence > sequence, tables.JobEvent.sequence <= row.sequence)
        .order_by(col(tables.JobEvent.sequence))
        .limit(BATCH)
    ).all()
    return events, row


def _lines_after(session: Session, uid: str, sequence: int, source: str) -> tuple[Sequence[tables.JobLog], str]:
    state = session.get_one(tables.Job, uid).state
    query = select(tables.JobLog).where(tables.JobLog.job_uid == uid, tables.JobLog.sequence > sequence)
    if source:
        query = query.where(tables.JobLog.source == source)
    return session.exec(query.order_by(col(tables.JobLog.sequence)).limit(BATCH)).all(), state


def _log_line(row: tables.JobLog) -> job_pb2.LogLine:
    return job_pb2.LogLine(
        sequence=row.sequence,
        time=messages.stamp(row.time),
        run=row.run,
        source=row.source,
        level=row.level,
        message=row.message,
    )


def _numbers(figures: dict[str, float]) -> dict[str, float]:
    """Figures as numbers: JSON keeps NaN and infinities as words."""
    return {name: float(value) for name, value in figures.items()}
