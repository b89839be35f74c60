import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from tests.support.fake_services import FakeCoordinator


@dataclass
class Ran:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Luthier = Callable[..., Ran]


@pytest.fixture
def fake() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
def luthier(fake: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Luthier:
    """The program, pointed at the fake coordinator."""
    for name in ("LUTHIER_OUTPUT", "LUTHIER_PROJECT", "LUTHIER_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LUTHIER_SERVER", fake.address)
    monkeypatch.setenv("LUTHIER_TOKEN", fake.token)
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Ran(status, *capfd.readouterr())

    return run
