"""Scratch folders go with the last process that holds them, and what a killed process left goes with the next run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agents.training.scratch import scratch_folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_NODE_HOME", str(tmp_path))


def test_the_last_one_out_removes_it() -> None:
    with scratch_folder("a") as first:
        with scratch_folder("a") as second:
            assert first == second
            (second / "file").write_text("x")
        assert (first / "file").exists(), "removed under a process that still uses it"
    assert not first.exists()
    assert list(first.parent.iterdir()) == []


def test_a_live_run_is_left_alone_and_a_dead_one_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom agents.training.scratch import scratch_folder\n"
        "with scratch_folder('dead') as folder:\n    (folder / 'big').write_text('x')\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / "runs" / "dead" / "big").exists()
    with scratch_folder("alive") as alive, scratch_folder("next"):
        assert not (tmp_path / "runs" / "dead").exists()
        assert alive.exists()
