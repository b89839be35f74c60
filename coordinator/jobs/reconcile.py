"""The loop that makes wishes and observations true: starts what may start, ends what has ended, stops what should stop.

It keeps nothing that the store and Ray cannot give back: a coordinator that was killed goes on from what it finds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from opentelemetry.trace import SpanKind
from sqlmodel import Session, col, select

from common import tracing
from common.errors import LuthierError, Unavailable
from coordinator import metrics
from coordinator.cluster.autoscaler import Autoscaler
from coordinator.cluster.launcher import Launcher, run_of_submission, submission_id
from coordinator.cluster.ray_cluster import Capacity, Submission
from coordinator.jobs import records
from coordinator.jobs.ending import Ended, end_run, latest_checkpoint
from coordinator.jobs.expiry import expired
from coordinator.jobs.lease import Lease
from coordinator.jobs.report import as_wished, cause
from coordinator.jobs.resources import shape_of
from coordinator.jobs.situation import Records, active
from coordinator.jobs.states import EndReason, State
from coordinator.jobs.wishes import wish_pause
from coordinator.notify import Notifier
from coordinator.scheduling.model import Decision, Demand, Plan, Preemption, Situation
from coordinator.scheduling.plan import plan
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.store.tables import Job, JobRun, now

log = logging.getLogger(__name__)

T = TypeVar("T")

PERIOD = 1.0
"""Seconds between rounds when nothing wakes the loop."""

LINGER = 0.02
"""Seconds between what wakes the loop and its round."""

REST = 9.0
"""Pause after a round, as a multiple of what the round took."""

CAPACITY_PERIOD = 5.0
"""Seconds for which the cluster's size is taken as known."""

CANCEL_GRACE = timedelta(seconds=20)
"""How long a run may take to stop by itself before Ray is told to end it."""

PAUSE_GRACE = timedelta(minutes=10)
"""How long a run may take to save and stop. After that it is ended, and goes on from the checkpoint before."""

LEAVE_GRACE = timedelta(seconds=20)
"""How long the process of a run that has told its outcome may take to leave before Ray is told to end it."""

LEAVES = "its run before to leave the cluster"
"""Why a job waits whose last run has ended by its own word, but not by Ray's."""

REASONS_A_ROUND = 200
"""Events about what jobs wait for that one round writes at most."""

SUBMIT_DEADLINE = timedelta(seconds=120)
"""How long a run that Ray does not know may stay STARTING while submitting it fails."""


@dataclass(frozen=True)
class Queue:
    """The decisions of the last round, for those who ask why a job waits."""

    decisions: dict[str, Decision]
    capacity: Capacity | None
    held: Demand

    @property
    def total(self) -> Demand:
        """What the cluster has; nothing while it does not answer."""
        return self.capacity.total if self.capacity else Demand()

    @property
    def nodes(self) -> int:
        """How many nodes it has."""
        return len(self.capacity.nodes) if self.capacity else 0


class Reconciler:
    """Runs in the coordinator's event loop as one task."""

    def __init__(
        self, store: Store, launcher: Launcher, notifier: Notifier, leadership: Leadership, restored: bool = False
    ) -> None:
        """`restored` says that the records came out of a backup, so that Ray may know of runs that they do not."""
        self._store = store
        self._restored = restored
        self._taken: dict[str, int] = {}
        self._leadership = leadership
        self._epoch = leadership.epoch
        self._launcher = launcher
        self._cluster = launcher.cluster
        self._notifier = notifier
        self._capacity: Capacity | None = None
        self._capacity_until = 0.0
        self._lease = Lease()
        self._records = Records()
        self.autoscaler = Autoscaler(self._cluster)
        self.cluster_error = "not asked yet"
        self.queue = Queue({}, None, Demand())

    async def run(self) -> None:
        """Go round until cancelled. A round that fails is logged and tried again."""
        while not self._notifier.closing.is_set():
            # Whoever asked for the round is answered first, and those who come right behind share it.
            await asyncio.sleep(LINGER)
            started = asyncio.get_running_loop().time()
            try:
                await self.round()
            except Unavailable as error:
                log.warning("%s", error)
            except Exception:
                metrics.ROUND_FAILED.inc()
                log.exception("a round of the reconciler failed")
            # Every submission asks for a round: while many come in, rounds must not take the time that recording them needs.
            rest = min(REST * (asyncio.get_running_loop().time() - started), PERIOD)
            await asyncio.gather(self._notifier.wait("scheduler", PERIOD), self._notifier.wait("nothing but the end", rest))

    async def round(self) -> None:
        """Look once at everything that is not terminal. A coordinator that follows only looks, to say what waits for what."""
        epoch = self._leadership.epoch
        if epoch != self._epoch:
            self._epoch, self._lease = epoch, Lease()
        if not epoch:
            await self._plan()
            return
        await self._expire()
        try:
            await self._observe()
        except Unavailable:
            # Nothing can be started, but whoever waits is told for what, and what place it has.
            _, decided = await self._plan()
            await self._tell_reasons(decided.decisions)
            raise
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

    async def _write(self, work: Callable[[Session], T]) -> T:
        """Record something as the leader that this round began as. Raises NotLeading where that is over."""
        return await self._leadership.write(work, self._epoch)

    async def _stop_run(self, run: str) -> None:
        """Have Ray end a run, unless another leads meanwhile, who knows better."""
        await self._leadership.confirm(self._epoch)
        await asyncio.to_thread(self._cluster.stop, run)

    async def _plan(self) -> tuple[Situation, Plan]:
        capacity = await self.capacity()
        nodes = capacity.nodes if capacity else None
        with metrics.PLANNING.time():
            situation = await self._store.read(lambda session: self._records.read(session, nodes, now()))
            decided = await asyncio.to_thread(plan, situation)
        held = sum((holding.held for holding in situation.holding), Demand())
        self.queue = Queue({decision.uid: decision for decision in decided.decisions}, capacity, held)
        return situation, decided

    async def _start(self) -> None:
        situation, decided = await self._plan()
        decisions = await self._behind_their_runs(decided.decisions)
        self.queue = replace(self.queue, decisions={decision.uid: decision for decision in decisions})
        for preemption in decided.preemptions:
            await self._preempt(preemption)
        for decision in decisions:
            if decision.start:
                await self._launch(decision)
        await self._tell_reasons(decisions)
        starting = {decision.uid for decision in decided.decisions if decision.start}
        wanting = [*(job for job in situation.queue if job.uid in starting), *decided.wanting]
        self.autoscaler.tell(situation.holding, wanting)

    async def _behind_their_runs(self, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Hold back what may start but whose run before is still there: it has told its outcome, and takes its time to leave."""
        starting = [decision.uid for decision in decisions if decision.start]
        before = await self._store.read(lambda session: _runs_before(session, starting)) if starting else []
        if not before and not (starting and self._restored):
            return decisions
        submissions = await asyncio.to_thread(self._cluster.submissions)
        there = await self._end_unrecorded(starting, submissions) if self._restored else set()
        for run in before:
            submission = submissions.get(run.submission_id)
            if submission is not None and not submission.ended:
                there.add(run.job_uid)
                if run.end_time is not None and now() - run.end_time > LEAVE_GRACE:
                    await self._stop_run(run.submission_id)
        return [each._replace(start=False, reason=LEAVES) if each.uid in there else each for each in decisions]

    async def _end_unrecorded(self, starting: Sequence[str], submissions: Mapping[str, Submission]) -> set[str]:
        """Note which numbers Ray has seen of jobs that are to start: a store that was restored does not know of those that were
        begun after its backup, and begins none of them again. What still runs of them is ended; returns whose those are.
        """
        recorded = await self._store.read(lambda session: _numbers(session, starting))
        there = set()
        for name, submission in submissions.items():
            uid, run = run_of_submission(name)
            if run > recorded.get(uid, run):
                self._taken[uid] = max(run, self._taken.get(uid, 0))
                if not submission.ended:
                    there.add(uid)
                    await self._stop_run(name)
        return there

    async def _preempt(self, preemption: Preemption) -> None:
        def work(session: Session) -> bool:
            job = session.get_one(Job, preemption.uid)
            if job.state != State.RUNNING or job.cancel_time is not None:
                return False  # somebody was faster than the plan
            said = f"saves and gives its place up: {preemption.reason}"
            return wish_pause(session, preemption.uid, EndReason.PREEMPTED, said)

        if await self._write(work):
            metrics.PREEMPTIONS.inc()
            self._notifier.notify(preemption.uid)

    async def _tell_reasons(self, decisions: Sequence[Decision]) -> None:
        """Write an event for each job that waits for something else than when it was last told."""
        told = self._records.told
        news = {each.uid: each.reason for each in decisions if not each.start and told.get(each.uid, each.reason) != each.reason}
        if not news:
            return
        # The first of the queue are told first; with many, the others' turn comes in the next rounds.
        some = dict(islice(news.items(), REASONS_A_ROUND))
        self._notifier.notify(*await self._write(lambda session: records.tell_reasons(session, some)))

    async def _launch(self, decision: Decision) -> None:
        job = await self._write(lambda session: _begin_run(session, decision, self._taken.get(decision.uid, 0)))
        if job is not None:
            metrics.STARTS.inc()
            self._notifier.notify(job.uid)
            await self._submit(job)

    async def _submit(self, job: Job) -> None:
        who = {"luthier.project": job.project_id, "luthier.job": job.job_id, "luthier.run": job.run}
        with tracing.span("launch", job.trace_parent, SpanKind.PRODUCER, **who) as launch:
            try:
                await asyncio.to_thread(self._launcher.launch, job)
            except Unavailable as error:
                tracing.failed(launch, error.reason)
                if now() - job.update_time > SUBMIT_DEADLINE:
                    failure = {"code": "LAUNCH_FAILED", "message": f"Ray did not take the job: {error.message}"}
                    await self._end(job, State.FAILED, EndReason.LAUNCH_FAILED, failure)
                else:
                    log.warning("run %s of %s is not submitted yet: %s", job.run, job.job_id, error)

    async def _observe(self) -> None:
        running = await self._store.read(active)
        self._lease.look({job.uid for job in running})
        if not running:
            return
        submissions = await asyncio.to_thread(self._cluster.submissions)
        # What ended reported its outcome before it did: only jobs that are still active now have died without a word.
        known = {(job.uid, job.run) for job in running}
        reported = await self._store.read(lambda session: _last_reports(session, running))
        for job in await self._store.read(active):
            if (job.uid, job.run) not in known:
                continue
            submission = submissions.get(submission_id(job.uid, job.run))
            if submission is None:
                await self._unknown_to_ray(job)
            elif submission.ended:
                await self._ended_without_a_word(job, submission)
            elif self._overdue(job, reported.get((job.uid, job.run))):
                await self._stop_run(submission_id(job.uid, job.run))

    def _overdue(self, job: Job, reported: datetime | None) -> bool:
        """Whether Ray should end a run: it was to stop and did not, was never claimed, or was silent for too long."""
        moment = now()
        if job.cancel_time is not None and (job.state == State.STARTING or moment - job.cancel_time > CANCEL_GRACE):
            return True
        if job.state == State.PAUSING and job.pause_time is not None and moment - job.pause_time > PAUSE_GRACE:
            return True
        return self._lease.ran_out(job, reported)

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
        await self._end(job, *as_wished(job))

    async def _end(self, job: Job, state: State, reason: EndReason, failure: dict[str, Any]) -> None:
        def work(session: Session) -> None:
            error, why = dict(failure), reason
            if reason is EndReason.AGENT_LOST:
                error, why = cause(session.get_one(JobRun, (job.uid, job.run)), error, why)
            message = error.get("message", state.value.lower())
            end_run(session, job.uid, job.run, Ended(state, why, message, error))

        await self._write(work)
        metrics.RUN_ENDS.labels(reason.value.lower()).inc()
        self._notifier.notify(job.uid, "scheduler")

    async def _expire(self) -> None:
        for uid, wish, reason in await self._store.read(expired):
            if await self._write(partial(wish, uid=uid, reason=reason)):
                self._notifier.notify(uid)


def _last_reports(session: Session, jobs: Sequence[Job]) -> dict[tuple[str, int], datetime | None]:
    query = select(JobRun).where(col(JobRun.job_uid).in_([job.uid for job in jobs]), col(JobRun.end_time).is_(None))
    return {(run.job_uid, run.run): run.report_time for run in session.exec(query).all()}


def _runs_before(session: Session, uids: Sequence[str]) -> Sequence[JobRun]:
    """The last run of each of some jobs, where it had one."""
    query = select(JobRun).join(Job, col(Job.uid) == col(JobRun.job_uid)).where(col(Job.uid).in_(uids), JobRun.run == Job.run)
    return session.exec(query).all()


def _numbers(session: Session, uids: Sequence[str]) -> dict[str, int]:
    return dict(session.exec(select(Job.uid, Job.run).where(col(Job.uid).in_(uids))).all())


def _begin_run(session: Session, decision: Decision, taken: int = 0) -> Job | None:
    job = session.get_one(Job, decision.uid)
    if job.pause_time is not None:
        return None
    run = max(job.run, taken) + 1
    held = shape_of(job.shape, Demand(job.cpus, job.gpus)).total(decision.workers)
    point = latest_checkpoint(session, job)
    moved = records.move(
        session,
        decision.uid,
        State.STARTING,
        f"run {run} started: {decision.reason}",
        sources=[State.QUEUED],
        run=job.run,
        next_run=run,
        progress={},
        error={},
        cpus=held.cpus,
        gpus=held.gpus,
        queue_reason="",
        not_before=None,
    )
    if not moved:
        return None
    session.add(
        JobRun(
            job_uid=decision.uid,
            run=run,
            submission_id=submission_id(decision.uid, run),
            create_time=now(),
            workers=decision.workers,
            resumed_step=point.step if point is not None else 0,
            cpus=held.cpus,
            gpus=held.gpus,
        )
    )
    session.flush()
    session.expire_all()
    return session.get_one(Job, decision.uid)
