"""Projects as callers see them: made and changed by operators, closed to each other in every call of the contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from sqlmodel import Session, select

from coordinator.services.jobs import JobService
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.client import (
    Aborted,
    AlreadyExists,
    Client,
    FailedPrecondition,
    InvalidArgument,
    LuthierError,
    NotFound,
    PermissionDenied,
)
from luthier.client.errors import from_call
from luthier.v1 import admin_pb2, dataset_pb2, endpoint_pb2, job_pb2, job_pb2_grpc, model_pb2, training_pb2
from tests.support.coordinator_process import CoordinatorProcess

METHODS: list[MethodDescriptor] = [
    method
    for module in (job_pb2, dataset_pb2, model_pb2, endpoint_pb2, admin_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]

JOB = "projects/{project}/jobs/ft-1"
VERSION = "projects/{project}/models/own/versions/1"
PARENT = "projects/{project}"

# The name that each call takes: where in the request it goes, and the name of something that the other project has. A call that
# takes none is listed as such, so that a new call is missing here until somebody has thought about it.
TAKES: dict[str, tuple[str, str] | None] = {
    "CreateJob": ("parent", PARENT),
    "GetJob": ("name", JOB),
    "ListJobs": ("parent", PARENT),
    "CancelJob": ("name", JOB),
    "UpdateJob": ("job.name", JOB),
    "PauseJob": ("name", JOB),
    "ResumeJob": ("name", JOB),
    "WatchJob": ("name", JOB),
    "TailLogs": ("name", JOB),
    "ListCheckpoints": ("parent", JOB),
    "ListJobMetrics": ("parent", JOB),
    "UploadDataset": ("header.parent", PARENT),
    "ListDatasets": ("parent", PARENT),
    "GetDatasetVersion": ("name", "projects/{project}/datasets/rows/versions/1"),
    "ListDatasetVersions": ("parent", "projects/{project}/datasets/rows"),
    "UploadModel": ("header.parent", PARENT),
    "ListModels": ("parent", PARENT),
    "GetModelVersion": ("name", VERSION),
    "ListModelVersions": ("parent", "projects/{project}/models/own"),
    "SetAlias": ("name", VERSION),
    "GetLineage": ("name", VERSION),
    "DeployEndpoint": ("parent", PARENT),
    "GetEndpoint": ("name", "projects/{project}/endpoints/desk"),
    "ListEndpoints": ("parent", PARENT),
    "DeleteEndpoint": ("name", "projects/{project}/endpoints/desk"),
    "CreateKey": ("parent", PARENT),
    "ListKeys": ("parent", PARENT),
    "RevokeKey": ("name", "projects/{project}/keys/key-of-theirs"),
    "GetProject": ("name", PARENT),
    "UpdateProject": ("project.name", PARENT),
    # These name nothing: projects are made and listed by whoever may, and the status is the stack's.
    "CreateProject": None,
    "ListProjects": None,
    "GetStatus": None,
}
NAMED = [method for method in METHODS if TAKES.get(method.name)]
FOR_OPERATORS = {"CreateProject", "UpdateProject"}
# These end what the tests of the other calls look at; one test calls them at the end.
ENDING = {"CancelJob", "RevokeKey", "DeleteEndpoint"}
# What makes the call a good one apart from its name, so that nothing else can be what is refused.
BESIDES: dict[str, dict[str, str]] = {
    "UploadDataset": {"header.dataset_id": "rows"},
    "UploadModel": {"header.model_id": "own"},
    "DeployEndpoint": {"endpoint_id": "desk"},
    "SetAlias": {"alias": "champion"},
}


@dataclass
class Tenants:
    """Two projects that know nothing of each other, each with a key of its own admin."""

    ours: Client
    theirs: Client
    our_token: str
    their_token: str


@pytest.fixture(scope="module")
def tenants(coordinator: CoordinatorProcess, client: Client) -> Iterator[Tenants]:
    keys = []
    for project in ("ours", "theirs"):
        client.admin.CreateProject(admin_pb2.CreateProjectRequest(project_id=project))
        keys.append(make_key(client, project, "admin").token)
        furnish(coordinator, project)
    with project_client(coordinator, keys[0], "ours") as ours, project_client(coordinator, keys[1], "theirs") as theirs:
        yield Tenants(ours, theirs, *keys)


def project_client(coordinator: CoordinatorProcess, token: str, project: str) -> Client:
    return Client(coordinator.address, token=token, project=project)


def make_key(client: Client, project: str, role: str) -> admin_pb2.CreateKeyResponse:
    wanted = admin_pb2.Key(display_name=f"{role} of {project}", role=f"ROLE_{role.upper()}")  # type: ignore[arg-type]
    return client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=f"projects/{project}", key=wanted))


def furnish(coordinator: CoordinatorProcess, project: str) -> None:
    """Give a project one of everything that calls name, past the checks that would want real files."""
    moment = tables.now()
    dataset = dataset_pb2.DatasetVersion(name=f"projects/{project}/datasets/rows/versions/1")
    rows: list[Any] = [
        tables.Job(
            **{"uid": f"uid-{project}", "project_id": project, "job_id": "ft-1", "kind": "finetune", "display_name": ""},
            **{"state": "QUEUED", "create_time": moment, "update_time": moment, "sequence": 1},
            # No job that the scheduler would start: nothing here has a cluster anyway.
            spec={"base": "builtin:tiny", "dataset": "rows@1", "method": "full", "workers": 1},
        ),
        tables.JobEvent(job_uid=f"uid-{project}", sequence=1, time=moment, type=1, state="QUEUED"),
        tables.Dataset(project_id=project, id="rows", latest=1, create_time=moment),
        tables.DatasetVersion(
            **{"project_id": project, "dataset_id": "rows", "version": 1, "content_hash": "c", "uri": "file:///none"},
            document={"name": dataset.name},
            create_time=moment,
        ),
        tables.Model(project_id=project, id="own", latest=1, create_time=moment),
        tables.ModelVersion(
            **{"project_id": project, "model_id": "own", "version": 1, "content_hash": "c", "uri": "file:///none"},
            create_time=moment,
        ),
        tables.Endpoint(
            **{"project_id": project, "id": "desk", "state": "ENDPOINT_STATE_READY", "cpus": 1.5},
            desired={"endpoint": {}, "artifacts": {}},
            create_time=moment,
            update_time=moment,
        ),
        tables.ApiKey(
            **{"id": f"key-of-{project}", "project_id": project, "display_name": "x", "role": 2},
            token_sha256=f"hash of {project}",
            create_time=moment,
        ),
    ]

    def work(session: Session) -> None:
        for row in rows:
            session.add(row)
            session.flush()

    in_store(coordinator, work)


def in_store(coordinator: CoordinatorProcess, work: Callable[[Session], Any]) -> Any:
    store = Store(coordinator.settings.get("store_url") or f"sqlite:///{coordinator.home / 'luthier.db'}")
    try:
        return store.write_now(work)
    finally:
        store.close()


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
    assert not named - {"job.name", "endpoint.name", "key.name", "project.name"}


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
    ],
    ids=["dataset", "model"],
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


# Making and changing


def create(client: Client, project_id: str, **fields: object) -> admin_pb2.Project:
    request = admin_pb2.CreateProjectRequest(project_id=project_id, project=admin_pb2.Project(**fields))  # type: ignore[arg-type]
    return client.admin.CreateProject(request).project


def update(client: Client, project: admin_pb2.Project, *paths: str, etag: str = "") -> admin_pb2.Project:
    request = admin_pb2.UpdateProjectRequest(project=project, etag=etag)
    request.update_mask.paths.extend(paths)
    return client.admin.UpdateProject(request).project


def test_a_project_is_made_read_and_changed(client: Client) -> None:
    made = create(client, "vision", display_name="Vision", share=2, quota={"cpus": 4}, limit={"cpus": 8, "gpus": 0})
    assert (made.name, made.display_name, made.share, made.quota.cpus) == ("projects/vision", "Vision", 2, 4)
    assert not made.quota.HasField("gpus")
    assert made.limit.HasField("gpus")
    assert client.get_project("vision") == made
    changed = update(client, admin_pb2.Project(name=made.name, share=3), "share", "quota", etag=made.etag)
    assert (changed.share, changed.HasField("quota"), changed.limit.cpus, changed.display_name) == (3, False, 8, "Vision")
    assert changed.etag != made.etag
    with pytest.raises(Aborted, match="read it again"):
        update(client, admin_pb2.Project(name=made.name, share=4), "share", etag=made.etag)
    assert client.get_project("vision") == changed
    by_what_is_set = update(client, admin_pb2.Project(name=made.name, budget=job_pb2.Budget(gpu_seconds=60)))
    assert (by_what_is_set.share, by_what_is_set.budget.gpu_seconds) == (3, 60)


def test_bad_projects_name_their_field(client: Client) -> None:
    for project_id in ("", "Vision", "a/b", "-a", "a" * 64):
        with pytest.raises(InvalidArgument) as caught:
            create(client, project_id)
        assert [violation.field for violation in caught.value.violations] == ["project_id"]
    with pytest.raises(InvalidArgument) as caught:
        create(client, "bad", share=-1, quota={"cpus": float("nan")})
    assert [violation.field for violation in caught.value.violations] == ["project.share", "project.quota.cpus"]
    with pytest.raises(AlreadyExists, match="'default' already"):
        create(client, "default")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        client.get_project("nowhere")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        update(client, admin_pb2.Project(name="projects/nowhere", share=2))
    with pytest.raises(InvalidArgument, match=r"update_mask: 'held' cannot be changed"):
        update(client, admin_pb2.Project(name="projects/default"), "held")


def test_of_many_changes_with_one_etag_one_is_made(client: Client) -> None:
    etag = create(client, "contended").etag

    def change(number: int) -> bool:
        try:
            update(client, admin_pb2.Project(name="projects/contended", share=number), "share", etag=etag)
        except Aborted:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(change, range(1, 17))) == 1


def test_of_many_projects_of_one_id_one_is_made(client: Client) -> None:
    def make(_: int) -> bool:
        try:
            create(client, "twice")
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(8))) == 1


def test_projects_are_paged_by_id(client: Client) -> None:
    for number in range(5):
        create(client, f"page-{number}")
    everything = [project.name for project in client.list_projects(page_size=1000)]
    paged = [project.name for project in client.list_projects(page_size=2)]
    assert paged == everything == sorted(everything)
    assert {f"projects/page-{number}" for number in range(5)} < set(paged)


def test_what_a_project_holds_and_spends_is_seen_while_it_runs(coordinator: CoordinatorProcess, client: Client) -> None:
    create(client, "busy")
    furnish(coordinator, "busy")
    assert client.get_project("busy").held.cpus == 1.5

    def run(session: Session) -> None:
        job = session.exec(select(tables.Job).where(tables.Job.uid == "uid-busy")).one()
        # No coordinator knows a run without a cluster; this one is only looked at.
        job.state, job.run, job.cpus = "RUNNING", 1, 2.0
        session.add(job)
        began = tables.now()
        session.add(tables.JobRun(job_uid="uid-busy", run=1, submission_id="busy-1", create_time=began, cpus=2.0, gpus=1.0))

    in_store(coordinator, run)
    first = client.get_project("busy")
    time.sleep(0.5)
    second = client.get_project("busy")
    assert (first.held.cpus, first.held.gpus, dict(first.jobs)) == (3.5, 1.0, {"RUNNING": 1})
    passed = second.usage.gpu_seconds - first.usage.gpu_seconds
    assert 0.4 < passed < 10
    assert second.usage.cpu_seconds - first.usage.cpu_seconds == pytest.approx(2 * passed)


def test_an_endpoint_that_the_limit_can_never_hold_is_refused(coordinator: CoordinatorProcess, client: Client) -> None:
    create(client, "small", limit={"cpus": 1})
    furnish(coordinator, "small")
    route = endpoint_pb2.Route(model_version="own@1")
    with Client(coordinator.address, make_key(client, "small", "editor").token, "small") as small:
        replicas = endpoint_pb2.Autoscaling(min_replicas=2)
        assert small.deploy_endpoint("fits", endpoint_pb2.Endpoint(routes=[route], autoscaling=replicas)).generation == 1
        replicas.min_replicas = 3
        with pytest.raises(
            FailedPrecondition, match=r"the endpoint needs at least 1\.5 CPUs and the project may hold 1"
        ) as caught:
            small.deploy_endpoint("large", endpoint_pb2.Endpoint(routes=[route], autoscaling=replicas))
        assert [violation.field for violation in caught.value.violations] == ["project.limit.cpus"]


# Roles and keys


def test_operators_make_keys_anywhere_and_others_at_home(
    coordinator: CoordinatorProcess, client: Client, tenants: Tenants
) -> None:
    made = make_key(client, "ours", "viewer")
    assert made.key.name.startswith("projects/ours/keys/")
    listed = client.admin.ListKeys(admin_pb2.ListKeysRequest(parent="projects/ours")).keys
    assert made.key.name in [key.name for key in listed]
    with coordinator.client(made.token) as viewer:
        assert [project.name for project in viewer.list_projects()] == ["projects/ours"]
        with pytest.raises(NotFound):
            viewer.get_project("theirs")
        with pytest.raises(PermissionDenied, match="role operator"):
            create(viewer, "mine")
    assert client.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=made.key.name)).key.HasField("revoke_time")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        make_key(client, "nowhere", "viewer")
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        list(client.admin.ListKeys(admin_pb2.ListKeysRequest(parent="projects/nowhere")).keys)


def test_no_key_makes_or_revokes_one_above_itself(coordinator: CoordinatorProcess, client: Client) -> None:
    admin = make_key(client, "default", "admin")
    operator = make_key(client, "default", "operator")
    with coordinator.client(admin.token) as caller:
        with pytest.raises(PermissionDenied, match=r"key\.role: .*ROLE_OPERATOR") as caught:
            make_key(caller, "default", "operator")
        assert [violation.field for violation in caught.value.violations] == ["key.role"]
        with pytest.raises(PermissionDenied, match="ROLE_OPERATOR"):
            caller.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=operator.key.name))
        assert make_key(caller, "default", "admin").key.role == admin_pb2.ROLE_ADMIN
    with coordinator.client(operator.token) as caller:
        assert create(caller, "by-another-operator").share == 1
