from collections.abc import Iterator

import pytest

from luthier.client import Client
from tests.support.fake_services import FakeCoordinator


@pytest.fixture
def fake() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
def client(fake: FakeCoordinator) -> Iterator[Client]:
    with Client(fake.address, fake.token, timeout=20, patience=20) as connection:
        yield connection
