"""What the processes of a run do as spans of its job's trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from agents.link import Link, LinkConfig
from agents.trail import Trail
from common import tracing
from luthier.v1 import job_pb2
from tests.support.fake_coordinator import FakeCoordinator
from tests.support.otlp import Collector, collecting

SECRET = "s" * 40
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def fake() -> Iterator[FakeCoordinator]:
    coordinator = FakeCoordinator()
    coordinator.secret = SECRET
    with coordinator:
        yield coordinator


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        for name, value in tracing.environment(collector.endpoint, 1.0).items():
            monkeypatch.setenv(name, value)
        yield collector
        tracing.stop()


@pytest.fixture
def open_link(fake: FakeCoordinator) -> Iterator[Callable[[], Link]]:
    made: list[Link] = []

    def make() -> Link:
        config = LinkConfig(fake.address, fake.job_uid, fake.run, SECRET, interval=0.02, trace_parent=PARENT)
        made.append(Link(config, "driver", on_stale=lambda: None))
        return made[-1]

    yield make
    for link in made:
        link.close()


def test_each_phase_is_a_span_below_that_of_the_run(collector: Collector, open_link: Callable[[], Link]) -> None:
    link = open_link()
    link.trail = Trail("luthier-agent", "run finetune", link.config.trace_parent, **{"luthier.run": 1})
    link.phase("loading", "bringing it")
    time.sleep(0.02)
    link.phase("training", "training it")
    link.trail.end()
    tracing.stop()
    spans = {span.name: span for span in collector.spans}
    whole = spans["run finetune"]
    assert (whole.service, whole.trace_id, whole.parent_id) == ("luthier-agent", TRACE, "b7ad6b7169203331")
    assert whole.attributes == {"luthier.run": 1}
    assert {spans[name].parent_id for name in ("loading", "training")} == {whole.span_id}
    assert 0.02 <= spans["loading"].seconds <= whole.seconds


def test_a_run_that_fails_says_so_and_in_which_phase(collector: Collector) -> None:
    trail = Trail("luthier-agent", "run finetune", PARENT)
    trail.phase("loading")
    trail.phase("training")
    trail.end("OUT_OF_MEMORY")
    tracing.stop()
    assert {span.name: span.failed for span in collector.spans} == {
        "loading": "",
        "training": "OUT_OF_MEMORY",
        "run finetune": "OUT_OF_MEMORY",
    }


def test_reports_of_what_happened_belong_to_the_trace_and_those_that_come_all_the_time_do_not(
    collector: Collector, fake: FakeCoordinator, open_link: Callable[[], Link]
) -> None:
    link = open_link()
    trail = link.trail = Trail("luthier-agent", "run finetune", PARENT)
    for step in range(3):
        link.progress(job_pb2.Progress(step=step))
        link.metrics(step, {"loss": 1.0})
        link.log("info", "at work")
        assert link.flush(5)
    assert set(fake.traces) == {""}
    link.checkpoint(job_pb2.Checkpoint(step=3, uri="mem://3"))
    assert link.flush(5)
    assert set(fake.traces) == {"", trail.traceparent}
    assert trail.traceparent.split("-")[1] == TRACE


def test_where_nobody_traces_nothing_is_sent_and_nothing_is_loaded(fake: FakeCoordinator, open_link: Callable[[], Link]) -> None:
    link = open_link()
    trail = link.trail = Trail("luthier-agent", "run finetune", "")
    link.phase("loading", "")
    trail.end("FAILED")
    assert link.flush(5)
    assert trail.traceparent == ""
    assert set(fake.traces) == {""}
    assert not tracing.on()
