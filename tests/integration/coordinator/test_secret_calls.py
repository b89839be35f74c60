"""Secrets as callers see them, and a coordinator that does not have the key to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from luthier.client import Client, FailedPrecondition, InvalidArgument, NotFound
from luthier.v1 import job_pb2
from tests.support.coordinator_process import CoordinatorProcess

VALUE = "hf_plain-and-secret"


def importing(**secrets: str) -> job_pb2.Job:
    return job_pb2.Job(import_model={"source": "builtin:tiny", "output_model": "tiny"}, secrets=secrets)  # type: ignore[arg-type]


def test_a_secret_is_set_listed_used_and_deleted_and_never_told(coordinator: CoordinatorProcess, client: Client) -> None:
    made = client.set_secret("hub", VALUE)
    assert made.name == "projects/default/secrets/hub"
    again = client.set_secret("hub", VALUE + "-2")
    assert again.create_time == made.create_time
    assert again.update_time.ToNanoseconds() > made.update_time.ToNanoseconds()
    for name in ("a", "b", "c"):
        client.set_secret(name, VALUE)
    assert [secret.name.rpartition("/")[2] for secret in client.list_secrets(page_size=2)] == ["a", "b", "c", "hub"]
    job = client.create_job(importing(HF_TOKEN="hub"))
    assert dict(client.get_job(job.name).secrets) == {"HF_TOKEN": "hub"}
    with pytest.raises(FailedPrecondition, match="in use by") as caught:
        client.delete_secret("hub")
    assert caught.value.reason == "IN_USE"
    client.cancel_job(job.name)
    client.delete_secret("hub")
    with pytest.raises(NotFound, match="no secret 'hub'"):
        client.delete_secret("hub")
    assert VALUE not in coordinator.log()
    for file in coordinator.home.rglob("*"):
        assert not file.is_file() or VALUE.encode() not in file.read_bytes()


@pytest.mark.parametrize("value", ["", "short", "x" * 16_385, "a value\0with NUL"])
def test_a_bad_value_is_refused_without_being_repeated(client: Client, value: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.set_secret("bad", value)
    assert [violation.field for violation in caught.value.violations] == ["value"]
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize("validate_only", [False, True])
def test_a_job_names_secrets_that_are_there_and_variables_that_are_free(client: Client, validate_only: bool) -> None:
    client.set_secret("there", VALUE)
    with pytest.raises(NotFound) as missing:
        client.create_job(importing(ONE="there", TWO="absent"), validate_only=validate_only)
    assert [violation.field for violation in missing.value.violations] == ["job.secrets.TWO"]
    with pytest.raises(InvalidArgument) as steering:
        client.create_job(importing(RAY_ADDRESS="there", PATH="there"), validate_only=validate_only)
    assert {violation.field for violation in steering.value.violations} == {"job.secrets.RAY_ADDRESS", "job.secrets.PATH"}


def test_a_coordinator_without_the_key_says_which_setting_is_wrong(fresh: Callable[..., CoordinatorProcess]) -> None:
    first = fresh().start()
    with first.client() as client:
        client.set_secret("hub", VALUE)
    assert first.stop() == 0
    key = first.home / "secrets.key"
    old = key.read_text()
    key.unlink()
    first.start(wait=False)
    assert first.process is not None
    assert first.process.wait(30) != 0
    assert "secrets_key_path: " in first.log().splitlines()[-1]
    # A new key on top, as when keys are changed: the old one is still needed, and after that start it is not.
    new = key.read_text()
    assert new != old
    key.write_text(new + old)
    assert first.start().stop() == 0
    key.write_text(new)
    with first.start().client() as client:
        client.create_job(importing(HF_TOKEN="hub"))
