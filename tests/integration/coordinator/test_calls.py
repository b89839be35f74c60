"""What a caller of the coordinator gets: for good requests, bad ones, and for those he may not make."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from luthier.client import AlreadyExists, Client, InvalidArgument, NotFound, PermissionDenied, Unauthenticated
from luthier.v1 import admin_pb2, dataset_pb2, endpoint_pb2, job_pb2, model_pb2, training_pb2
from tests.support.coordinator_process import TOKEN, CoordinatorProcess

PARENT = "projects/default"
MODULES = (job_pb2, dataset_pb2, model_pb2, endpoint_pb2, admin_pb2)
METHODS = [
    (f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming)
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def call(address: str, method: tuple[str, bool, bool], metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    """Make a call with an empty request and return its status."""
    path, client_streams, server_streams = method
    kind = f"{'stream' if client_streams else 'unary'}_{'stream' if server_streams else 'unary'}"
    with grpc.insecure_channel(address) as channel:
        request = iter([b""]) if client_streams else b""
        try:
            answer = getattr(channel, kind)(path)(request, metadata=metadata, timeout=10)
            if server_streams:
                list(answer)
        except grpc.RpcError as error:
            code = error.code()
            assert isinstance(code, grpc.StatusCode)
            return code
    return grpc.StatusCode.OK


def key(client: Client, role: str, **fields: object) -> admin_pb2.CreateKeyResponse:
    wanted = admin_pb2.Key(display_name=f"a {role}", role=f"ROLE_{role.upper()}", **fields)  # type: ignore[arg-type]
    return client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=PARENT, key=wanted))


def finetune(dataset: str = "rows", base: str = "builtin:tiny", **fields: object) -> job_pb2.Job:
    return job_pb2.Job(finetune=training_pb2.FinetuneSpec(base=base, dataset=dataset, method="full", **fields))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dataset_pb2.DatasetVersion:
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(60)))
    return client.upload_dataset(path, "rows")


@pytest.mark.parametrize("method", METHODS, ids=[method[0].rpartition(".")[2] for method in METHODS])
@pytest.mark.parametrize("header", [None, "Bearer lut_wrong", "Basic abc", "Bearer "])
def test_no_call_without_a_key(coordinator: CoordinatorProcess, method: tuple[str, bool, bool], header: str | None) -> None:
    metadata = [("authorization", header)] if header else []
    assert call(coordinator.address, method, metadata) is grpc.StatusCode.UNAUTHENTICATED


def test_a_key_counts_until_it_expires_or_is_revoked(coordinator: CoordinatorProcess, client: Client) -> None:
    soon = Timestamp()
    soon.FromMilliseconds(int((time.time() + 1.0) * 1000))
    short = key(client, "viewer", expire_time=soon)
    with coordinator.client(short.token) as viewer:
        viewer.admin.GetStatus(admin_pb2.GetStatusRequest())
        time.sleep(1.2)
        with pytest.raises(Unauthenticated, match="expired at"):
            viewer.admin.GetStatus(admin_pb2.GetStatusRequest())
    lasting = key(client, "viewer")
    with coordinator.client(lasting.token) as viewer:
        viewer.admin.GetStatus(admin_pb2.GetStatusRequest())
        client.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=lasting.key.name))
        with pytest.raises(Unauthenticated, match="was revoked"):
            viewer.admin.GetStatus(admin_pb2.GetStatusRequest())


def test_a_key_that_is_over_before_it_begins_is_refused(client: Client) -> None:
    with pytest.raises(InvalidArgument, match=r"key\.expire_time"):
        key(client, "viewer", expire_time=Timestamp(seconds=1))


def test_secrets_of_keys_are_nowhere_on_disk(coordinator: CoordinatorProcess, client: Client) -> None:
    made = key(client, "editor")
    for file in coordinator.home.rglob("*"):
        if file.is_file() and file.name != "admin.key":
            content = file.read_bytes()
            assert made.token.encode() not in content, file
            assert TOKEN.encode() not in content, file


def test_a_role_may_do_what_it_may(coordinator: CoordinatorProcess, client: Client) -> None:
    with coordinator.client(key(client, "viewer").token) as viewer:
        viewer.jobs.ListJobs(job_pb2.ListJobsRequest(parent=PARENT))
        with pytest.raises(PermissionDenied, match="role editor"):
            viewer.create_job(finetune())
    with coordinator.client(key(client, "editor").token) as editor, pytest.raises(PermissionDenied, match="role admin"):
        editor.admin.ListKeys(admin_pb2.ListKeysRequest(parent=PARENT))
    with coordinator.client(key(client, "query").token) as query, pytest.raises(PermissionDenied, match="role viewer"):
        query.jobs.ListJobs(job_pb2.ListJobsRequest(parent=PARENT))


def test_another_projects_names_are_not_found(client: Client) -> None:
    with pytest.raises(NotFound):
        client.jobs.GetJob(job_pb2.GetJobRequest(name="projects/other/jobs/ft-1"))
    with pytest.raises(NotFound):
        client.models.GetModelVersion(model_pb2.GetModelVersionRequest(name="projects/other/models/m/versions/1"))


def test_a_job_is_recorded_with_what_its_names_stood_for(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    job = client.create_job(finetune())
    assert job.state == job_pb2.JOB_STATE_QUEUED
    assert (job.kind, job.finetune.dataset, job.finetune.output_model, job.finetune.workers) == ("finetune", "rows@1", "rows", 1)
    shown = client.jobs.GetJob(job_pb2.GetJobRequest(name=job.name)).job
    assert shown.queue.waiting_for in ("the Ray cluster to answer", "the scheduler's next round")


def test_a_hundred_same_requests_at_once_make_one_job(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    with ThreadPoolExecutor(32) as pool:
        names = set(pool.map(lambda _: client.create_job(finetune(), request_id="the-same").name, range(100)))
    assert len(names) == 1
    with pytest.raises(AlreadyExists, match=r"differs in job\.finetune\.method"):
        client.create_job(
            job_pb2.Job(finetune=training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="lora")), "the-same"
        )


def test_validating_records_nothing(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    before = len(list(client.list_jobs()))
    request = job_pb2.CreateJobRequest(parent=PARENT, job=finetune(), validate_only=True)
    assert client.jobs.CreateJob(request).job.finetune.dataset == "rows@1"
    assert len(list(client.list_jobs())) == before


@pytest.mark.parametrize(
    ("job", "error", "field", "words"),
    [
        (finetune(dataset="nowhere"), NotFound, "job.finetune.dataset", "no data set 'nowhere'"),
        (finetune(dataset="rows@9"), NotFound, "job.finetune.dataset", "no version '9'"),
        (finetune(base="builtin:huge"), NotFound, "job.finetune.base", "not built in"),
        (finetune(base="nobody@1"), NotFound, "job.finetune.base", "no model 'nobody'"),
        (finetune(base="/nowhere/at/all"), NotFound, "job.finetune.base", "no folder"),
        (finetune(base="../etc"), InvalidArgument, "job.finetune.base", "not an absolute path"),
        (finetune(base="hf:../../etc"), InvalidArgument, "job.finetune.base", "not an id of a model"),
        (finetune(workers=-3), InvalidArgument, "job.finetune.workers", "-3"),
        (
            finetune(evaluation=training_pb2.FinetuneEvaluation(split="dev")),
            InvalidArgument,
            "job.finetune.evaluation.split",
            "it has test, train",
        ),
    ],
)
def test_bad_jobs_name_their_field(
    client: Client, dataset: dataset_pb2.DatasetVersion, job: job_pb2.Job, error: type[Exception], field: str, words: str
) -> None:
    with pytest.raises(error) as caught:
        client.create_job(job)
    assert words in str(caught.value)
    assert field in [violation.field for violation in caught.value.violations]  # type: ignore[attr-defined]


def test_pages_and_filters(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    made = [client.create_job(job_pb2.Job(labels={"batch": "x1"}, finetune=finetune().finetune)).name for _ in range(5)]
    request = job_pb2.ListJobsRequest(parent=PARENT, page_size=2, filter="label.batch=x1 AND state=QUEUED")
    seen: list[str] = []
    while True:
        page = client.jobs.ListJobs(request)
        assert len(page.jobs) <= 2
        seen += [job.name for job in page.jobs]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == made[::-1]
    for bad in (
        job_pb2.ListJobsRequest(parent=PARENT, filter="colour=red"),
        job_pb2.ListJobsRequest(parent=PARENT, page_token="!"),
    ):
        with pytest.raises(InvalidArgument):
            client.jobs.ListJobs(bad)


def test_a_cancelled_job_is_watched_to_its_end(client: Client, dataset: dataset_pb2.DatasetVersion) -> None:
    job = client.create_job(finetune())
    client.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
    items = list(client.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name)))
    events = [item.event for item in items if item.WhichOneof("item") == "event"]
    assert [event.sequence for event in events] == [1, 2]
    assert items[-1].job.state == job_pb2.JOB_STATE_CANCELLED
    assert items[-1].job.end_reason == job_pb2.END_REASON_USER
    later = list(client.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name, after_sequence=1)))
    assert [item.event.sequence for item in later] == [2]


def test_a_broken_file_is_refused_by_line_and_leaves_nothing(
    coordinator: CoordinatorProcess, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple\n{"prompt": "c"}\n')
    with pytest.raises(InvalidArgument) as caught:
        client.upload_dataset(path, "broken")
    assert "line 2" in str(caught.value)
    with pytest.raises(NotFound):
        client.datasets.GetDatasetVersion(dataset_pb2.GetDatasetVersionRequest(name=f"{PARENT}/datasets/broken/versions/latest"))
    assert list((coordinator.home / "uploads").iterdir()) == []


def test_the_same_upload_makes_one_version(client: Client, rows: Path) -> None:
    first = client.upload_dataset(rows, "again", request_id="up-1")
    assert client.upload_dataset(rows, "again", request_id="up-1").name == first.name
    rows.write_text(rows.read_text() + "one more,a\n")
    with pytest.raises(AlreadyExists):
        client.upload_dataset(rows, "again", request_id="up-1")
    assert client.upload_dataset(rows, "again").name.endswith("/versions/2")


def test_a_model_is_taken_only_as_safetensors_and_inside_its_folder(
    coordinator: CoordinatorProcess, client: Client, tmp_path: Path
) -> None:
    def upload(name: str) -> None:
        items = [
            model_pb2.UploadModelRequest(header=model_pb2.UploadModelHeader(parent=PARENT, model_id="mine")),
            model_pb2.UploadModelRequest(file=model_pb2.UploadModelFile(path=name, size_bytes=1)),
            model_pb2.UploadModelRequest(chunk=b"x"),
        ]
        client.models.UploadModel(iter(items))

    for name in ("../../escape.json", "/etc/escape.json", "a\0b.json", "pytorch_model.bin", "weights.pt"):
        with pytest.raises(InvalidArgument):
            upload(name)
    assert list(client.list_models()) == []
    assert list((coordinator.home / "uploads").iterdir()) == []


def test_an_endpoint_names_what_is_wrong_with_it(client: Client) -> None:
    endpoint = endpoint_pb2.Endpoint(
        routes=[endpoint_pb2.Route(model_version="m@1", weight=-1)],
        autoscaling=endpoint_pb2.Autoscaling(min_replicas=3, max_replicas=2),
        resources=endpoint_pb2.ReplicaResources(cpus=-1),
    )
    request = endpoint_pb2.DeployEndpointRequest(parent=PARENT, endpoint_id="support", endpoint=endpoint)
    with pytest.raises(InvalidArgument) as caught:
        client.endpoints.DeployEndpoint(request)
    assert [violation.field for violation in caught.value.violations] == [
        "endpoint.routes[0].weight",
        "endpoint.autoscaling.max_replicas",
        "endpoint.resources.cpus",
    ]


def test_reflection_lists_the_services_to_those_with_a_key(coordinator: CoordinatorProcess) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.ServerReflectionInfo(iter([request]), timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = next(stub.ServerReflectionInfo(iter([request]), timeout=10, metadata=[("authorization", f"Bearer {TOKEN}")]))
    assert "luthier.v1.JobService" in {service.name for service in answer.list_services_response.service}
