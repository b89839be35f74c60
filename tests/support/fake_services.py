"""A coordinator without a coordinator: the services in memory behind a real gRPC server, for tests of clients and CLI.

It speaks the contract (statuses, error details, paging, request ids, numbered events) and runs nothing. Tests set what it holds,
queue failures with `fail`, and cut its streams with `cut_streams_after`.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc

from luthier.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    member_pb2,
    member_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    secret_pb2,
    secret_pb2_grpc,
)
from luthier.v1.estimate_pb2 import JobEstimate
from tests.support.fake_calls import Failure, Recorded, Service, page, refuse
from tests.support.fake_registry import Admin, Datasets, Endpoints, Members, Models, Secrets

__all__ = ["TOKEN", "Failure", "FakeCoordinator"]

TOKEN = "lut_" + "t" * 43


@dataclass
class FakeCoordinator:
    """The server and everything it holds. Use as a context manager; `address` is where it listens."""

    token: str = TOKEN
    port: int = 0
    on_create: Callable[[FakeCoordinator, job_pb2.Job], None] | None = None
    jobs: dict[str, job_pb2.Job] = field(default_factory=dict)
    project_events: list[job_pb2.WatchJobsResponse] = field(default_factory=list)
    estimate: JobEstimate = field(default_factory=JobEstimate)
    events: dict[str, list[job_pb2.WatchJobResponse]] = field(default_factory=lambda: defaultdict(list))
    logs: dict[str, list[job_pb2.LogLine]] = field(default_factory=lambda: defaultdict(list))
    datasets: dict[str, list[dataset_pb2.DatasetVersion]] = field(default_factory=lambda: defaultdict(list))
    models: dict[str, list[model_pb2.ModelVersion]] = field(default_factory=lambda: defaultdict(list))
    lineage: dict[str, list[model_pb2.LineageNode]] = field(default_factory=lambda: defaultdict(list))
    endpoints: dict[str, endpoint_pb2.Endpoint] = field(default_factory=dict)
    secrets: dict[str, secret_pb2.Secret] = field(default_factory=dict)
    members: dict[str, member_pb2.Member] = field(default_factory=dict)
    keys: list[admin_pb2.Key] = field(default_factory=list)
    projects: dict[str, admin_pb2.Project] = field(default_factory=dict)
    status: admin_pb2.GetStatusResponse = field(default_factory=admin_pb2.GetStatusResponse)
    calls: list[Recorded] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    backup: bytes = b""
    backup_sent: bytes = b""
    cut_streams_after: deque[int] = field(default_factory=deque)
    gateway_url: str = "http://127.0.0.1:8000/v1"

    def __post_init__(self) -> None:
        self.lock = threading.Condition()
        self._failures: dict[str, deque[Failure]] = defaultdict(deque)
        self._requests: dict[str, tuple[bytes, Any]] = {}
        self._server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after `stop` on the same port as before."""
        server = grpc.server(futures.ThreadPoolExecutor(16))
        job_pb2_grpc.add_JobServiceServicer_to_server(Jobs(self), server)
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(Datasets(self), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(Models(self), server)
        endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(Endpoints(self), server)
        secret_pb2_grpc.add_SecretServiceServicer_to_server(Secrets(self), server)
        member_pb2_grpc.add_MemberServiceServicer_to_server(Members(self), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(self), server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        server.start()
        self._server = server
        self.status.coordinator.address, self.status.coordinator.pid = self.address, os.getpid()
        self.status.gateway.url, self.status.gateway.state = self.gateway_url, "not_started"
        self.status.ray.address, self.status.ray.connected = "http://127.0.0.1:8265", True

    def stop(self) -> None:
        """Go away at once, with every stream."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def fail(self, method: str, *failures: Failure) -> None:
        """Let the next calls of `method` fail, one after another."""
        self._failures[method].extend(failures)

    def called(self, method: str) -> list[Recorded]:
        """The calls of `method` so far."""
        return [call for call in self.calls if call.method == method]

    def enter(self, context: grpc.ServicerContext, method: str, request: Any) -> None:
        """Record a call, check its key, and fail it where a failure is queued."""
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        kept = type(request)()
        kept.CopyFrom(request)
        self.calls.append(Recorded(method, kept, metadata))
        if self._failures[method]:
            refuse(context, self._failures[method].popleft())
        if metadata.get("authorization") != f"Bearer {self.token}":
            refuse(context, Failure(grpc.StatusCode.UNAUTHENTICATED, "no valid key; pass one in LUTHIER_TOKEN", "NO_KEY"))

    def once(self, context: grpc.ServicerContext, request_id: str, body: bytes, make: Callable[[], Any]) -> Any:
        """Do something once per request id."""
        with self.lock:
            if request_id in self._requests:
                before, answer = self._requests[request_id]
                if before != body:
                    refuse(context, Failure(grpc.StatusCode.ALREADY_EXISTS, f"request_id {request_id!r} was used before"))
                return answer
            answer = make()
            if request_id:
                self._requests[request_id] = (body, answer)
            return answer

    def add_job(self, job: job_pb2.Job) -> job_pb2.Job:
        """Hold a job under the next name."""
        number = len(self.jobs) + 1
        job.name = f"projects/default/jobs/j-{number}"
        job.uid = f"uid-{number}"
        job.kind = job.WhichOneof("spec") or job.kind
        job.state = job.state or job_pb2.JOB_STATE_QUEUED
        self.jobs[job.name] = job
        return job

    def emit(self, job: job_pb2.Job, state: job_pb2.JobState.ValueType, message: str = "") -> None:
        """Record a numbered event; with a terminal state the job ends."""
        with self.lock:
            job.state = state
            job.sequence += 1
            event = job_pb2.JobEvent(
                sequence=job.sequence, type=job_pb2.JOB_EVENT_TYPE_STATE_CHANGED, state=state, message=message
            )
            event.time.GetCurrentTime()
            item = job_pb2.WatchJobResponse(event=event)
            if state in (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED):
                job.end_time.GetCurrentTime()
                item.job.CopyFrom(job)
            self.events[job.name].append(item)
            self.lock.notify_all()

    def progress(self, job: job_pb2.Job, progress: job_pb2.Progress) -> None:
        """Send progress to those who watch."""
        with self.lock:
            job.progress.CopyFrom(progress)
            self.events[job.name].append(job_pb2.WatchJobResponse(progress=progress))
            self.lock.notify_all()

    def find(self, context: grpc.ServicerContext, things: dict[str, Any], name: str) -> Any:
        """The thing of this name, or NOT_FOUND."""
        if name not in things:
            refuse(context, Failure(grpc.StatusCode.NOT_FOUND, f"there is no {name}", "NOT_FOUND"))
        return things[name]


class Jobs(Service, job_pb2_grpc.JobServiceServicer):
    def CreateJob(self, request: Any, context: Any) -> Any:
        fake = self.fake
        fake.enter(context, "CreateJob", request)
        if request.validate_only:
            return job_pb2.CreateJobResponse(job=request.job)
        job = fake.once(context, request.request_id, request.job.SerializeToString(), lambda: fake.add_job(request.job))
        if fake.on_create is not None and not fake.events[job.name]:
            fake.emit(job, job_pb2.JOB_STATE_QUEUED, "recorded")
            threading.Thread(target=fake.on_create, args=(fake, job), daemon=True).start()
        return job_pb2.CreateJobResponse(job=job)

    def EstimateJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "EstimateJob", request)
        return job_pb2.EstimateJobResponse(job=request.job, estimate=self.fake.estimate)

    def GetJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetJob", request)
        return job_pb2.GetJobResponse(job=self.fake.find(context, self.fake.jobs, request.name))

    def ListJobs(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListJobs", request)
        jobs, token = page(list(self.fake.jobs.values())[::-1], request)
        return job_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    def CancelJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "CancelJob", request)
        job = self.fake.find(context, self.fake.jobs, request.name)
        self.fake.emit(job, job_pb2.JOB_STATE_CANCELLED, "cancelled")
        return job_pb2.CancelJobResponse(job=job)

    def PauseJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "PauseJob", request)
        job = self.fake.find(context, self.fake.jobs, request.name)
        self.fake.emit(job, job_pb2.JOB_STATE_PAUSING, "pause asked for by a user")
        return job_pb2.PauseJobResponse(job=job)

    def ResumeJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ResumeJob", request)
        job = self.fake.find(context, self.fake.jobs, request.name)
        self.fake.emit(job, job_pb2.JOB_STATE_QUEUED, "resumed by a user")
        return job_pb2.ResumeJobResponse(job=job)

    def UpdateJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "UpdateJob", request)
        job = self.fake.find(context, self.fake.jobs, request.job.name)
        request.update_mask.MergeMessage(request.job, job, replace_message_field=True)
        return job_pb2.UpdateJobResponse(job=job)

    def DeleteJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "DeleteJob", request)
        del self.fake.jobs[self.fake.find(context, self.fake.jobs, request.name).name]
        return job_pb2.DeleteJobResponse()

    def WatchJob(self, request: Any, context: Any) -> Iterator[Any]:
        fake = self.fake
        fake.enter(context, "WatchJob", request)
        job = fake.find(context, fake.jobs, request.name)
        left = fake.cut_streams_after.popleft() if fake.cut_streams_after else None
        sent, seen = 0, request.after_sequence
        position = 0
        while context.is_active():
            with fake.lock:
                items = fake.events[job.name][position:]
                position += len(items)
                if not items:
                    fake.lock.wait(0.05)
            for item in items:
                if item.HasField("event") and item.event.sequence <= request.after_sequence:
                    continue
                if left is not None and sent >= left:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the server is going away")
                sent += 1
                seen = max(seen, item.event.sequence)
                yield item
                if item.HasField("job"):
                    return
            if not items:
                yield job_pb2.WatchJobResponse(bookmark=seen)

    def WatchJobs(self, request: Any, context: Any) -> Iterator[Any]:
        self.fake.enter(context, "WatchJobs", request)
        yield from self.fake.project_events
        context.abort(grpc.StatusCode.OUT_OF_RANGE, "no more is to come")

    def TailLogs(self, request: Any, context: Any) -> Iterator[Any]:
        fake = self.fake
        fake.enter(context, "TailLogs", request)
        job = fake.find(context, fake.jobs, request.name)
        seen = request.after_sequence
        while True:
            ended = job.HasField("end_time")
            lines = [line for line in fake.logs[job.name] if line.sequence > seen and request.source in ("", line.source)]
            for line in lines:
                seen = line.sequence
                yield job_pb2.TailLogsResponse(lines=[line])
                if fake.cut_streams_after and fake.cut_streams_after[0] <= seen:
                    fake.cut_streams_after.popleft()
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the server is going away")
            if not lines and (ended or not request.follow or not context.is_active()):
                return
            with fake.lock:
                fake.lock.wait(0.02)

    def ListCheckpoints(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListCheckpoints", request)
        return job_pb2.ListCheckpointsResponse()

    def ListJobMetrics(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListJobMetrics", request)
        return job_pb2.ListJobMetricsResponse()
