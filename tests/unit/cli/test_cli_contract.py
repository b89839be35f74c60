"""What every command keeps to: exit statuses, one document on stdout, one plain line per error."""

import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from cli.failures import Failure as Refusal
from cli.failures import explain
from luthier.v1.job_pb2 import JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED, Job
from tests.support.fake_services import Failure, FakeCoordinator

PROGRAM = Path(sys.executable).parent / "luthier"
CODES = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (CODES.INVALID_ARGUMENT, 2),
        (CODES.NOT_FOUND, 3),
        (CODES.UNAUTHENTICATED, 4),
        (CODES.PERMISSION_DENIED, 4),
        (CODES.DEADLINE_EXCEEDED, 5),
        (CODES.FAILED_PRECONDITION, 1),
        (CODES.ALREADY_EXISTS, 1),
        (CODES.RESOURCE_EXHAUSTED, 1),
        (CODES.INTERNAL, 1),
    ],
)
def test_each_failure_has_its_exit_status_and_one_line(
    luthier, fake: FakeCoordinator, code: grpc.StatusCode, status: int
) -> None:
    fake.fail("GetJob", Failure(code, "it is so\nbecause", violations=(("name", "is odd"),)))
    ran = luthier("job", "show", "j-1", "--output", "json")
    assert (ran.status, ran.stdout) == (status, "")
    assert ran.stderr.startswith("error: it is so because; name: is odd")
    assert ran.stderr.count("\n") == 1


def test_nobody_there_is_5_and_names_the_address(luthier, fake: FakeCoordinator) -> None:
    fake.stop()
    ran = luthier("status")
    assert ran.status == 5
    assert ran.stderr.startswith(f"error: no coordinator answers at {fake.address} (connection refused); ")
    assert "luthier up" in ran.stderr


def test_a_wrong_key_is_4_and_says_where_keys_go(luthier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_TOKEN", "lut_wrong")
    ran = luthier("job", "list")
    assert ran.status == 4
    assert "LUTHIER_TOKEN" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["job", "show"], "Missing argument"),
        (["job", "show", "a", "--nope"], "--nope"),
        (["job", "list", "--limit", "none"], "--limit"),
        (["nonsense"], "nonsense"),
        (["job", "list", "--output", "xml"], "--output"),
        (["train", "--dataset", "d"], "--base"),
    ],
)
def test_wrong_usage_is_2_and_one_line_that_points_to_help(luthier, arguments: list[str], said: str) -> None:
    ran = luthier(*arguments)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert said in ran.stderr
    assert "--help" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_help_is_shown_where_no_command_is_given(luthier) -> None:
    ran = luthier()
    assert ran.status == 2
    assert "Usage: luthier" in ran.stderr
    ran = luthier("--help")
    assert ran.status == 0
    for command in (
        "up",
        "down",
        "status",
        "doctor",
        "demo",
        "train",
        "sweep",
        "evaluate",
        "job",
        "dataset",
        "model",
        "endpoint",
        "secret",
        "project",
        "member",
        "key",
    ):
        assert f"  {command} " in ran.stdout


def test_the_stack_trace_is_shown_with_debug_only(luthier, fake: FakeCoordinator) -> None:
    assert "Traceback" not in luthier("job", "show", "none").stderr
    ran = luthier("job", "show", "none", "--debug")
    assert "Traceback" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("error: ")


def test_shared_options_count_before_and_after_the_command(
    luthier, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_SERVER", "127.0.0.1:1")
    for arguments in (
        ["--server", fake.address, "--output", "json", "status"],
        ["status", "--server", fake.address, "-o", "json"],
        ["--server", "127.0.0.1:2", "status", "--server", fake.address, "-o", "json"],
    ):
        ran = luthier(*arguments)
        assert ran.status == 0
        assert set(ran.json) >= {"coordinator", "gateway", "ray"}


def test_json_has_the_contracts_field_names_and_defaults_too(luthier, fake: FakeCoordinator) -> None:
    fake.add_job(Job(display_name="x"))
    ran = luthier("job", "list", "-o", "json")
    (job,) = ran.json["jobs"]
    assert (job["display_name"], job["state"], job["end_reason"], job["run"]) == (
        "x",
        "JOB_STATE_QUEUED",
        "END_REASON_UNSPECIFIED",
        0,
    )
    assert luthier("job", "show", "j-1", "-o", "json").json["name"] == "projects/default/jobs/j-1"
    assert "j-1" in luthier("job", "show", "j-1").stdout


def test_the_project_goes_into_the_names(luthier, fake: FakeCoordinator) -> None:
    luthier("job", "list", "--project", "desk")
    assert fake.called("ListJobs")[-1].request.parent == "projects/desk"
    luthier("job", "show", "j-9", "--project", "desk")
    assert fake.called("GetJob")[-1].request.name == "projects/desk/jobs/j-9"


def test_a_watch_prints_one_document_a_line(luthier, fake: FakeCoordinator) -> None:
    import json

    job = fake.add_job(Job())
    fake.emit(job, JOB_STATE_RUNNING, "at work")
    fake.emit(job, JOB_STATE_SUCCEEDED, "done")
    ran = luthier("job", "watch", "j-1", "-o", "json")
    items = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [item["event"]["sequence"] for item in items] == ["1", "2"]
    assert items[-1]["job"]["state"] == "JOB_STATE_SUCCEEDED"
    assert ran.status == 0


def test_errors_of_ours_say_that_they_are() -> None:
    assert explain(Refusal("no", 3)) == ("no", 3)
    line, status = explain(KeyError("x"))
    assert status == 1
    assert "a fault of luthier itself" in line
    assert explain(PermissionError(13, "Permission denied", "/x"))[0] == "/x: Permission denied"


def run_program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_installed_program_completes_commands_and_options() -> None:
    said = run_program(_LUTHIER_COMPLETE="complete_bash", COMP_WORDS="luthier job s", COMP_CWORD="2")
    assert said.stdout.split() == ["submit", "show"]
    said = run_program(_LUTHIER_COMPLETE="complete_bash", COMP_WORDS="luthier train --out", COMP_CWORD="2")
    assert set(said.stdout.split()) == {"--output", "--output-model"}
    assert "complete_zsh" in run_program(_LUTHIER_COMPLETE="source_zsh").stdout


def test_the_program_starts_without_heavy_imports() -> None:
    code = "import sys, cli.main; print(sorted({'ray', 'torch', 'openai', 'sklearn', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_reader_that_has_seen_enough_is_no_error(fake: FakeCoordinator) -> None:
    job = fake.add_job(Job())
    for number in range(3000):
        fake.emit(job, JOB_STATE_RUNNING, f"event {number} " + "x" * 80)
    fake.emit(job, JOB_STATE_SUCCEEDED)
    done = subprocess.run(
        f"{PROGRAM} job watch j-1 --server {fake.address} | head -2",
        shell=True,
        env={**os.environ, "LUTHIER_TOKEN": fake.token},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert len(done.stdout.splitlines()) == 2
    assert "Broken pipe" not in done.stderr
