"""`luthier backup` and `restore`: what they print, and what they leave."""

from __future__ import annotations

import io
import os
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from cli.commands import backup
from cli.output import Output
from tests.support.fake_services import Failure, FakeCoordinator


def test_a_backup_is_a_private_file_and_says_what_is_not_in_it(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.backup = os.urandom(2_000_000)
    ran = luthier("backup", tmp_path / "b")
    assert ran.status == 0
    assert (tmp_path / "b").read_bytes() == fake.backup
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    assert "12 rows of 2 tables, 1.9 MiB, schema 0015" in ran.stdout
    assert "not in it: artifacts" in ran.stdout
    answer = luthier("backup", tmp_path / "c", "--output", "json").json
    assert (answer["file"], answer["rows"]) == (str(tmp_path / "c"), {"job": "5", "job_event": "7"})
    ran = luthier("backup", tmp_path / "b")
    assert (ran.status, "there is a file" in ran.stderr) == (2, True)


def test_a_backup_that_breaks_off_or_arrives_changed_leaves_no_file(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.backup = os.urandom(2_000_000)
    fake.fail("BackupRecords.chunk", Failure(grpc.StatusCode.UNAVAILABLE, "the server is going away"))
    assert luthier("backup", tmp_path / "b").status == 5
    fake.backup_sent = fake.backup[:-1] + b"?"
    ran = luthier("backup", tmp_path / "b")
    assert (ran.status, "did not arrive as it was sent" in ran.stderr) == (1, True)
    assert not [name for name in os.listdir(tmp_path) if "b" in name.split(".")]


def test_restore_says_in_one_line_what_is_wrong_with_a_file(luthier, tmp_path: Path) -> None:
    home = tmp_path / "h"
    ran = luthier("restore", tmp_path / "none", "--home", home)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr == f"error: cannot read {tmp_path / 'none'}: No such file or directory\n"
    (tmp_path / "odd").write_bytes(b"something else" * 20)
    ran = luthier("restore", tmp_path / "odd", "--home", home)
    assert (ran.status, ran.stderr.count("\n"), "is no backup of Luthier" in ran.stderr) == (2, 1, True)
    assert not (home / "luthier.db").exists()


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_bar_is_shown_only_for_what_takes_long(monkeypatch: pytest.MonkeyPatch, patience: float, shown: bool) -> None:
    monkeypatch.setattr(backup, "PATIENCE_SECONDS", patience)
    out, screen = Output(as_json=True), io.StringIO()
    out.stderr = Console(file=screen, force_terminal=True, width=100)
    with backup.slow_bar(out) as show:
        show("rows", 3, 12)
        show("bytes", 5, 10)
    assert ("bytes" in screen.getvalue(), "5/10" in screen.getvalue()) == (shown, shown)
