"""A backup over the line from a coordinator that works, and a coordinator on what was restored."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.main import main
from luthier.client import Client, InvalidArgument, PermissionDenied
from luthier.v1 import job_pb2, training_pb2
from tests.support.coordinator_process import TOKEN, CoordinatorProcess
from tests.support.some_rows import empty_database
from tests.support.tenants import make_key

Fresh = Callable[..., CoordinatorProcess]


@pytest.fixture
def other_kind(request: pytest.FixtureRequest, coordinator: CoordinatorProcess, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database of the kind that the coordinator does not use."""
    kind = "sqlite" if "store_url" in coordinator.settings else "postgresql"
    with empty_database(request, kind, tmp_path) as url:
        yield url


def submit(client: Client) -> job_pb2.Job:
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full")
    return client.create_job(job_pb2.Job(finetune=spec))


def test_a_store_is_moved_to_the_other_kind_of_database_while_jobs_come_in(
    client: Client, fresh: Fresh, rows: Path, other_kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client.upload_dataset(rows, "rows")
    before = [submit(client).name for _ in range(5)]
    enough = threading.Event()
    meanwhile: list[str] = []

    def go_on() -> None:
        while not enough.is_set():
            meanwhile.append(submit(client).name)

    crowd = threading.Thread(target=go_on)
    crowd.start()
    file = tmp_path / "records.backup"
    summary = client.backup(file)
    enough.set()
    crowd.join()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "storage URI" in summary.without
    with pytest.raises(InvalidArgument, match="there is a file"):
        client.backup(file)

    home = tmp_path / "new home"
    assert main(["restore", str(file), "--home", str(home), "--store-url", other_kind, "--output", "json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["rows"] == dict(summary.rows)
    assert main(["restore", str(file), "--home", str(home), "--store-url", other_kind]) == 1
    assert "error: the store at" in (said := capfd.readouterr().err)
    assert "is not empty" in said
    assert TOKEN not in said

    moved = fresh(home, store_url=other_kind).start()
    with moved.client() as reader:
        listed = {job.name for job in reader.list_jobs()}
        assert {*before} <= listed <= {*before, *meanwhile}
        assert len(listed) == summary.rows["job"]
        assert {next(reader.watch(name)).event.type for name in listed} == {job_pb2.JOB_EVENT_TYPE_CREATED}
        assert reader.get_dataset_version("rows@1").row_count == client.get_dataset_version("rows@1").row_count
        after = submit(reader)
    assert after.name not in {*before, *meanwhile}


def test_only_operators_back_up_and_nothing_is_left_of_what_was_refused(
    coordinator: CoordinatorProcess, client: Client, tmp_path: Path
) -> None:
    key = make_key(client, "default", "admin")
    with coordinator.client(key.token) as admin, pytest.raises(PermissionDenied):
        admin.backup(tmp_path / "stolen")
    assert list(tmp_path.iterdir()) == []
    assert not list(coordinator.home.glob("tmp*"))
