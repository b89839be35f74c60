"""The part of JobService that tells what happened: events, log lines, checkpoints, figures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import tuple_
from sqlmodel import Session, col, select

from common.errors import InvalidArgument, NotFound, OutOfRange, Unavailable, Violation
from coordinator import messages
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.states import TERMINAL, State
from coordinator.notify import Notifier
from coordinator.services import paging
from coordinator.services.feed import ProjectFeeds
from coordinator.services.job_lookup import find_job, whole_job, with_queue
from coordinator.services.log_filter import LineFilter
from coordinator.services.principal import Context, Principal, principal
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import job_pb2, job_pb2_grpc

BOOKMARK_SECONDS = 10.0
"""Silence after which a watch sends a bookmark."""

LOOK_SECONDS = 1.0
"""How often a watch looks by itself, should no hint come."""

BATCH = 500
"""Events or lines read at a time."""


class JobHistory(job_pb2_grpc.JobServiceServicer):
    """Translates calls about what a job did."""

    def __init__(self, store: Store, notifier: Notifier, reconciler: Reconciler) -> None:
        self._store = store
        self._notifier = notifier
        self._reconciler = reconciler
        self._feeds = ProjectFeeds(store, notifier)

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
            if sent < row.events_compacted:
                if request.after_sequence:
                    raise _compacted(f"of {request.name}", row.events_compacted)
                sent = row.events_compacted
                yield job_pb2.WatchJobResponse(bookmark=sent)
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

    async def WatchJobs(self, request: job_pb2.WatchJobsRequest, context: Context) -> AsyncIterator[job_pb2.WatchJobsResponse]:
        """See job.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        async with self._feeds.of(who.project) as feed:
            if request.after_sequence > feed.last:
                bad = Violation("after_sequence", f"{request.after_sequence} is beyond the last event, {feed.last}")
                raise InvalidArgument.of([bad])
            sent = feed.last if request.after_sequence < 0 else request.after_sequence
            yield job_pb2.WatchJobsResponse(bookmark=sent, sequence=sent)
            silent = 0.0
            while True:
                look = await feed.after(sent)
                if request.after_sequence and sent < look.compacted:
                    raise _compacted(f"of {request.parent}", look.compacted)
                for event in look.events:
                    if event.sequence > sent + 1 and sent < look.holes:
                        # Those in between are gone, and all others have been sent.
                        yield job_pb2.WatchJobsResponse(bookmark=event.sequence - 1, sequence=event.sequence - 1)
                    yield event
                    sent = event.sequence
                sent = max(sent, look.seen)
                if look.events:
                    silent = 0.0
                    continue
                if silent >= BOOKMARK_SECONDS:
                    silent = 0.0
                    yield job_pb2.WatchJobsResponse(bookmark=sent, sequence=sent)
                self._check_open()
                if not await feed.news(LOOK_SECONDS):
                    silent += LOOK_SECONDS

    async def TailLogs(self, request: job_pb2.TailLogsRequest, context: Context) -> AsyncIterator[job_pb2.TailLogsResponse]:
        """See job.proto."""
        who = principal()
        uid = (await self._store.read(lambda session: find_job(session, who, request.name))).uid
        wanted = LineFilter.of(request)
        sent = request.after_sequence
        while True:
            found = await self._store.read(partial(_lines_after, uid=uid, sequence=sent, wanted=wanted))
            if found.gone is not None:
                yield job_pb2.TailLogsResponse(lines=[found.gone], seen=found.gone.sequence)
            if found.seen > sent:
                sent = found.seen
                yield job_pb2.TailLogsResponse(lines=found.lines, seen=sent)
            if found.more:
                continue
            if not request.follow or found.ended:
                return
            await self._pause(uid)

    async def ListCheckpoints(self, request: job_pb2.ListCheckpointsRequest, context: Context) -> job_pb2.ListCheckpointsResponse:
        """See job.proto."""
        who = principal()
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 2)

        def work(session: Session) -> tuple[tables.Job, Sequence[tables.Checkpoint]]:
            point = tables.Checkpoint
            job = find_job(session, who, request.parent, "parent")
            query = select(point).where(point.job_uid == job.uid, col(point.delete_time).is_(None))
            if after is not None:
                query = query.where(tuple_(col(point.run), col(point.step)) < tuple(after))
            return job, session.exec(query.order_by(col(point.run).desc(), col(point.step).desc()).limit(size + 1)).all()

        job, rows = await self._store.read(work)
        response = job_pb2.ListCheckpointsResponse(checkpoints=[messages.checkpoint(job, row) for row in rows[:size]])
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
                    run=row.run,
                    step=row.step,
                    time=messages.stamp(row.time),
                    values=messages.numbers(row.figures),
                    trial=row.trial,
                )
                for row in rows[:size]
            ]
        )
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def _job(self, who: Principal, name: str) -> job_pb2.Job:
        job = await self._store.read(lambda session: whole_job(session, find_job(session, who, name)))
        return with_queue(self._reconciler, job)

    async def _pause(self, uid: str) -> None:
        self._check_open()
        await self._notifier.wait(uid, LOOK_SECONDS)

    def _check_open(self) -> None:
        if self._notifier.closing.is_set():
            raise Unavailable("the coordinator is stopping; watch again from the last number", "STOPPING")


def _compacted(whose: str, upto: int) -> OutOfRange:
    why = f"events up to {upto} {whose} are no longer kept; watch after 0 for what is left, or read the jobs themselves"
    return OutOfRange(why, "COMPACTED", metadata={"first_sequence": str(upto + 1)})


def _watched(session: Session, uid: str) -> tables.Job:
    row = session.get(tables.Job, uid)
    if row is None or row.delete_time is not None:
        raise NotFound("the job has just been deleted", "JOB_NOT_FOUND")
    return row


def _events_after(session: Session, uid: str, sequence: int) -> tuple[Sequence[tables.JobEvent], tables.Job]:
    # The job's row is read first: an event that comes in between is then found in the next round, never skipped.
    row = _watched(session, uid)
    events = session.exec(
        select(tables.JobEvent)
        .where(tables.JobEvent.job_uid == uid, tables.JobEvent.sequence > sequence, tables.JobEvent.sequence <= row.sequence)
        .order_by(col(tables.JobEvent.sequence))
        .limit(BATCH)
    ).all()
    return events, row


@dataclass(frozen=True)
class _Lines:
    """What one look at a log found: lines that match, and how far it looked."""

    lines: list[job_pb2.LogLine]
    seen: int
    more: bool
    ended: bool
    gone: job_pb2.LogLine | None


def _lines_after(session: Session, uid: str, sequence: int, wanted: LineFilter) -> _Lines:
    job = _watched(session, uid)
    gone = None
    if sequence < job.logs_compacted:
        gone, sequence = _gone(job, sequence), job.logs_compacted
    query = select(tables.JobLog).where(tables.JobLog.job_uid == uid, tables.JobLog.sequence > sequence)
    rows = session.exec(query.order_by(col(tables.JobLog.sequence)).limit(BATCH)).all()
    lines = [_log_line(row) for row in rows if wanted.takes(row)]
    seen = rows[-1].sequence if rows else sequence
    return _Lines(lines, seen, len(rows) == BATCH, State(job.state) in TERMINAL, gone)


def _gone(job: tables.Job, sequence: int) -> job_pb2.LogLine:
    """Stands for the lines after a number that are no longer kept."""
    return job_pb2.LogLine(
        sequence=job.logs_compacted,
        time=messages.stamp(job.update_time),
        source="luthier",
        level="WARNING",
        message=f"{job.logs_compacted - sequence} older lines are no longer kept",
    )


def _log_line(row: tables.JobLog) -> job_pb2.LogLine:
    return job_pb2.LogLine(
        sequence=row.sequence,
        time=messages.stamp(row.time),
        run=row.run,
        source=row.source,
        level=row.level,
        message=row.message,
    )
