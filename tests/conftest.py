"""What is started once for all tests that need it: a whole stack, because Ray takes longer than most tests, and a PostgreSQL."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from luthier.client import Client
from luthier.v1 import dataset_pb2
from tests.support import postgres as postgresql
from tests.support.hub_server import Hub, serve
from tests.support.otlp import Collector, collecting
from tests.support.postgres import Postgres
from tests.support.stack import Stack

# The same examples in every run, so that a run that fails can be repeated. HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("random", max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


class TogetherScheduling(LoadScopeScheduling):
    """Where processes share a run: one has the tests of the one stack, one those with a private Ray, others everything else."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if path.startswith(("tests/e2e/", "tests/faults/test_killed.py")) and path != "tests/e2e/test_two_nodes.py":
            return "stack"
        return "integration" if path.startswith("tests/integration/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TogetherScheduling:
    """Called by pytest-xdist, where `-n` is given."""
    return TogetherScheduling(config, log)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that has nothing yet; tests put folders into `repositories`."""
    with serve({}) as hub:
        yield hub


@pytest.fixture(scope="session")
def traces() -> Iterator[Collector]:
    """Where the stack sends the traces that its callers want kept."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def stack(hub: Hub, traces: Collector) -> Iterator[Stack]:
    """A running stack. At the end nothing of it may be left."""
    # Not below pytest's own folders: Ray's socket paths have to stay short.
    home = Path(tempfile.mkdtemp(prefix="lt-"))
    stack = Stack(home, HF_ENDPOINT=hub.url, LUTHIER_OTLP_ENDPOINT=traces.endpoint, LUTHIER_TRACE_SAMPLE_RATIO="0")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
        left = stack.processes()
        shutil.rmtree(home, ignore_errors=True)
        assert not left, f"left running: {left}"


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    with stack.client() as client:
        yield client


@pytest.fixture(scope="session")
def small_dataset(stack: Stack, client: Client, tmp_path_factory: pytest.TempPathFactory) -> dataset_pb2.DatasetVersion:
    """A few short rows whose label is in their first word: enough to train a step, and to see something learned."""
    words = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}
    path = tmp_path_factory.mktemp("small") / "colours.csv"
    rows = [f"{word} thing number {number},{label}" for number in range(60) for word, label in words.items()]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return client.upload_dataset(path, "colours")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL. Where it is not installed, what needs it is skipped, or fails if the environment says so."""
    if postgresql.binaries() is None:
        if os.environ.get(postgresql.REQUIRED) == "1":
            pytest.fail(postgresql.MISSING)
        pytest.skip(postgresql.MISSING)
    server = Postgres()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def migrated(postgres: Postgres) -> str:
    """Name of a database with the newest schema, from which others are copied."""
    # Imported here: most tests run without the coordinator.
    from coordinator.store.engines import make_engine
    from coordinator.store.migrate import upgrade

    name = postgres.database()
    engine = make_engine(postgres.url(name))
    upgrade(engine)
    engine.dispose()
    return name


@pytest.fixture
def postgres_url(postgres: Postgres, migrated: str) -> Iterator[str]:
    """URL of a fresh, migrated database."""
    name = postgres.database(migrated)
    yield postgres.url(name)
    postgres.drop(name)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database for a store: a test that asks for it runs on both kinds."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'records.db'}"
