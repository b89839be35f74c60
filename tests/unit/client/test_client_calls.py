"""Key, retries, request ids, paging and uploads of the client."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from luthier.client import AlreadyExists, Client, InvalidArgument, Unavailable, short_name
from luthier.client.channel import service_config
from luthier.v1 import (
    admin_pb2,
    dataset_pb2,
    endpoint_pb2,
    job_pb2,
    member_pb2,
    model_pb2,
    schedule_pb2,
    secret_pb2,
)
from luthier.v1.endpoint_pb2 import Endpoint, Route
from tests.support.fake_services import Failure, FakeCoordinator

AWAY = Failure(grpc.StatusCode.UNAVAILABLE, "restarting", bare=True)
SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in [
        (job_pb2, "JobService"),
        (dataset_pb2, "DatasetService"),
        (model_pb2, "ModelService"),
        (schedule_pb2, "ScheduleService"),
        (endpoint_pb2, "EndpointService"),
        (secret_pb2, "SecretService"),
        (member_pb2, "MemberService"),
        (admin_pb2, "AdminService"),
    ]
]


def test_only_calls_that_are_safe_to_repeat_are_repeated() -> None:
    named = {
        (entry["service"], entry["method"]) for config in json.loads(service_config())["methodConfig"] for entry in config["name"]
    }
    existing = {(service.full_name, method.name) for service in SERVICES for method in service.methods}
    assert named <= existing
    assert {method for _, method in existing - named} == {
        "WatchJob",  # streams resume by sequence instead
        "WatchJobs",
        "TailLogs",
        "BackupRecords",  # one that broke off is made anew, into a file of its own
        "UploadDataset",  # streams up are repeated with their request_id
        "UploadModel",
        "WatchEndpoint",  # looked at anew instead
        "UpdateEndpoint",
        "DeployEndpoint",  # a repeated one may undo what somebody else did in between
        "DeleteEndpoint",  # a repeated one may find nothing
        "UpdateSchedule",
        "DeleteSchedule",
        "DeleteJob",
        "DeleteDatasetVersion",
        "DeleteModelVersion",
        "DeleteSecret",
        "RemoveMember",
        "CreateKey",  # a repeated one makes a second key
        "CreateProject",  # a repeated one finds the id taken, by itself
        "UpdateProject",  # like UpdateJob: a repeated one finds the etag changed, by itself
        "UpdateJob",
        "PauseJob",  # a repeated one may undo what somebody else did in between
        "ResumeJob",
    }


def test_the_key_goes_along_and_comes_from_the_environment(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_SERVER", fake.address)
    monkeypatch.setenv("LUTHIER_TOKEN", fake.token)
    with Client() as client:
        client.status()
    assert fake.calls[-1].metadata["authorization"] == f"Bearer {fake.token}"


def test_a_safe_call_is_repeated_and_an_unsafe_one_is_not(fake: FakeCoordinator, client: Client) -> None:
    fake.fail("GetStatus", AWAY, AWAY)
    client.status()
    assert len(fake.called("GetStatus")) == 3
    fake.fail("CreateKey", AWAY)
    with pytest.raises(Unavailable):
        client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=client.parent))
    assert len(fake.called("CreateKey")) == 1


def test_a_repeated_create_carries_one_request_id_even_from_the_raw_stub(fake: FakeCoordinator, client: Client) -> None:
    fake.fail("CreateJob", AWAY)
    request = job_pb2.CreateJobRequest(parent=client.parent, job=job_pb2.Job(display_name="x"))
    client.jobs.CreateJob(request)
    ids = [call.request.request_id for call in fake.called("CreateJob")]
    assert len(ids) == 2
    assert ids[0] == ids[1] != ""
    assert request.request_id == ""  # the caller's message stays the caller's


def test_request_id_gives_the_same_job_and_refuses_another_body(client: Client) -> None:
    first = client.create_job(job_pb2.Job(display_name="x"), request_id="r")
    assert client.create_job(job_pb2.Job(display_name="x"), request_id="r").name == first.name
    with pytest.raises(AlreadyExists):
        client.create_job(job_pb2.Job(display_name="y"), request_id="r")


def test_lists_run_through_all_pages(fake: FakeCoordinator, client: Client) -> None:
    for _ in range(7):
        fake.add_job(job_pb2.Job())
    assert [short_name(job.name) for job in client.list_jobs(page_size=3)] == [f"j-{n}" for n in range(7, 0, -1)]
    assert len(fake.called("ListJobs")) == 3


def test_a_data_set_is_streamed_up_whole_and_again_after_a_break(fake: FakeCoordinator, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"Body,Queue\n" + b"x" * 1_300_000 + b",a\n")
    fake.fail("UploadDataset", AWAY)
    sent: list[tuple[int, int]] = []
    version = client.upload_dataset(
        file, "rows", columns={"text": "Body"}, test_fraction=0.2, progress=lambda done, total: sent.append((done, total))
    )
    assert short_name(version.name) == "rows@1"
    assert fake.uploads[version.name] == file.read_bytes()
    assert sent[-1] == (file.stat().st_size, file.stat().st_size)
    headers = [call.request for call in fake.called("UploadDataset")]
    assert headers[0].request_id == headers[1].request_id
    assert (headers[1].test_fraction, headers[1].HasField("split_seed")) == (pytest.approx(0.2), False)


def test_missing_and_empty_files_are_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no file .*none\.csv"):
        client.upload_dataset(tmp_path / "none.csv", "rows")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(InvalidArgument, match="empty"):
        client.upload_dataset(tmp_path / "empty.csv", "rows")


def test_a_model_folder_is_streamed_up_file_by_file(fake: FakeCoordinator, client: Client, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"w" * 1_000_000)
    (tmp_path / "empty.txt").touch()
    version = client.upload_model(tmp_path, "base")
    held = {name.removeprefix(version.name + "/"): body for name, body in fake.uploads.items()}
    assert held == {"config.json": b"{}", "sub/model.safetensors": b"w" * 1_000_000, "empty.txt": b""}


def test_endpoints_are_awaited(fake: FakeCoordinator, client: Client) -> None:
    client.deploy_endpoint("desk", Endpoint(routes=[Route(model_version="tickets@1")]))
    assert client.wait_ready("desk", timeout=5).state == endpoint_pb2.ENDPOINT_STATE_READY
    client.delete_endpoint("desk")
    client.wait_gone("desk", timeout=5)
    assert not fake.endpoints


def test_a_call_goes_along_with_the_trace_of_whoever_makes_it(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = (f"00-{number:032x}-b7ad6b7169203331-01" for number in (1, 2))

    def sent(**options: Any) -> str:
        with Client(fake.address, token=fake.token) as client:
            client.admin.GetStatus(admin_pb2.GetStatusRequest(), **options)
        return fake.called("GetStatus")[-1].metadata.get("traceparent", "")

    assert sent() == ""
    monkeypatch.setenv("TRACEPARENT", outer)
    assert sent() == outer
    span = NonRecordingSpan(SpanContext(2, 0xB7AD6B7169203331, is_remote=False, trace_flags=TraceFlags(1)))
    token = context.attach(trace.set_span_in_context(span))
    assert sent() == inner
    assert sent(metadata=(("traceparent", "its own"),)) == "its own"
    context.detach(token)
    assert sent() == outer
