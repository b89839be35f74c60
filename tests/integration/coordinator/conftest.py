"""One coordinator without Ray for the tests that only talk to it, and fresh ones for those that hurt it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luthier.client import Client
from luthier.v1 import admin_pb2, member_pb2
from tests.support.coordinator_process import CoordinatorProcess, free_port
from tests.support.postgres import Postgres
from tests.support.tenants import Tenants, furnish, make_key


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def coordinator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    # An address at which no Ray answers: whatever needs none has to work all the same.
    settings = {"ray_address": f"http://127.0.0.1:{free_port()}"}
    if request.param == "postgresql":
        # Empty: a coordinator makes the schema itself.
        postgres: Postgres = request.getfixturevalue("postgres")
        settings["store_url"] = postgres.url(postgres.database())
    process = CoordinatorProcess(tmp_path_factory.mktemp("home"), **settings).start()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def client(coordinator: CoordinatorProcess) -> Iterator[Client]:
    with coordinator.client() as client:
        yield client


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[..., CoordinatorProcess]]:
    made: list[CoordinatorProcess] = []

    def make(home: Path | None = None, **settings: str) -> CoordinatorProcess:
        made.append(CoordinatorProcess(home or tmp_path / f"home{len(made)}", **settings))
        return made[-1]

    yield make
    for process in made:
        process.kill()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A small data set of texts and labels."""
    path = tmp_path / "rows.csv"
    lines = [f"text number {number} of {'ab'[number % 2]},{'ab'[number % 2]}" for number in range(40)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tenants(coordinator: CoordinatorProcess, client: Client) -> Iterator[Tenants]:
    keys = []
    for project in ("ours", "theirs"):
        client.admin.CreateProject(admin_pb2.CreateProjectRequest(project_id=project))
        keys.append(make_key(client, project, "admin").token)
        furnish(coordinator, project)
    address = coordinator.address
    with Client(address, keys[0], project="ours") as ours, Client(address, keys[1], project="theirs") as theirs:
        for tenant in (ours, theirs):
            tenant.set_secret("token", f"the token of {tenant.project}")
            tenant.set_member(member_pb2.Member(name="ada", role=admin_pb2.ROLE_EDITOR))
        theirs.set_secret("theirs-alone", "something of theirs")
        yield Tenants(ours, theirs, *keys)
