"""Secrets by the command line: the value is never an argument and never shown."""

import io
import sys
from pathlib import Path

import pytest

from cli.commands import secrets
from luthier.v1.job_pb2 import Job
from tests.support.fake_services import FakeCoordinator

VALUE = "hf_plain-and-secret"


def test_a_value_comes_from_a_file_without_its_last_line_end(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{VALUE}\n")
    ran = luthier("secret", "set", "hub", "--from-file", file, "-o", "json")
    assert ran.json["name"] == "projects/default/secrets/hub"
    assert fake.called("SetSecret")[0].request.value == VALUE
    assert VALUE not in ran.stdout + ran.stderr
    file.write_text("one\ntwo\n\n")
    luthier("secret", "set", "lines", "--from-file", file)
    assert fake.called("SetSecret")[1].request.value == "one\ntwo\n"


def test_a_value_comes_from_a_pipe(luthier, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{VALUE}\r\n"))
    assert luthier("secret", "set", "hub").status == 0
    assert fake.called("SetSecret")[0].request.value == VALUE


def test_who_sits_there_is_asked_and_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    asked = {}

    def prompt(text: str, **options: bool) -> str:
        asked.update(options, text=text)
        return VALUE

    monkeypatch.setattr(secrets.typer, "prompt", prompt)
    assert secrets.read_value("hub", None) == VALUE
    assert asked == {"text": "value of hub", "hide_input": True, "err": True}


def test_what_is_no_text_is_refused(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(b"\xff\xfe\x00")
    ran = luthier("secret", "set", "hub", "--from-file", file)
    assert (ran.status, "not text in UTF-8" in ran.stderr) == (2, True)
    assert luthier("secret", "set", "hub", "--from-file", tmp_path / "none").status != 0
    assert not fake.called("SetSecret")


def test_secrets_are_listed_and_deleted(luthier, fake: FakeCoordinator, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(VALUE)
    luthier("secret", "set", "hub", "--from-file", tmp_path / "token")
    assert luthier("secret", "list").stdout.splitlines()[1].split()[0] == "hub"
    assert luthier("secret", "delete", "hub").status == 2
    assert luthier("secret", "delete", "hub", "--yes").stdout == "deleted hub\n"
    assert luthier("secret", "list", "-o", "json").json["secrets"] == []


def test_jobs_refer_to_secrets_by_name(luthier, fake: FakeCoordinator) -> None:
    ran = luthier(
        *("train", "--base", "builtin:tiny", "--dataset", "d", "--secret", "HF_TOKEN=hub", "--secret", "WANDB_KEY=wandb"),
        "--validate-only",
    )
    assert ran.status == 0
    sent: Job = fake.called("CreateJob")[0].request.job
    assert dict(sent.secrets) == {"HF_TOKEN": "hub", "WANDB_KEY": "wandb"}
    assert "HF_TOKEN=hub, WANDB_KEY=wandb" in ran.stdout
    assert luthier("train", "--base", "builtin:tiny", "--dataset", "d", "--secret", "hub").status == 2
