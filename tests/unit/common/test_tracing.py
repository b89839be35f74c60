"""Spans reach a collector, belong together by traceparent, and cost nothing where they are off."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator
from typing import Any

import pytest

from common import tracing
from common.errors import FailedPrecondition, InvalidArgument
from tests.support.otlp import Collector, collecting

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector
        tracing.stop()


def test_spans_arrive_with_their_parents_and_their_failures(collector: Collector) -> None:
    tracing.start("luthier-test", collector.endpoint, node="n1")
    with tracing.span("outer", PARENT, luthier__job="j") as outer:
        assert tracing.trace_id() == "0af7651916cd43dd8448eb211c80319c"
        sent = tracing.traceparent()
        with pytest.raises(ValueError, match="no"), tracing.span("inner"):
            raise ValueError("no")
    with tracing.span("elsewhere", sent):
        pass
    tracing.stop()
    spans = {span.name: span for span in collector.spans}
    assert {span.trace_id for span in spans.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    assert spans["outer"].parent_id == "b7ad6b7169203331"
    assert spans["inner"].parent_id == spans["elsewhere"].parent_id == spans["outer"].span_id
    assert (spans["inner"].failed, spans["outer"].failed) == ("ValueError", "")
    assert (spans["outer"].service, spans["outer"].attributes) == ("luthier-test", {"luthier.job": "j"})
    assert outer.get_span_context().is_valid


@pytest.mark.parametrize("odd", ["", "00-zz", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\N{SNOWMAN}" * 50])
def test_what_is_no_traceparent_begins_a_trace(collector: Collector, odd: str) -> None:
    tracing.start("luthier-test", collector.endpoint)
    with tracing.span("one", odd):
        pass
    tracing.stop()
    assert [span.parent_id for span in collector.spans] == [""]


def test_who_begins_a_trace_decides_whether_it_is_kept(collector: Collector) -> None:
    tracing.start("luthier-test", collector.endpoint, ratio=0.0)
    with tracing.span("ours", ""):
        assert not tracing.recording()
        dropped = tracing.traceparent()
    assert int(dropped[-2:], 16) & 1 == 0
    with tracing.span("kept by its caller", PARENT):
        assert tracing.recording()
    with tracing.span("dropped by its caller", dropped):
        pass
    tracing.stop()
    assert [span.name for span in collector.spans] == ["kept by its caller"]


def test_off_there_are_no_spans_and_no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "__import__", _without_sdk)
    assert not tracing.on()
    with tracing.span("nothing", PARENT) as made:
        assert not made.is_recording()
        assert (tracing.traceparent(), tracing.trace_id(), tracing.recording()) == ("", "", False)
    tracing.begin("nothing").end()
    tracing.flush()
    tracing.stop()
    with pytest.raises(FailedPrecondition, match=r"pip install 'luthier\[otel\]', or unset it"):
        tracing.start("luthier-test", "http://127.0.0.1:4317")
    monkeypatch.setenv(tracing.ENDPOINT, "http://127.0.0.1:4317")
    tracing.start_from_environment("luthier-test")  # an agent goes on without
    assert not tracing.on()


_import = builtins.__import__


def _without_sdk(name: str, *arguments: Any, **options: Any) -> Any:
    if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
        raise ImportError(name)
    return _import(name, *arguments, **options)


@pytest.mark.parametrize("odd", ["collector:4317", "http://collector", "ftp://c:1", "http://u:p@c:4317", "http://[::1:4317"])
def test_what_is_no_collectors_url_is_refused(odd: str) -> None:
    with pytest.raises(InvalidArgument, match=r"otlp_endpoint \(LUTHIER_OTLP_ENDPOINT\): .* it looks like http://collector:4317"):
        tracing.start("luthier-test", odd)


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    with collecting() as gone:
        endpoint = gone.endpoint
    tracing.start("luthier-test", endpoint)
    for _ in range(3):
        with tracing.span("lost"):
            pass
        tracing.flush(0.3)
    began = time.monotonic()
    tracing.stop(0.3)
    assert time.monotonic() - began < 2
