"""Projects are closed to each other in every call of the contract."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from coordinator.services.jobs import JobService
from luthier.client import LuthierError, NotFound, PermissionDenied
from luthier.client.errors import from_call
from luthier.v1 import (
    admin_pb2,
    dataset_pb2,
    endpoint_pb2,
    job_pb2,
    job_pb2_grpc,
    member_pb2,
    model_pb2,
    schedule_pb2,
    secret_pb2,
    training_pb2,
)
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.tenants import Tenants

METHODS: list[MethodDescriptor] = [
    method
    for module in (job_pb2, dataset_pb2, model_pb2, schedule_pb2, endpoint_pb2, secret_pb2, member_pb2, admin_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]

JOB = "projects/{project}/jobs/ft-1"
VERSION = "projects/{project}/models/own/versions/1"
SCHEDULE = "projects/{project}/schedules/nightly"
PARENT = "projects/{project}"

# The name that each call takes: where in the request it goes, and the name of something that the other project has. A call that
# takes none is listed as such, so that a new call is missing here until somebody has thought about it.
TAKES: dict[str, tuple[str, str] | None] = {
    "CreateJob": ("parent", PARENT),
    "EstimateJob": ("parent", PARENT),
    "GetJob": ("name", JOB),
    "ListJobs": ("parent", PARENT),
    "CancelJob": ("name", JOB),
    "UpdateJob": ("job.name", JOB),
    "PauseJob": ("name", JOB),
    "ResumeJob": ("name", JOB),
    "DeleteJob": ("name", JOB),
    "WatchJob": ("name", JOB),
    "WatchJobs": ("parent", PARENT),
    "TailLogs": ("name", JOB),
    "ListCheckpoints": ("parent", JOB),
    "ListJobMetrics": ("parent", JOB),
    "UploadDataset": ("header.parent", PARENT),
    "ListDatasets": ("parent", PARENT),
    "GetDatasetVersion": ("name", "projects/{project}/datasets/rows/versions/1"),
    "ListDatasetVersions": ("parent", "projects/{project}/datasets/rows"),
    "DeleteDatasetVersion": ("name", "projects/{project}/datasets/rows/versions/1"),
    "UploadModel": ("header.parent", PARENT),
    "ListModels": ("parent", PARENT),
    "GetModelVersion": ("name", VERSION),
    "ListModelVersions": ("parent", "projects/{project}/models/own"),
    "SetAlias": ("name", VERSION),
    "GetLineage": ("name", VERSION),
    "DeleteModelVersion": ("name", VERSION),
    "CreateSchedule": ("parent", PARENT),
    "GetSchedule": ("name", SCHEDULE),
    "ListSchedules": ("parent", PARENT),
    "UpdateSchedule": ("schedule.name", SCHEDULE),
    "DeleteSchedule": ("name", SCHEDULE),
    "RunSchedule": ("name", SCHEDULE),
    "DeployEndpoint": ("parent", PARENT),
    "GetEndpoint": ("name", "projects/{project}/endpoints/desk"),
    "UpdateEndpoint": ("endpoint.name", "projects/{project}/endpoints/desk"),
    "WatchEndpoint": ("name", "projects/{project}/endpoints/desk"),
    "ListEndpoints": ("parent", PARENT),
    "DeleteEndpoint": ("name", "projects/{project}/endpoints/desk"),
    "SetSecret": ("name", "projects/{project}/secrets/token"),
    "ListSecrets": ("parent", PARENT),
    "DeleteSecret": ("name", "projects/{project}/secrets/token"),
    "SetMember": ("member.name", "projects/{project}/members/ada"),
    "ListMembers": ("parent", PARENT),
    "RemoveMember": ("name", "projects/{project}/members/ada"),
    "CreateKey": ("parent", PARENT),
    "ListKeys": ("parent", PARENT),
    "RevokeKey": ("name", "projects/{project}/keys/key-of-theirs"),
    "GetProject": ("name", PARENT),
    "UpdateProject": ("project.name", PARENT),
    # These name nothing: projects are made and listed by whoever may, and the status and the backup are the stack's.
    "CreateProject": None,
    "ListProjects": None,
    "GetStatus": None,
    "BackupRecords": None,
}
NAMED = [method for method in METHODS if TAKES.get(method.name)]
FOR_OPERATORS = {"CreateProject", "UpdateProject", "BackupRecords"}
# These end what the tests of the other calls look at; one test calls them at the end.
ENDING = {
    *("CancelJob", "RevokeKey", "DeleteEndpoint", "DeleteJob", "DeleteDatasetVersion", "DeleteModelVersion"),
    *("DeleteSchedule", "DeleteSecret", "RemoveMember"),
}
# What makes the call a good one apart from its name, so that nothing else can be what is refused.
BESIDES: dict[str, dict[str, str]] = {
    "UploadDataset": {"header.dataset_id": "rows"},
    "UploadModel": {"header.model_id": "own"},
    "DeployEndpoint": {"endpoint_id": "desk"},
    "SetAlias": {"alias": "champion"},
    "CreateSchedule": {"schedule_id": "hourly"},
    "RunSchedule": {"request_id": "r-1"},
    "SetSecret": {"value": "a-new-value"},
}


def request_of(method: MethodDescriptor, name: str) -> Message:
    """A request of the call with the name where it goes."""
    request = message_factory.GetMessageClass(method.input_type)()
    taken = TAKES[method.name]
    assert taken is not None
    for path, value in {taken[0]: name, **BESIDES.get(method.name, {})}.items():
        *parents, last = path.split(".")
        target: Any = request
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return request


def answer(coordinator: CoordinatorProcess, token: str, method: MethodDescriptor, request: Message) -> LuthierError | None:
    """The error that a call ends with; None for a call that is answered, or that streams for a second without an error."""
    direction = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    metadata = [("authorization", f"Bearer {token}")]
    sent: Any = iter([request.SerializeToString()]) if method.client_streaming else request.SerializeToString()
    with grpc.insecure_channel(coordinator.address) as channel:
        path = f"/{method.containing_service.full_name}/{method.name}"
        try:
            got = getattr(channel, direction)(path)(sent, metadata=metadata, timeout=1 if method.server_streaming else 20)
            if method.server_streaming:
                for _ in got:
                    pass
        except grpc.RpcError as error:
            found = from_call(error)
            return None if found.code is grpc.StatusCode.DEADLINE_EXCEEDED and method.server_streaming else found
    return None


def test_every_call_of_the_contract_is_listed_here() -> None:
    assert {method.name for method in METHODS} == set(TAKES)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_requests_with_a_name_are_listed_with_it(method: MethodDescriptor) -> None:
    fields = {field.name: field for field in method.input_type.fields}
    named = {name for name in ("name", "parent") if name in fields}
    for name, field in fields.items():
        if field.message_type is not None and field.message_type.full_name.startswith("luthier."):
            named |= {f"{name}.{inner}" for inner in ("name", "parent") if inner in field.message_type.fields_by_name}
    taken = TAKES[method.name]
    if taken is not None:
        named.remove(taken[0])
    # What a create or an update sends as its body has an output-only name, which counts for nothing where another one says which.
    assert not named - {"job.name", "endpoint.name", "key.name", "project.name", "schedule.name"}


@pytest.mark.parametrize("method", NAMED, ids=lambda method: method.name)
def test_another_projects_names_are_not_found(
    coordinator: CoordinatorProcess, tenants: Tenants, method: MethodDescriptor
) -> None:
    if getattr(JobService, method.name, None) is getattr(job_pb2_grpc.JobServiceServicer, method.name, 0):
        pytest.skip("the coordinator does not have this call yet")
    _, pattern = TAKES[method.name] or ("", "")
    error = answer(coordinator, tenants.our_token, method, request_of(method, pattern.format(project="theirs")))
    assert error is not None
    if method.name in FOR_OPERATORS:
        assert isinstance(error, PermissionDenied)
        return
    assert isinstance(error, NotFound)
    # What exists there and what does not are told apart by nothing but the name that was sent.
    absent = pattern.format(project="nobodys")
    other = answer(coordinator, tenants.our_token, method, request_of(method, absent))
    assert isinstance(other, NotFound)
    assert other.message == error.message.replace("projects/theirs", "projects/nobodys")
    assert (other.reason, other.violations) == (error.reason, error.violations)


@pytest.mark.parametrize(
    "method", [method for method in NAMED if method.name not in FOR_OPERATORS | ENDING], ids=lambda method: method.name
)
def test_the_same_names_are_found_by_the_project_that_has_them(
    coordinator: CoordinatorProcess, tenants: Tenants, method: MethodDescriptor
) -> None:
    _, pattern = TAKES[method.name] or ("", "")
    error = answer(coordinator, tenants.their_token, method, request_of(method, pattern.format(project="theirs")))
    assert not isinstance(error, NotFound | PermissionDenied)


def test_nothing_of_another_project_is_listed(tenants: Tenants) -> None:
    ours = tenants.ours
    for listed in (
        [*ours.list_jobs(), *ours.list_datasets(), *ours.list_models(), *ours.list_endpoints()],
        [*ours.list_secrets(), *ours.list_members()],
        ours.list_keys(),
        ours.list_projects(),
    ):
        names = [each.name for each in listed]
        assert names
        assert all(name.startswith("projects/ours") for name in names)


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (
            job_pb2.Job(
                finetune=training_pb2.FinetuneSpec(
                    base="builtin:tiny", method="full", dataset="projects/theirs/datasets/rows/versions/1"
                )
            ),
            "job.finetune.dataset",
        ),
        (
            job_pb2.Job(import_model={"source": "projects/theirs/models/own/versions/1", "output_model": "x"}),  # type: ignore[arg-type]
            "job.import_model.source",
        ),
        (
            job_pb2.Job(
                import_model={"source": "builtin:tiny", "output_model": "x"},  # type: ignore[arg-type]
                secrets={"HF_TOKEN": "theirs-alone"},
            ),
            "job.secrets.HF_TOKEN",
        ),
    ],
    ids=["dataset", "model", "secret"],
)
def test_a_job_reads_nothing_of_another_project(tenants: Tenants, job: job_pb2.Job, field: str) -> None:
    with pytest.raises(NotFound) as caught:
        tenants.ours.create_job(job)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_an_endpoint_serves_nothing_of_another_project(tenants: Tenants) -> None:
    route = endpoint_pb2.Route(model_version="projects/theirs/models/own/versions/1")
    with pytest.raises(NotFound) as caught:
        tenants.ours.deploy_endpoint("stolen", endpoint_pb2.Endpoint(routes=[route]))
    assert [violation.field for violation in caught.value.violations] == ["endpoint.routes[0].model_version"]


def test_they_may_end_what_is_theirs(coordinator: CoordinatorProcess, tenants: Tenants) -> None:
    theirs = tenants.theirs
    assert theirs.cancel_job("ft-1").state == job_pb2.JOB_STATE_CANCELLED
    assert theirs.delete_endpoint("desk").state == endpoint_pb2.ENDPOINT_STATE_DELETING
    key = theirs.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name="projects/theirs/keys/key-of-theirs")).key
    assert key.HasField("revoke_time")
    project = theirs.get_project()
    assert project.name == "projects/theirs"
    assert project.jobs["CANCELLED"] == 1
    assert project.held.cpus == 1.5
    theirs.delete_job("ft-1")
    theirs.delete_dataset_version("rows@1")
    theirs.delete_model_version("own@1")
    theirs.delete_secret("token")
    theirs.remove_member("ada")
    assert [*theirs.list_jobs(), *theirs.list_datasets(), *theirs.list_models()] == []
    assert theirs.get_project().jobs["CANCELLED"] == 0
    assert [job.name for job in tenants.ours.list_jobs()] == ["projects/ours/jobs/ft-1"]
