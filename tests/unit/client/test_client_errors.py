"""Failures of calls arrive as exceptions with what the coordinator said."""

import pickle

import grpc
import pytest

import luthier.client as package
from luthier.client import Client, InvalidArgument, LuthierError, NotFound, Unauthenticated, Unavailable, Violation
from luthier.client.errors import CLASS_OF_CODE
from luthier.v1 import job_pb2
from tests.support.fake_services import Failure, FakeCoordinator


def test_the_package_exports_exactly_this() -> None:
    assert sorted(package.__all__) == [
        "Aborted",
        "AlreadyExists",
        "Cancelled",
        "Client",
        "DeadlineExceeded",
        "FailedPrecondition",
        "Internal",
        "InvalidArgument",
        "LuthierError",
        "NotFound",
        "OutOfRange",
        "PermissionDenied",
        "ResourceExhausted",
        "Unauthenticated",
        "Unavailable",
        "Unimplemented",
        "Violation",
        "is_terminal",
        "short_name",
    ]


def test_every_status_but_ok_has_a_class() -> None:
    assert set(CLASS_OF_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_violations_reason_and_metadata_are_decoded(fake: FakeCoordinator, client: Client) -> None:
    bad = ("job.finetune.method", "there is no method 'magic'; use full or lora")
    fake.fail("CreateJob", Failure(grpc.StatusCode.INVALID_ARGUMENT, "bad job", "BAD_JOB", (bad,)))
    with pytest.raises(InvalidArgument, match="bad job") as caught:
        client.create_job(job_pb2.Job())
    error = caught.value
    assert error.violations == (Violation(*bad),)
    assert (error.reason, error.code, error.metadata) == ("BAD_JOB", grpc.StatusCode.INVALID_ARGUMENT, {"id": "c-1"})
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.violations, again.reason) == (error.message, error.violations, error.reason)


def test_raw_stubs_raise_the_same_errors(client: Client) -> None:
    with pytest.raises(NotFound):
        client.jobs.GetJob(job_pb2.GetJobRequest(name="projects/default/jobs/none"))
    with pytest.raises(NotFound):
        client.jobs.GetJob.future(job_pb2.GetJobRequest(name="projects/default/jobs/none")).result()
    with pytest.raises(NotFound):
        next(iter(client.jobs.WatchJob(job_pb2.WatchJobRequest(name="projects/default/jobs/none"))))


def test_a_wrong_key_is_unauthenticated(fake: FakeCoordinator) -> None:
    with Client(fake.address, "lut_wrong") as stranger, pytest.raises(Unauthenticated, match="LUTHIER_TOKEN"):
        stranger.status()


def test_nobody_listening_is_unavailable_and_names_the_address(fake: FakeCoordinator) -> None:
    fake.stop()
    with Client(fake.address, fake.token, timeout=10) as client, pytest.raises(Unavailable, match=fake.address):
        client.status()


def test_a_status_without_details_still_becomes_an_error(fake: FakeCoordinator, client: Client) -> None:
    fake.fail("GetStatus", Failure(grpc.StatusCode.DATA_LOSS, "odd", bare=True))
    with pytest.raises(LuthierError, match="odd") as caught:
        client.status()
    assert caught.value.reason == "DATA_LOSS"
