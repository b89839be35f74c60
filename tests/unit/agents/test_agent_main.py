"""The agent from claim to outcome, with runners of the test's own and a coordinator over real gRPC."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.__main__ import carry_out, find_runner
from agents.failures import RunCancelled, RunFailed, end_reason_of, is_peer_loss, job_error_of, outcome_of
from agents.link import Link, LinkConfig
from common.errors import InvalidArgument, Unavailable, Violation
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.fake_coordinator import TOKEN, FakeCoordinator
from tests.support.otlp import collecting

SECRET = "s" * 40


@pytest.fixture
def fake() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as coordinator:
        coordinator.claim.job.finetune.method = "full"
        yield coordinator


def _agent(fake: FakeCoordinator, folder: Path, runner: str, **environment: str) -> subprocess.Popen[str]:
    """Start a real agent process whose finetune runner is the given body of `def run(link, claim)`."""
    (folder / "runner_under_test.py").write_text(runner)
    code = "import sys\nimport agents.__main__ as main\nmain.RUNNERS['finetune'] = 'runner_under_test'\nsys.exit(main.main())\n"
    variables = {
        "LUTHIER_COORDINATOR": fake.address,
        "LUTHIER_JOB_UID": fake.job_uid,
        "LUTHIER_RUN": "1",
        "LUTHIER_CLAIM_TOKEN": TOKEN,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait(process: subprocess.Popen[str]) -> int:
    try:
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    return process.returncode


def test_an_agent_reports_its_runners_outcome_and_its_log(fake: FakeCoordinator, tmp_path: Path) -> None:
    runner = (
        "import logging, os\nfrom luthier.agent.v1 import agent_pb2\nfrom luthier.v1 import job_pb2\n"
        "def run(link, claim):\n"
        "    logging.getLogger('agents').info('at work, token %s', os.environ.get('LUTHIER_CLAIM_TOKEN'))\n"
        "    return agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_SUCCEEDED, end_reason=job_pb2.END_REASON_COMPLETED)\n"
    )
    assert _wait(_agent(fake, tmp_path, runner)) == 0
    assert fake.outcome is not None
    assert fake.outcome.state == job_pb2.JOB_STATE_SUCCEEDED
    lines = [line.message for report in fake.of("driver", "log") for line in report.lines]
    assert "agents: at work, token None" in lines, "the claim token outlived the claim"


def test_an_agent_belongs_to_its_jobs_trace_and_hands_it_on(fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.claim.trace_parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    runner = (
        "def run(link, claim):\n"
        "    link.phase('loading', link.config.trace_parent)\n"
        "    link.flush(5)\n"
        "    raise ValueError('no such thing')\n"
    )
    with collecting() as collector:
        assert _wait(_agent(fake, tmp_path, runner, LUTHIER_OTLP_ENDPOINT=collector.endpoint)) == 0
        spans = {span.name: span for span in collector.of("0af7651916cd43dd8448eb211c80319c")}
    assert {name: span.failed for name, span in spans.items()} == {"run finetune": "RUN_ERROR", "loading": "RUN_ERROR"}
    assert spans["run finetune"].attributes == {"luthier.job.uid": fake.job_uid, "luthier.run": 1}
    (phase,) = fake.of("driver", "phase")
    assert phase.message.split("-")[2] == spans["run finetune"].span_id


def test_an_exception_becomes_a_failed_outcome_with_its_traceback(fake: FakeCoordinator, tmp_path: Path) -> None:
    assert _wait(_agent(fake, tmp_path, "def run(link, claim):\n    raise ValueError('no such thing')\n")) == 0
    assert fake.outcome is not None
    assert (fake.outcome.state, fake.outcome.end_reason) == (job_pb2.JOB_STATE_FAILED, job_pb2.END_REASON_ERROR)
    error = fake.outcome.error
    assert (error.message, error.exception, error.source) == ("ValueError: no such thing", "builtins.ValueError", "driver")
    assert "runner_under_test.py" in error.traceback


WAITING = "import time\ndef run(link, claim):\n    link.phase('training')\n    {}\n"


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (job_pb2.END_REASON_USER, job_pb2.JOB_STATE_CANCELLED),
        (job_pb2.END_REASON_TIME_LIMIT, job_pb2.JOB_STATE_FAILED),
    ],
)
def test_a_runner_that_does_not_listen_is_ended_after_the_grace_period(
    fake: FakeCoordinator, tmp_path: Path, reason: job_pb2.EndReason.ValueType, state: job_pb2.JobState.ValueType
) -> None:
    process = _agent(fake, tmp_path, WAITING.format("time.sleep(60)"), LUTHIER_GRACE_SECONDS="0.2")
    fake.wait_for("driver", "phase")
    began = time.monotonic()
    fake.wish, fake.wish_reason = agent_pb2.WISH_CANCEL, reason
    assert _wait(process) == 0
    assert time.monotonic() - began < 10
    assert fake.outcome is not None
    assert (fake.outcome.state, fake.outcome.end_reason) == (state, reason)


def test_what_breaks_while_stopping_is_no_failure(fake: FakeCoordinator, tmp_path: Path) -> None:
    runner = WAITING.format("link.wished.wait(); raise ConnectionError('a rank went away')")
    process = _agent(fake, tmp_path, runner)
    fake.wait_for("driver", "phase")
    process.send_signal(2)
    assert _wait(process) == 0
    assert fake.outcome is not None
    assert fake.outcome.state == job_pb2.JOB_STATE_CANCELLED


def test_a_signal_ends_a_run_that_does_not_listen_within_seconds(fake: FakeCoordinator, tmp_path: Path) -> None:
    process = _agent(fake, tmp_path, WAITING.format("[time.sleep(0.1) for _ in range(600)]"))
    fake.wait_for("driver", "phase")
    began = time.monotonic()
    process.send_signal(15)
    assert _wait(process) == 0
    assert time.monotonic() - began < 15
    assert fake.outcome is not None
    assert fake.outcome.state == job_pb2.JOB_STATE_CANCELLED


def test_a_zombie_leaves_without_an_outcome(fake: FakeCoordinator, tmp_path: Path) -> None:
    process = _agent(fake, tmp_path, WAITING.format("time.sleep(60)"))
    fake.wait_for("driver", "phase")
    fake.stale = True
    assert _wait(process) == 75
    assert fake.outcome is None


def test_a_missing_variable_is_told_plainly() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    done = subprocess.run([sys.executable, "-m", "agents"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: LUTHIER_COORDINATOR")
    assert "Traceback" not in done.stderr


def test_an_unknown_kind_is_refused(fake: FakeCoordinator) -> None:
    with pytest.raises(InvalidArgument, match="differ in version"):
        find_runner(None)
    fake.secret = SECRET
    with Link(LinkConfig(fake.address, fake.job_uid, 1, SECRET), on_stale=lambda: None) as link:
        outcome = carry_out(link, agent_pb2.ClaimRunResponse())
    assert outcome.error.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("raised", "code", "reason"),
    [
        (InvalidArgument("bad rows", "BAD_DATA", [Violation("train line 3", "empty")]), "BAD_DATA", job_pb2.END_REASON_BAD_DATA),
        (Unavailable("hub away"), "UNAVAILABLE", job_pb2.END_REASON_ERROR),
        (MemoryError(), "OUT_OF_MEMORY", job_pb2.END_REASON_OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "OUT_OF_MEMORY", job_pb2.END_REASON_OUT_OF_MEMORY),
        (KeyError("x"), "RUN_ERROR", job_pb2.END_REASON_ERROR),
    ],
)
def test_exceptions_are_classified(raised: BaseException, code: str, reason: job_pb2.EndReason.ValueType) -> None:
    outcome = outcome_of(raised)
    assert (outcome.error.code, outcome.end_reason) == (code, reason)
    assert "\n" not in outcome.error.message


def test_a_known_cause_crosses_process_borders_unchanged() -> None:
    import pickle

    cause = job_error_of(InvalidArgument("bad rows", "BAD_DATA", [Violation("train line 3", "empty")]), "rank-1")
    again = pickle.loads(pickle.dumps(RunFailed.of(cause)))
    assert outcome_of(again).error == cause
    assert end_reason_of(cause) == job_pb2.END_REASON_BAD_DATA
    assert pickle.loads(pickle.dumps(RunCancelled(job_pb2.END_REASON_TIME_LIMIT))).reason == job_pb2.END_REASON_TIME_LIMIT


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3041"), True),
        (ValueError("the learning rate is wrong"), False),
        (InvalidArgument("connection reset by peer, says row 3", "BAD_DATA"), False),
    ],
)
def test_the_loss_of_a_peer_is_told_from_a_cause(error: BaseException, lost: bool) -> None:
    assert is_peer_loss(job_error_of(error, "rank-0")) is lost
