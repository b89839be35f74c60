"""A coordinator without a coordinator: the five services in memory behind a real gRPC server, for tests of clients and CLI.

It speaks the contract (statuses, error details, paging, request ids, numbered events) and runs nothing. Tests set what it holds,
queue failures with `fail`, and cut its streams with `cut_streams_after`.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from luthier.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

TOKEN = "lut_" + "t" * 43


@dataclass
class Failure:
    """What a call answers instead of doing anything."""

    code: grpc.StatusCode
    message: str = "made to fail"
    reason: str = ""
    violations: tuple[tuple[str, str], ...] = ()
    bare: bool = False


@dataclass
class Recorded:
    """A call that arrived."""

    method: str
    request: Any
    metadata: dict[str, str]


def refuse(context: grpc.ServicerContext, failure: Failure) -> NoReturn:
    """End a call with a status and its details, the way the coordinator does."""
    if failure.bare:
        context.abort(failure.code, failure.message)
    details = []
    for item in (
        error_details_pb2.ErrorInfo(reason=failure.reason or failure.code.name, domain="luthier", metadata={"id": "c-1"}),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in failure.violations]
        ),
    ):
        packed = any_pb2.Any()
        packed.Pack(item)
        details.append(packed)
    context.abort_with_status(
        rpc_status.to_status(status_pb2.Status(code=failure.code.value[0], message=failure.message, details=details))
    )
    raise AssertionError("abort_with_status returns to nobody")


@dataclass
class FakeCoordinator:
    """The server and everything it holds. Use as a context manager; `address` is where it listens."""

    token: str = TOKEN
    port: int = 0
    on_create: Callable[[FakeCoordinator, job_pb2.Job], None] | None = None
    jobs: dict[str, job_pb2.Job] = field(default_factory=dict)
    events: dict[str, list[job_pb2.WatchJobResponse]] = field(default_factory=lambda: defaultdict(list))
    logs: dict[str, list[job_pb2.LogLine]] = field(default_factory=lambda: defaultdict(list))
    datasets: dict[str, list[dataset_pb2.DatasetVersion]] = field(default_factory=lambda: defaultdict(list))
    models: dict[str, list[model_pb2.ModelVersion]] = field(default_factory=lambda: defaultdict(list))
    lineage: dict[str, list[model_pb2.LineageNode]] = field(default_factory=lambda: defaultdict(list))
    endpoints: dict[str, endpoint_pb2.Endpoint] = field(default_factory=dict)
    keys: list[admin_pb2.Key] = field(default_factory=list)
    status: admin_pb2.GetStatusResponse = field(default_factory=admin_pb2.GetStatusResponse)
    calls: list[Recorded] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
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
        job_pb2_grpc.add_JobServiceServicer_to_server(_Jobs(self), server)
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(_Datasets(self), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), server)
        endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(_Endpoints(self), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(_Admin(self), server)
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


def _page(items: list[Any], request: Any) -> tuple[list[Any], str]:
    start, size = int(request.page_token or 0), request.page_size or 50
    return items[start : start + size], str(start + size) if start + size < len(items) else ""


class _Service:
    def __init__(self, fake: FakeCoordinator) -> None:
        self.fake = fake


class _Jobs(_Service, job_pb2_grpc.JobServiceServicer):
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

    def GetJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetJob", request)
        return job_pb2.GetJobResponse(job=self.fake.find(context, self.fake.jobs, request.name))

    def ListJobs(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListJobs", request)
        jobs, token = _page(list(self.fake.jobs.values())[::-1], request)
        return job_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    def CancelJob(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "CancelJob", request)
        job = self.fake.find(context, self.fake.jobs, request.name)
        self.fake.emit(job, job_pb2.JOB_STATE_CANCELLED, "cancelled")
        return job_pb2.CancelJobResponse(job=job)

    def WatchJob(self, request: Any, context: Any) -> Iterator[Any]:
        fake = self.fake
        fake.enter(context, "WatchJob", request)
        job = fake.find(context, fake.jobs, request.name)
        left = fake.cut_streams_after.popleft() if fake.cut_streams_after else None
        sent = 0
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
                yield item
                if item.HasField("job"):
                    return
            if not items:
                yield job_pb2.WatchJobResponse(bookmark=job.sequence)

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


def _find_version(fake: FakeCoordinator, context: Any, held: dict[str, list[Any]], name: str) -> Any:
    _, _, collection, thing, _, version = name.split("/")
    versions = held.get(thing, [])
    for item in versions:
        aliases = getattr(item, "aliases", ())
        if item.name.endswith(f"/{version}") or version in aliases:
            return item
    if version == "latest" and versions:
        return versions[-1]
    refuse(context, Failure(grpc.StatusCode.NOT_FOUND, f"there is no {collection[:-1]} {thing}@{version}", "NOT_FOUND"))


class _Datasets(_Service, dataset_pb2_grpc.DatasetServiceServicer):
    def UploadDataset(self, request_iterator: Iterable[Any], context: Any) -> Any:
        fake = self.fake
        header, body = None, b""
        for item in request_iterator:
            if item.WhichOneof("item") == "header":
                header = item.header
                fake.enter(context, "UploadDataset", header)
            else:
                body += item.chunk
        assert header is not None

        def make() -> Any:
            versions = fake.datasets[header.dataset_id]
            version = dataset_pb2.DatasetVersion(
                name=f"{header.parent}/datasets/{header.dataset_id}/versions/{len(versions) + 1}",
                row_count=body.count(b"\n"),
                content_hash=header.sha256,
                schema=dataset_pb2.DatasetSchema(
                    shape=dataset_pb2.ROW_SHAPE_TEXT_LABEL, columns=header.columns, labels=["a", "b"]
                ),
                splits=[
                    dataset_pb2.DatasetSplit(name="train", row_count=body.count(b"\n") - 1),
                    dataset_pb2.DatasetSplit(name="test", row_count=1),
                ],
                state=dataset_pb2.DATASET_STATE_READY,
                source_filename=header.filename,
            )
            versions.append(version)
            fake.uploads[version.name] = body
            return version

        version = fake.once(context, header.request_id, header.SerializeToString(), make)
        return dataset_pb2.UploadDatasetResponse(dataset_version=version)

    def ListDatasets(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListDatasets", request)
        held = [
            dataset_pb2.Dataset(name=f"projects/default/datasets/{name}", latest_version=f"{name}@{len(versions)}")
            for name, versions in sorted(self.fake.datasets.items())
        ]
        datasets, token = _page(held, request)
        return dataset_pb2.ListDatasetsResponse(datasets=datasets, next_page_token=token)

    def GetDatasetVersion(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetDatasetVersion", request)
        version = _find_version(self.fake, context, self.fake.datasets, request.name)
        return dataset_pb2.GetDatasetVersionResponse(dataset_version=version)

    def ListDatasetVersions(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListDatasetVersions", request)
        versions, token = _page(self.fake.datasets[request.parent.split("/")[-1]][::-1], request)
        return dataset_pb2.ListDatasetVersionsResponse(dataset_versions=versions, next_page_token=token)


class _Models(_Service, model_pb2_grpc.ModelServiceServicer):
    def UploadModel(self, request_iterator: Iterable[Any], context: Any) -> Any:
        fake = self.fake
        header, path, body = None, "", {}
        for item in request_iterator:
            match item.WhichOneof("item"):
                case "header":
                    header = item.header
                    fake.enter(context, "UploadModel", header)
                case "file":
                    path = item.file.path
                    body[path] = b""
                case "chunk":
                    body[path] += item.chunk
        assert header is not None

        def make() -> Any:
            version = self.add(header.model_id, base=header.source, method="import")
            fake.uploads |= {f"{version.name}/{name}": content for name, content in body.items()}
            return version

        version = fake.once(context, header.request_id, header.SerializeToString(), make)
        return model_pb2.UploadModelResponse(model_version=version)

    def add(self, model: str, **values: Any) -> model_pb2.ModelVersion:
        versions = self.fake.models[model]
        version = model_pb2.ModelVersion(name=f"projects/default/models/{model}/versions/{len(versions) + 1}", **values)
        versions.append(version)
        return version

    def ListModels(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListModels", request)
        held = [
            model_pb2.Model(name=f"projects/default/models/{name}", latest_version=f"{name}@{len(versions)}")
            for name, versions in sorted(self.fake.models.items())
        ]
        models, token = _page(held, request)
        return model_pb2.ListModelsResponse(models=models, next_page_token=token)

    def GetModelVersion(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetModelVersion", request)
        version = _find_version(self.fake, context, self.fake.models, request.name)
        return model_pb2.GetModelVersionResponse(model_version=version)

    def ListModelVersions(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListModelVersions", request)
        versions, token = _page(self.fake.models[request.parent.split("/")[-1]][::-1], request)
        return model_pb2.ListModelVersionsResponse(model_versions=versions, next_page_token=token)

    def SetAlias(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "SetAlias", request)
        version = _find_version(self.fake, context, self.fake.models, request.name)
        version.aliases.append(request.alias)
        return model_pb2.SetAliasResponse(model_version=version)

    def GetLineage(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetLineage", request)
        version = _find_version(self.fake, context, self.fake.models, request.name)
        return model_pb2.GetLineageResponse(nodes=self.fake.lineage[version.name])


class _Endpoints(_Service, endpoint_pb2_grpc.EndpointServiceServicer):
    def DeployEndpoint(self, request: Any, context: Any) -> Any:
        fake = self.fake
        fake.enter(context, "DeployEndpoint", request)
        name = f"{request.parent}/endpoints/{request.endpoint_id}"
        endpoint = endpoint_pb2.Endpoint()
        endpoint.CopyFrom(request.endpoint)
        endpoint.name, endpoint.url, endpoint.state = name, fake.gateway_url, endpoint_pb2.ENDPOINT_STATE_DEPLOYING
        if not request.validate_only:
            fake.endpoints[name] = endpoint
        return endpoint_pb2.DeployEndpointResponse(endpoint=endpoint)

    def GetEndpoint(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetEndpoint", request)
        endpoint = self.fake.find(context, self.fake.endpoints, request.name)
        answer = endpoint_pb2.GetEndpointResponse(endpoint=endpoint)
        # Each look brings it on: deploying, then ready; deleting, then gone.
        if endpoint.state == endpoint_pb2.ENDPOINT_STATE_DEPLOYING:
            endpoint.state = endpoint_pb2.ENDPOINT_STATE_READY
        elif endpoint.state == endpoint_pb2.ENDPOINT_STATE_DELETING:
            del self.fake.endpoints[request.name]
        return answer

    def ListEndpoints(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListEndpoints", request)
        endpoints, token = _page(list(self.fake.endpoints.values()), request)
        return endpoint_pb2.ListEndpointsResponse(endpoints=endpoints, next_page_token=token)

    def DeleteEndpoint(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "DeleteEndpoint", request)
        endpoint = self.fake.find(context, self.fake.endpoints, request.name)
        endpoint.state = endpoint_pb2.ENDPOINT_STATE_DELETING
        return endpoint_pb2.DeleteEndpointResponse(endpoint=endpoint)


class _Admin(_Service, admin_pb2_grpc.AdminServiceServicer):
    def CreateKey(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "CreateKey", request)
        key = admin_pb2.Key()
        key.CopyFrom(request.key)
        key.name = f"{request.parent}/keys/k-{len(self.fake.keys) + 1}"
        self.fake.keys.insert(0, key)
        return admin_pb2.CreateKeyResponse(key=key, token="lut_" + "n" * 43)

    def ListKeys(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "ListKeys", request)
        keys, token = _page(self.fake.keys, request)
        return admin_pb2.ListKeysResponse(keys=keys, next_page_token=token)

    def RevokeKey(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "RevokeKey", request)
        key = self.fake.find(context, {key.name: key for key in self.fake.keys}, request.name)
        key.revoke_time.GetCurrentTime()
        return admin_pb2.RevokeKeyResponse(key=key)

    def GetStatus(self, request: Any, context: Any) -> Any:
        self.fake.enter(context, "GetStatus", request)
        return self.fake.status
