"""One stack for every test that needs a whole one; starting Ray takes longer than most tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.client import Client
from luthier.v1 import dataset_pb2
from tests.support.hub_server import Hub, serve
from tests.support.stack import Stack


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests stay together where two processes share a run: those of the one stack, those of the one private Ray."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        shared = "stack" if "stack" in getattr(item, "fixturenames", ()) else path.parts[0]
        item.add_marker(pytest.mark.xdist_group(shared if shared in ("stack", "integration") else path.as_posix()))


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that has nothing yet; tests put folders into `repositories`."""
    with serve({}) as hub:
        yield hub


@pytest.fixture(scope="session")
def stack(hub: Hub) -> Iterator[Stack]:
    """A running stack. At the end nothing of it may be left."""
    # Not below pytest's own folders: Ray's socket paths have to stay short.
    home = Path(tempfile.mkdtemp(prefix="lt-"))
    stack = Stack(home, HF_ENDPOINT=hub.url)
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
