"""Secrets in an agent: in its environment, and in nothing that it says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents import concealed
from agents.failures import job_error_of
from agents.link import LinkConfig
from agents.training.worker import TrainPayload
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.fake_coordinator import FakeCoordinator
from tests.unit.agents.test_agent_main import SECRET, _agent

VALUE = 'hf_"plain/and secret'


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process has a secret for the length of a test."""
    monkeypatch.setattr(concealed, "_held", {})
    monkeypatch.setattr(concealed, "_pattern", None)
    monkeypatch.setattr("sys.stdout", concealed.sys.stdout)
    monkeypatch.setattr("sys.stderr", concealed.sys.stderr)
    for name in ("HF_TOKEN", "KEY"):
        monkeypatch.delenv(name, raising=False)
    concealed.take({"HF_TOKEN": VALUE, "KEY": "-- BEGIN --\nsecond-line-of-it\nshort\n"})
    yield
    for name in ("HF_TOKEN", "KEY"):
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    "text",
    [VALUE, repr(VALUE), json.dumps({"token": VALUE}), "https://hub/?token=hf_%22plain%2Fand%20secret", "x second-line-of-it"],
)
def test_a_value_is_blotted_out_however_it_is_written(taken: None, text: str) -> None:
    blotted = concealed.blot(text)
    assert "***" in blotted
    assert "plain" not in blotted
    assert "second-line" not in blotted
    assert concealed.blot("a short word") == "a short word"


def test_every_text_of_a_report_is_blotted(taken: None) -> None:
    report = agent_pb2.Report(
        outcome=agent_pb2.OutcomeReport(
            error=job_pb2.JobError(
                message=f"401 for {VALUE}",
                field_violations=[job_pb2.FieldViolation(field="x", description=VALUE)],
            ),
            model=agent_pb2.ProducedModel(parameters={"token": VALUE}, metrics={"loss": 1.0}),
        )
    )
    concealed.blot_message(report)
    assert "plain" not in str(report)
    assert report.outcome.error.message == "401 for ***"
    assert report.outcome.model.parameters["token"] == "***"
    assert report.outcome.model.metrics["loss"] == 1.0


def test_an_error_is_blotted_before_it_is_cut(taken: None) -> None:
    for before in (1980, 1990):  # either limit, that of the line and that of the message, would cut the value in two
        error = job_error_of(ValueError("x" * before + VALUE), "driver")
        assert "hf_" not in error.message + error.traceback


def test_what_a_run_is_handed_does_not_show_it() -> None:
    link = LinkConfig("127.0.0.1:1", "uid", 1, SECRET)
    payload = TrainPayload(b"", link, "b", "h", "n", "d", "h", "r", secrets={"HF_TOKEN": VALUE})
    assert VALUE not in repr(payload)
    assert "plain" not in str({"payload": payload})


def test_an_agent_has_the_secret_and_reports_nothing_of_it(tmp_path: Path) -> None:
    runner = (
        "import logging, os, sys\n"
        "from agents import concealed\n"
        "def run(link, claim):\n"
        "    token = os.environ['HF_TOKEN']\n"
        "    assert concealed.held() == {'HF_TOKEN': token} and not claim.secrets\n"
        "    link.phase('training', f'begins with {token}')\n"
        "    logging.getLogger('agents').warning('token %s of %d', token, len(token))\n"
        "    print('out', token)\n"
        "    print('err', token, file=sys.stderr)\n"
        "    raise ValueError(f'the hub refused {token!r}')\n"
    )
    with FakeCoordinator() as fake:
        fake.claim.job.finetune.method = "full"
        fake.claim.secrets["HF_TOKEN"] = VALUE
        process = _agent(fake, tmp_path, runner)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0
        said = "".join(str(call) for call in fake.calls) + out + err
        assert "plain" not in said
        assert fake.outcome is not None
        assert fake.outcome.error.message == "ValueError: the hub refused '***'"
        lines = [line.message for report in fake.of("driver", "log") for line in report.lines]
        assert f"agents: token *** of {len(VALUE)}" in lines
        assert "out ***" in out
        assert "err ***" in err
