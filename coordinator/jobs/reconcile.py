"""The loop that makes wishes and observations true: starts what may start, ends what has ended, stops what should stop.

It keeps nothing that the store and Ray cannot give back: a coordinator that was killed goes on from what it finds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from sqlmodel import Session, col, select

from common.errors import LuthierError, Unavailable
from coordinator.cluster.launcher import Launcher, submission_id
from coordinator.cluster.ray_cluster import Capacity, Submission
from coordinator.jobs import records
from coordinator.jobs.report import over_time, root_cause
from coordinator.jobs.states import ACTIVE, EndReason, State
from coordinator.notify import Notifier
from coordinator.scheduling.model import Demand
from coordinator.scheduling.plan import Decision, Waiting, plan
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.tables import Job, JobRun, now
from luthier.v1 import job_pb2

log = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between rounds when nothing wakes the loop."""

CAPACITY_PERIOD = 5.0
"""Seconds for which the cluster's size is taken as known."""

CANCEL_GRACE = timedelta(seconds=20)
"""How long a run may take to stop by itself before Ray is told to end it."""

SUBMIT_DEADLINE = timedelta(seconds=120)
"""How long a run that Ray does not know may stay STARTING while submitting it fails."""


@dataclass(frozen=True)
class Queue:
    """The decisions of the last round, for those who ask why a job waits."""

    decisions: dict[str, Decision]
    capacity: Capacity | None
    held: Demand


class Reconciler:
    """Runs in the coordinator's event loop as one task."""

    def __init__(self, store: Store, launcher: Launcher, notifier: Notifier) -> None:
        self._store = store
        self._launcher = launcher
        self._cluster = launcher.cluster
        self._notifier = notifier
        self._capacity: Capacity | None = None
        self._capacity_until = 0.0
        self.cluster_error = "not asked yet"
        self.queue = Queue({}, None, Demand())

    async def run(self) -> None:
        """Go round until cancelled. A round that fails is logged and tried again."""
        while not self._notifier.closing.is_set():
            try:
                await self.round()
            except Unavailable as error:
                log.warning("%s", error)
            except Exception:
                log.exception("a round of the reconciler failed")
            await self._notifier.wait("scheduler", PERIOD)

    async def round(self) -> None:
        """Look once at everything that is not terminal."""
        await self._expire()
        await self._observe()
        await self._start()

    async def capacity(self) -> Capacity | None:
        """What the cluster has, at most some seconds old; None while it does not answer."""
        loop_time = asyncio.get_running_loop().time()
        if loop_time >= self._capacity_until:
            try:
                self._capacity = await asyncio.to_thread(self._cluster.capacity)
                self.cluster_error = ""
            except Unavailable as error:
                self._capacity, self.cluster_error = None, error.message
            self._capacity_until = asyncio.get_running_loop().time() + (CAPACITY_PERIOD if self._capacity else PERIOD)
        return self._capacity

    async def _start(self) -> None:
        capacity = await self.capacity()
        queued, held = await self._store.read(_queue)
        waiting = [Waiting(job.uid, job.priority, job.create_time, Demand(job.cpus, job.gpus)) for job in queued]
        decisions = plan(waiting, held, capacity.total if capacity else None)
        self.queue = Queue({decision.uid: decision for decision in decisions}, capacity, held)
        for decision in decisions:
            if decision.start:
                await self._launch(decision)

    async def _launch(self, decision: Decision) -> None:
        job = await self._store.write(lambda session: _begin_run(session, decision))
        if job is not None:
            self._notifier.notify(job.uid)
            await self._submit(job)

    async def _submit(self, job: Job) -> None:
        try:
            await asyncio.to_thread(self._launcher.launch, job)
        except Unavailable as error:
            if now() - job.update_time > SUBMIT_DEADLINE:
                failure = {"code": "LAUNCH_FAILED", "message": f"Ray did not take the job: {error.message}"}
                await self._end(job, State.FAILED, EndReason.LAUNCH_FAILED, failure)
            else:
                log.warning("run %s of %s is not submitted yet: %s", job.run, job.job_id, error)

    async def _observe(self) -> None:
        active = await self._store.read(_active)
        if not active:
            return
        submissions = await asyncio.to_thread(self._cluster.submissions)
        # What ended reported its outcome before it did: only jobs that are still active now have died without a word.
        for job in await self._store.read(_active):
            if all(job.uid != other.uid or job.run != other.run for other in active):
                continue
            submission = submissions.get(submission_id(job.uid, job.run))
            if submission is None:
                await self._unknown_to_ray(job)
            elif submission.ended:
                await self._ended_without_a_word(job, submission)
            elif job.cancel_time is not None and (job.state == State.STARTING or now() - job.cancel_time > CANCEL_GRACE):
                await asyncio.to_thread(self._cluster.stop, submission_id(job.uid, job.run))

    async def _unknown_to_ray(self, job: Job) -> None:
        if job.cancel_time is not None:
            await self._end_as_wished(job)
        elif job.state == State.STARTING:
            await self._submit(job)
        else:
            failure = {
                "code": "CLUSTER_LOST",
                "message": "the Ray cluster no longer knows this run: its head was restarted or lost",
            }
            await self._end(job, State.FAILED, EndReason.NODE_LOST, failure)

    async def _ended_without_a_word(self, job: Job, submission: Submission) -> None:
        if job.cancel_time is not None:
            await self._end_as_wished(job)
            return
        try:
            tail = await asyncio.to_thread(self._cluster.log_tail, submission_id(job.uid, job.run))
        except LuthierError as error:
            tail = [error.message]
        words = submission.message.strip().splitlines()
        failure = {
            "code": "AGENT_LOST",
            "message": "the job's process on the cluster ended without a result" + (f": {words[0][:500]}" if words else ""),
            "source": "driver",
            "traceback": "\n".join(tail)[-4000:],
        }
        await self._end(job, State.FAILED, EndReason.AGENT_LOST, failure)

    async def _end_as_wished(self, job: Job) -> None:
        if job.cancel_reason == EndReason.TIME_LIMIT:
            await self._end(job, State.FAILED, EndReason.TIME_LIMIT, over_time(job))
        else:
            await self._end(job, State.CANCELLED, EndReason.USER, {})

    async def _end(self, job: Job, state: State, reason: EndReason, failure: dict[str, str]) -> None:
        def work(session: Session) -> None:
            error = dict(failure)
            if reason is EndReason.AGENT_LOST:
                error = root_cause(session.get_one(JobRun, (job.uid, job.run)).failures, error)
            message = error.get("message", state.value.lower())
            records.move(session, job.uid, state, message, run=job.run, end_reason=reason, error=error)

        await self._store.write(work)
        self._notifier.notify(job.uid, "scheduler")

    async def _expire(self) -> None:
        for uid in await self._store.read(_over_time):
            if await self._store.write(partial(wish_end, uid=uid, reason=EndReason.TIME_LIMIT)):
                self._notifier.notify(uid)


def wish_end(session: Session, uid: str, reason: EndReason) -> bool:
    """Record that a job should end; one that holds nothing ends at once. False where there is nothing to end."""
    said = "time limit reached" if reason is EndReason.TIME_LIMIT else "cancelled by a user"
    idle = [State.BLOCKED, State.QUEUED, State.PAUSED]
    if records.move(
        session, uid, State.CANCELLED, said, sources=idle, end_reason=reason, cancel_time=now(), cancel_reason=reason.value
    ):
        return True
    job = session.get_one(Job, uid)
    if State(job.state) not in ACTIVE or job.cancel_time is not None:
        return False
    event = job_pb2.JOB_EVENT_TYPE_CANCEL_REQUESTED
    return records.add_event(session, uid, event, said, run=job.run, cancel_time=now(), cancel_reason=reason.value)


def _active(session: Session) -> Sequence[Job]:
    return session.exec(select(Job).where(col(Job.state).in_([state.value for state in ACTIVE]))).all()


def _queue(session: Session) -> tuple[Sequence[Job], Demand]:
    queued = session.exec(select(Job).where(Job.state == State.QUEUED.value)).all()
    held = Demand()
    for job in _active(session):
        held = held + Demand(job.cpus, job.gpus)
    for endpoint in session.exec(select(tables.Endpoint)).all():
        held = held + Demand(endpoint.cpus, endpoint.gpus)
    return queued, held


def _over_time(session: Session) -> list[str]:
    limited = session.exec(
        select(Job).where(
            col(Job.state).in_([state.value for state in ACTIVE]),
            col(Job.time_limit_seconds).is_not(None),
            col(Job.cancel_time).is_(None),
            col(Job.start_time).is_not(None),
        )
    ).all()
    moment = now()
    return [job.uid for job in limited if moment > _deadline(job)]


def _deadline(job: Job) -> datetime:
    return (job.start_time or now()) + timedelta(seconds=job.time_limit_seconds or 0)


def _begin_run(session: Session, decision: Decision) -> Job | None:
    job = session.get_one(Job, decision.uid)
    run = job.run + 1
    message = f"run {run} started: {decision.reason}"
    if not records.move(
        session, decision.uid, State.STARTING, message, sources=[State.QUEUED], run=job.run, next_run=run, progress={}, error={}
    ):
        return None
    session.add(JobRun(job_uid=decision.uid, run=run, submission_id=submission_id(decision.uid, run), create_time=now()))
    session.flush()
    session.expire_all()
    return session.get_one(Job, decision.uid)
