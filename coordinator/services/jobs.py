"""JobService."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from sqlalchemy import tuple_
from sqlmodel import Session, col, select

from common.errors import InvalidArgument, LuthierError, Violation
from coordinator import messages
from coordinator.collector import TOPIC as COLLECTOR
from coordinator.estimates.estimate import estimate
from coordinator.jobs import create, submit
from coordinator.jobs import secrets as job_secrets
from coordinator.jobs.change import Change
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.resolve import resolve
from coordinator.jobs.resources import fill_in
from coordinator.jobs.states import EndReason
from coordinator.jobs.submit import Submission
from coordinator.jobs.validate import validate
from coordinator.jobs.wishes import wish_end, wish_pause, wish_resume
from coordinator.notify import Notifier
from coordinator.removal import delete_job
from coordinator.services import paging
from coordinator.services.job_history import JobHistory
from coordinator.services.job_lookup import find_job, parse_filter, say_what_blocks, with_queue
from coordinator.services.principal import OPERATOR, Context, principal
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.vault import Vault
from luthier.v1 import job_pb2


class JobService(JobHistory):
    """Translates calls about jobs."""

    def __init__(self, store: Store, notifier: Notifier, reconciler: Reconciler, vault: Vault) -> None:
        super().__init__(store, notifier, reconciler)
        self._vault = vault

    async def CreateJob(self, request: job_pb2.CreateJobRequest, context: Context) -> job_pb2.CreateJobResponse:
        """See job.proto."""
        who = principal()
        who.own(request.parent, field="parent")
        if len(request.request_id) > 128:
            raise InvalidArgument.of([Violation("request_id", "longer than 128 characters")])
        identity = create.request_of(who.project, who.creator, request)
        job = job_pb2.Job()
        job.CopyFrom(request.job)
        try:
            validate(job)
            capacity = self._reconciler.queue.capacity
            fill_in(job, capacity is not None and capacity.total.gpus > 0)
            token = await job_secrets.hub_token(self._store, self._vault, who.project, job)
            resolved = await resolve(self._store, who.project, job, who.role >= OPERATOR, token)
        except LuthierError:
            # Said again, a request gets the job that it made, even where it could not make one now.
            before = await self._store.read(lambda session: create.earlier(session, identity))
            if before is None:
                raise
            return job_pb2.CreateJobResponse(job=messages.job(before))
        if request.validate_only:
            before = await self._store.read(lambda session: create.earlier(session, identity))
            if before is not None:
                return job_pb2.CreateJobResponse(job=messages.job(before))
            needs = await estimate(self._store, who.project, job, resolved, await self._reconciler.capacity())
            return job_pb2.CreateJobResponse(job=job, estimate=needs)
        if job.after:
            row = await self._store.write(lambda session: create.insert(session, identity, job, resolved))
            made = messages.job(row)
        else:
            submission = Submission.of(identity, job, resolved)
            row = await self._store.write_together(submit.record, submission)
            made = messages.new_job(row, job) if row.uid == submission.row["uid"] else messages.job(row)
        self._notifier.notify("scheduler")
        return job_pb2.CreateJobResponse(job=made)

    async def EstimateJob(self, request: job_pb2.EstimateJobRequest, context: Context) -> job_pb2.EstimateJobResponse:
        """See job.proto."""
        asked = job_pb2.CreateJobRequest(parent=request.parent, job=request.job, validate_only=True)
        answer = await self.CreateJob(asked, context)
        return job_pb2.EstimateJobResponse(job=answer.job, estimate=answer.estimate)

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

        def work(session: Session) -> tuple[Sequence[tables.Job], list[job_pb2.Job]]:
            query = select(tables.Job).where(tables.Job.project_id == who.project, col(tables.Job.delete_time).is_(None))
            for name, value in wanted.items():
                if name.startswith("label."):
                    query = query.where(col(tables.Job.labels)[name.removeprefix("label.")].as_string() == value)
                else:
                    query = query.where(getattr(tables.Job, name) == value)
            if after is not None:
                point = (datetime.fromisoformat(after[0]), after[1])
                query = query.where(tuple_(col(tables.Job.create_time), col(tables.Job.uid)) < point)
            query = query.order_by(col(tables.Job.create_time).desc(), col(tables.Job.uid).desc()).limit(size + 1)
            rows = session.exec(query).all()
            shown = [messages.job(row) for row in rows[:size]]
            for row, message in zip(rows, shown, strict=False):
                say_what_blocks(session, row, message)
            return rows, shown

        rows, shown = await self._store.read(work)
        response = job_pb2.ListJobsResponse(jobs=[with_queue(self._reconciler, message) for message in shown])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].create_time.isoformat(), rows[size - 1].uid)
        return response

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: Context) -> job_pb2.CancelJobResponse:
        """See job.proto."""
        job = await self._wish(request.name, lambda session, uid: wish_end(session, uid, EndReason.USER))
        return job_pb2.CancelJobResponse(job=job)

    async def PauseJob(self, request: job_pb2.PauseJobRequest, context: Context) -> job_pb2.PauseJobResponse:
        """See job.proto."""
        job = await self._wish(request.name, lambda session, uid: wish_pause(session, uid, EndReason.USER))
        return job_pb2.PauseJobResponse(job=job)

    async def ResumeJob(self, request: job_pb2.ResumeJobRequest, context: Context) -> job_pb2.ResumeJobResponse:
        """See job.proto."""
        return job_pb2.ResumeJobResponse(job=await self._wish(request.name, wish_resume))

    async def UpdateJob(self, request: job_pb2.UpdateJobRequest, context: Context) -> job_pb2.UpdateJobResponse:
        """See job.proto."""
        principal().own(request.job.name, "jobs", field="job.name")  # whose job it is comes before what is wrong with the change
        change = Change.of(request)
        job = await self._wish(request.job.name, lambda session, uid: change.apply(session, uid), field="job.name")
        return job_pb2.UpdateJobResponse(job=job)

    async def DeleteJob(self, request: job_pb2.DeleteJobRequest, context: Context) -> job_pb2.DeleteJobResponse:
        """See job.proto."""
        who = principal()
        await self._store.write(lambda session: delete_job(session, find_job(session, who, request.name), request.etag))
        self._notifier.notify(COLLECTOR)
        return job_pb2.DeleteJobResponse()

    async def _wish(self, name: str, wish: Callable[[Session, str], bool], field: str = "name") -> job_pb2.Job:
        who = principal()

        def work(session: Session) -> str:
            uid = find_job(session, who, name, field).uid
            wish(session, uid)
            return uid

        uid = await self._store.write(work)
        self._notifier.notify(uid, "scheduler")
        return await self._job(who, name)
