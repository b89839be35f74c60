"""A small typed client: the stubs with address and key attached, and the few loops that everybody would write."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from luthier.client.backups import BackupProgress, receive
from luthier.client.channel import open_channel
from luthier.client.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from luthier.client.names import full_name, full_version
from luthier.client.paging import page_through
from luthier.client.streams import STREAM_SECONDS, Stream, tail, watch, watch_endpoint, watch_project
from luthier.client.tenancy import TenancyCalls
from luthier.client.tls import Tls
from luthier.client.uploads import Progress, dataset_messages, model_files, model_messages, sha256_of
from luthier.v1 import admin_pb2, dataset_pb2, endpoint_pb2, job_pb2, model_pb2, schedule_pb2
from luthier.v1.admin_pb2_grpc import AdminServiceStub
from luthier.v1.dataset_pb2_grpc import DatasetServiceStub
from luthier.v1.endpoint_pb2_grpc import EndpointServiceStub
from luthier.v1.job_pb2_grpc import JobServiceStub
from luthier.v1.member_pb2_grpc import MemberServiceStub
from luthier.v1.model_pb2_grpc import ModelServiceStub
from luthier.v1.schedule_pb2_grpc import ScheduleServiceStub
from luthier.v1.secret_pb2_grpc import SecretServiceStub

DEFAULT_SERVER = "127.0.0.1:7420"
UPLOAD_TRIES = 3

T = TypeVar("T")


class Client(TenancyCalls):
    """A connection to a coordinator.

    `server` is host:port (else `LUTHIER_SERVER`, else 127.0.0.1:7420), `token` an API key (else `LUTHIER_TOKEN`), `timeout`
    the seconds that a call which is no stream may take. The attributes `jobs`, `datasets`, `models`, `endpoints`, `schedules`,
    `secrets`, `members` and `admin` are the generated stubs; key, deadline, retries and exceptions (`LuthierError`) are attached.
    Names may be short (`tickets@2`) in the methods of this class and are full (`projects/...`) in the messages. Use it as a
    context manager or call `close()`. It may be shared by threads.
    """

    def __init__(
        self,
        server: str | None = None,
        token: str | None = None,
        project: str = "default",
        timeout: float | None = 60.0,
        patience: float | None = 300.0,
        ca: Path | str | None = None,
        cert: Path | str | None = None,
        key: Path | str | None = None,
    ) -> None:
        """`patience` is how long `watch`, `wait` and `logs` try again while the coordinator is away; None is for ever.

        With `ca` (else `LUTHIER_CA`), a file of certificates, everything is encrypted and the coordinator has to prove itself by
        one of them. `cert` and `key` (else `LUTHIER_CERT` and `LUTHIER_KEY`) are for coordinators that ask the same of clients.
        """
        self.server = server or os.environ.get("LUTHIER_SERVER") or DEFAULT_SERVER
        self.project = project
        self._patience = patience
        token = os.environ.get("LUTHIER_TOKEN", "") if token is None else token
        self._channel = open_channel(self.server, token, timeout, Tls.of(ca, cert, key))
        self.jobs = JobServiceStub(self._channel)
        self.datasets = DatasetServiceStub(self._channel)
        self.models = ModelServiceStub(self._channel)
        self.endpoints = EndpointServiceStub(self._channel)
        self.schedules = ScheduleServiceStub(self._channel)
        self.secrets = SecretServiceStub(self._channel)
        self.members = MemberServiceStub(self._channel)
        self.admin = AdminServiceStub(self._channel)

    @property
    def parent(self) -> str:
        """Full name of the project."""
        return f"projects/{self.project}"

    def close(self) -> None:
        """Close the connection; calls in progress end."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # Jobs

    def create_job(self, job: job_pb2.Job, request_id: str | None = None, validate_only: bool = False) -> job_pb2.Job:
        """Record a job and return it. The same `request_id` gives the same job, however often it is sent."""
        request = job_pb2.CreateJobRequest(
            parent=self.parent, job=job, request_id=request_id or str(uuid.uuid4()), validate_only=validate_only
        )
        return self.jobs.CreateJob(request).job

    def estimate_job(self, job: job_pb2.Job) -> job_pb2.EstimateJobResponse:
        """Tell what a job would need, without recording it: memory, duration, and its place in the queue."""
        return self.jobs.EstimateJob(job_pb2.EstimateJobRequest(parent=self.parent, job=job))

    def get_job(self, name: str) -> job_pb2.Job:
        """Return a job."""
        return self.jobs.GetJob(job_pb2.GetJobRequest(name=self.job_name(name))).job

    def list_jobs(self, filter: str = "", page_size: int = 100) -> Iterator[job_pb2.Job]:
        """All jobs that match, newest first, for example `state=RUNNING AND kind=sweep`."""
        request = job_pb2.ListJobsRequest(parent=self.parent, filter=filter, page_size=page_size)
        return page_through(self.jobs.ListJobs, request, lambda page: page.jobs)

    def cancel_job(self, name: str) -> job_pb2.Job:
        """Ask for a job to end and return it as it is now."""
        return self.jobs.CancelJob(job_pb2.CancelJobRequest(name=self.job_name(name))).job

    def pause_job(self, name: str) -> job_pb2.Job:
        """Ask for a job to save and give its place up, and return it as it is now."""
        return self.jobs.PauseJob(job_pb2.PauseJobRequest(name=self.job_name(name))).job

    def resume_job(self, name: str) -> job_pb2.Job:
        """Queue a paused job again and return it as it is now."""
        return self.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=self.job_name(name))).job

    def update_job(self, name: str, changes: job_pb2.Job, *fields: str, etag: str = "") -> job_pb2.Job:
        """Change the named fields of a job (priority, labels, time_limit ...) to their values in `changes`, and return it.

        Raises Aborted where `etag` is given and the job has changed since.
        """
        job = job_pb2.Job()
        job.CopyFrom(changes)
        job.name = self.job_name(name)
        return self.jobs.UpdateJob(job_pb2.UpdateJobRequest(job=job, update_mask=FieldMask(paths=fields), etag=etag)).job

    def delete_job(self, name: str, etag: str = "") -> None:
        """Remove a job that has ended, with its records and files; the models that it made stay.

        Raises Aborted where `etag` is given and the job has changed since.
        """
        self.jobs.DeleteJob(job_pb2.DeleteJobRequest(name=self.job_name(name), etag=etag))

    def watch(self, name: str, after_sequence: int = 0) -> Iterator[job_pb2.WatchJobResponse]:
        """Yield a job's events after a number, each once and in order, with progress in between; end when the job has.

        A stream that breaks is opened again after the last event seen, so a restart of the coordinator goes unnoticed.
        """
        full = self.job_name(name)
        return watch(
            lambda seen: self.jobs.WatchJob(job_pb2.WatchJobRequest(name=full, after_sequence=seen), timeout=STREAM_SECONDS),
            after_sequence,
            self._patience,
        )

    def wait(self, name: str, timeout: float | None = None) -> job_pb2.Job:
        """Wait until a job has ended, however it ended, and return it. Raises DeadlineExceeded after `timeout` seconds."""
        full = self.job_name(name)
        end = None if timeout is None else time.monotonic() + timeout

        def open_stream(seen: int) -> Stream[job_pb2.WatchJobResponse]:
            left = STREAM_SECONDS if end is None else min(STREAM_SECONDS, end - time.monotonic())
            if left <= 0:
                raise DeadlineExceeded(f"{full} has not ended within {timeout:g} s", grpc.StatusCode.DEADLINE_EXCEEDED)
            return self.jobs.WatchJob(job_pb2.WatchJobRequest(name=full, after_sequence=seen), timeout=left)

        for item in watch(open_stream, 0, self._patience):
            if item.HasField("job"):
                return item.job
        return self.get_job(full)

    def watch_jobs(self, after_sequence: int = 0) -> Iterator[job_pb2.WatchJobsResponse]:
        """Yield the events of all the project's jobs after a number, each once and in order, for ever; -1 for those to come.

        Resumes like `watch`. An item's `sequence` is where to go on from another time.
        """
        return watch_project(
            lambda seen: self.jobs.WatchJobs(
                job_pb2.WatchJobsRequest(parent=self.parent, after_sequence=seen), timeout=STREAM_SECONDS
            ),
            after_sequence,
            self._patience,
        )

    def logs(
        self,
        name: str,
        after_sequence: int = 0,
        follow: bool = False,
        source: str = "",
        level: str = "",
        pattern: str = "",
        run: int = 0,
    ) -> Iterator[job_pb2.LogLine]:
        """Yield a job's log lines, oldest first; with `follow` until the job ends. Resumes like `watch`.

        Only those of one source (`rank-0`) or run, of at least a level (`WARNING`), or that RE2 finds a pattern in, where given.
        """
        full = self.job_name(name)
        return tail(
            lambda seen: self.jobs.TailLogs(
                job_pb2.TailLogsRequest(
                    name=full, after_sequence=seen, follow=follow, source=source, level=level, pattern=pattern, run=run
                ),
                timeout=STREAM_SECONDS,
            ),
            after_sequence,
            follow,
            lambda: self.get_job(full).HasField("end_time"),
            self._patience,
        )

    def job_name(self, name: str) -> str:
        """Full name of a job."""
        return full_name(self.project, "jobs", name)

    # Data sets

    def upload_dataset(
        self,
        path: Path | str,
        name: str,
        columns: Mapping[str, str] | None = None,
        format: str = "",
        test_fraction: float | None = None,
        split_seed: int | None = None,
        request_id: str | None = None,
        progress: Progress | None = None,
    ) -> dataset_pb2.DatasetVersion:
        """Send a JSONL, CSV or Parquet file up as the next version of data set `name`, and return that version.

        `columns` maps parts of a row (prompt, completion, chosen, rejected, text, label, messages, split) to the file's columns.
        """
        path = _existing_file(path)
        header = dataset_pb2.UploadDatasetHeader(
            parent=self.parent,
            dataset_id=name,
            filename=path.name,
            format=format,
            columns=columns,
            test_fraction=test_fraction,
            split_seed=split_seed,
            request_id=request_id or str(uuid.uuid4()),
            sha256=sha256_of(path),
        )
        return _repeat(lambda: self.datasets.UploadDataset(dataset_messages(header, path, progress))).dataset_version

    def get_dataset_version(self, reference: str) -> dataset_pb2.DatasetVersion:
        """Return `name@2`, or the latest version of `name`."""
        name = full_version(self.project, "datasets", reference)
        return self.datasets.GetDatasetVersion(dataset_pb2.GetDatasetVersionRequest(name=name)).dataset_version

    def list_datasets(self, page_size: int = 100) -> Iterator[dataset_pb2.Dataset]:
        """All data sets by name."""
        request = dataset_pb2.ListDatasetsRequest(parent=self.parent, page_size=page_size)
        return page_through(self.datasets.ListDatasets, request, lambda page: page.datasets)

    def list_dataset_versions(self, name: str, page_size: int = 100) -> Iterator[dataset_pb2.DatasetVersion]:
        """All versions of a data set, newest first."""
        request = dataset_pb2.ListDatasetVersionsRequest(parent=full_name(self.project, "datasets", name), page_size=page_size)
        return page_through(self.datasets.ListDatasetVersions, request, lambda page: page.dataset_versions)

    def delete_dataset_version(self, version: str) -> None:
        """Remove a version of a data set (`tickets@2`), and its rows unless another version has the very same."""
        name = full_version(self.project, "datasets", version)
        self.datasets.DeleteDatasetVersion(dataset_pb2.DeleteDatasetVersionRequest(name=name))

    # Models

    def upload_model(
        self,
        folder: Path | str,
        name: str,
        source: str = "",
        request_id: str | None = None,
        progress: Progress | None = None,
    ) -> model_pb2.ModelVersion:
        """Send a model folder up as the next version of model `name`, and return that version."""
        folder = Path(folder)
        files = model_files(folder)
        header = model_pb2.UploadModelHeader(
            parent=self.parent, model_id=name, source=source or str(folder), request_id=request_id or str(uuid.uuid4())
        )
        return _repeat(lambda: self.models.UploadModel(model_messages(header, folder, files, progress))).model_version

    def get_model_version(self, reference: str) -> model_pb2.ModelVersion:
        """Return `name@3`, `name@alias`, or the latest version of `name`."""
        name = full_version(self.project, "models", reference)
        return self.models.GetModelVersion(model_pb2.GetModelVersionRequest(name=name)).model_version

    def list_models(self, page_size: int = 100) -> Iterator[model_pb2.Model]:
        """All models by name."""
        request = model_pb2.ListModelsRequest(parent=self.parent, page_size=page_size)
        return page_through(self.models.ListModels, request, lambda page: page.models)

    def list_model_versions(self, name: str, page_size: int = 100) -> Iterator[model_pb2.ModelVersion]:
        """All versions of a model, newest first."""
        request = model_pb2.ListModelVersionsRequest(parent=full_name(self.project, "models", name), page_size=page_size)
        return page_through(self.models.ListModelVersions, request, lambda page: page.model_versions)

    def delete_model_version(self, version: str) -> None:
        """Remove a version of a model (`support@3`) with its aliases, and its files once nothing else needs them."""
        name = full_version(self.project, "models", version)
        self.models.DeleteModelVersion(model_pb2.DeleteModelVersionRequest(name=name))

    # Endpoints

    def create_schedule(self, name: str, schedule: schedule_pb2.Schedule) -> schedule_pb2.Schedule:
        """Record a schedule, which creates its job at its times. Safe to repeat."""
        request = schedule_pb2.CreateScheduleRequest(parent=self.parent, schedule_id=name, schedule=schedule)
        return self.schedules.CreateSchedule(request).schedule

    def get_schedule(self, name: str) -> schedule_pb2.Schedule:
        """Return a schedule."""
        request = schedule_pb2.GetScheduleRequest(name=full_name(self.project, "schedules", name))
        return self.schedules.GetSchedule(request).schedule

    def list_schedules(self, page_size: int = 100) -> Iterator[schedule_pb2.Schedule]:
        """All schedules by name."""
        request = schedule_pb2.ListSchedulesRequest(parent=self.parent, page_size=page_size)
        return page_through(self.schedules.ListSchedules, request, lambda page: page.schedules)

    def update_schedule(self, name: str, changes: schedule_pb2.Schedule, *fields: str, etag: str = "") -> schedule_pb2.Schedule:
        """Change the named fields of a schedule (cron, time_zone, job, overlap, catch_up, paused), and return it."""
        schedule = schedule_pb2.Schedule()
        schedule.CopyFrom(changes)
        schedule.name = full_name(self.project, "schedules", name)
        request = schedule_pb2.UpdateScheduleRequest(schedule=schedule, update_mask=FieldMask(paths=fields), etag=etag)
        return self.schedules.UpdateSchedule(request).schedule

    def delete_schedule(self, name: str) -> None:
        """End a schedule; the jobs that it made stay."""
        self.schedules.DeleteSchedule(schedule_pb2.DeleteScheduleRequest(name=full_name(self.project, "schedules", name)))

    def run_schedule(self, name: str, request_id: str | None = None) -> job_pb2.Job:
        """Create a schedule's job now, besides its times."""
        request = schedule_pb2.RunScheduleRequest(
            name=full_name(self.project, "schedules", name), request_id=request_id or str(uuid.uuid4())
        )
        return self.schedules.RunSchedule(request).job

    def deploy_endpoint(
        self, name: str, endpoint: endpoint_pb2.Endpoint, etag: str = "", validate_only: bool = False
    ) -> endpoint_pb2.Endpoint:
        """Record what an endpoint should be, creating or changing it. `wait_ready` waits until it is so."""
        request = endpoint_pb2.DeployEndpointRequest(
            parent=self.parent, endpoint_id=name, endpoint=endpoint, etag=etag, validate_only=validate_only
        )
        return self.endpoints.DeployEndpoint(request).endpoint

    def update_endpoint(
        self,
        name: str,
        changes: endpoint_pb2.Endpoint | None = None,
        *fields: str,
        action: endpoint_pb2.RolloutAction.ValueType = endpoint_pb2.ROLLOUT_ACTION_UNSPECIFIED,
        etag: str = "",
    ) -> endpoint_pb2.Endpoint:
        """Change the named fields (routes, autoscaling, resources, rollout) to those of `changes`, or end a rollout."""
        request = endpoint_pb2.UpdateEndpointRequest(endpoint=changes, etag=etag, rollout_action=action)
        request.endpoint.name = full_name(self.project, "endpoints", name)
        request.update_mask.paths.extend(fields)
        return self.endpoints.UpdateEndpoint(request).endpoint

    def watch_endpoint(self, name: str) -> Iterator[endpoint_pb2.Endpoint]:
        """Yield an endpoint as it is, and whenever it changes, until it is gone. Where the stream breaks, it is opened again."""
        request = endpoint_pb2.WatchEndpointRequest(name=full_name(self.project, "endpoints", name))
        return watch_endpoint(lambda: self.endpoints.WatchEndpoint(request, timeout=STREAM_SECONDS), self._patience)

    def get_endpoint(self, name: str) -> endpoint_pb2.Endpoint:
        """Return an endpoint."""
        request = endpoint_pb2.GetEndpointRequest(name=full_name(self.project, "endpoints", name))
        return self.endpoints.GetEndpoint(request).endpoint

    def list_endpoints(self, page_size: int = 100) -> Iterator[endpoint_pb2.Endpoint]:
        """All endpoints by name."""
        request = endpoint_pb2.ListEndpointsRequest(parent=self.parent, page_size=page_size)
        return page_through(self.endpoints.ListEndpoints, request, lambda page: page.endpoints)

    def delete_endpoint(self, name: str) -> endpoint_pb2.Endpoint:
        """Take an endpoint down; `wait_gone` waits until it is."""
        request = endpoint_pb2.DeleteEndpointRequest(name=full_name(self.project, "endpoints", name))
        return self.endpoints.DeleteEndpoint(request).endpoint

    def wait_ready(
        self, name: str, timeout: float | None = None, progress: Callable[[endpoint_pb2.Endpoint], None] | None = None
    ) -> endpoint_pb2.Endpoint:
        """Wait until an endpoint is READY and return it. FailedPrecondition where it FAILED, DeadlineExceeded at `timeout`."""

        def ready() -> endpoint_pb2.Endpoint | None:
            endpoint = self.get_endpoint(name)
            if endpoint.state == endpoint_pb2.ENDPOINT_STATE_FAILED:
                raise FailedPrecondition(
                    endpoint.error or f"endpoint {name} cannot be started",
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "ENDPOINT_FAILED",
                )
            if progress:
                progress(endpoint)
            return endpoint if endpoint.state == endpoint_pb2.ENDPOINT_STATE_READY else None

        return _poll(ready, timeout, f"endpoint {name} is not ready")

    def wait_gone(self, name: str, timeout: float | None = None) -> None:
        """Wait until a deleted endpoint and its replicas are gone."""

        def gone() -> bool | None:
            try:
                self.get_endpoint(name)
            except NotFound:
                return True
            return None

        _poll(gone, timeout, f"endpoint {name} still exists")

    # Administration

    def status(self) -> admin_pb2.GetStatusResponse:
        """What the coordinator is and what it is connected to."""
        return self.admin.GetStatus(admin_pb2.GetStatusRequest())

    def backup(self, path: Path | str, progress: BackupProgress | None = None) -> admin_pb2.BackupSummary:
        """Write all records of all projects to a new file, readable by its owner only, and return what it holds. For operators.

        They are as they were at one moment; everything goes on meanwhile. `python -m coordinator restore` puts them back.
        """
        return receive(self.admin.BackupRecords(admin_pb2.BackupRecordsRequest()), Path(path), progress)

    def get_project(self, name: str = "") -> admin_pb2.Project:
        """Return a project with what it holds and has spent; this client's own where no name is given."""
        full = name if "/" in name else f"projects/{name or self.project}"
        return self.admin.GetProject(admin_pb2.GetProjectRequest(name=full)).project

    def list_projects(self, page_size: int = 100) -> Iterator[admin_pb2.Project]:
        """The projects that the key may see, by id."""
        request = admin_pb2.ListProjectsRequest(page_size=page_size)
        return page_through(self.admin.ListProjects, request, lambda page: page.projects)

    def list_keys(self, page_size: int = 100) -> Iterator[admin_pb2.Key]:
        """The project's keys, newest first, without their secrets."""
        request = admin_pb2.ListKeysRequest(parent=self.parent, page_size=page_size)
        return page_through(self.admin.ListKeys, request, lambda page: page.keys)


def _existing_file(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise InvalidArgument(f"there is no file {path}", grpc.StatusCode.INVALID_ARGUMENT)
    if path.stat().st_size == 0:
        raise InvalidArgument(f"{path} is empty", grpc.StatusCode.INVALID_ARGUMENT)
    return path


def _repeat(upload: Callable[[], T]) -> T:
    """Send an upload again where the connection broke; its request_id makes sure that it counts once."""
    for attempt in range(1, UPLOAD_TRIES):
        try:
            return upload()
        except Unavailable:
            time.sleep(0.5 * 2**attempt)
    return upload()


def _poll(look: Callable[[], T | None], timeout: float | None, complaint: str) -> T:
    """Look twice a second until there is something to return."""
    end = None if timeout is None else time.monotonic() + timeout
    while (found := look()) is None:
        if end is not None and time.monotonic() >= end:
            raise DeadlineExceeded(f"{complaint} after {timeout:g} s", grpc.StatusCode.DEADLINE_EXCEEDED)
        time.sleep(0.5)
    return found
