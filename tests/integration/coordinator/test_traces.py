"""Calls to a coordinator as spans: whose they are, how they ended, and what is not told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from luthier.client import NotFound
from luthier.client.channel import open_channel
from luthier.v1 import job_pb2, job_pb2_grpc, training_pb2
from tests.support.coordinator_process import TOKEN, CoordinatorProcess
from tests.support.otlp import Collector, collecting

Fresh = Callable[..., CoordinatorProcess]
TRACE = 0x0AF7651916CD43DD8448EB211C80319C
CALLER = SpanContext(TRACE, 0xB7AD6B7169203331, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


def test_a_call_belongs_to_the_trace_that_its_caller_is_in(fresh: Fresh, rows: Path, collector: Collector) -> None:
    process = fresh(otlp_endpoint=collector.endpoint, trace_sample_ratio="0").start()
    with process.client() as client:
        client.upload_dataset(rows, "rows")
        job = job_pb2.Job(finetune=training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full"))
        token = context.attach(trace.set_span_in_context(NonRecordingSpan(CALLER)))
        made = client.create_job(job)
        next(client.watch(made.name))
        with pytest.raises(NotFound):
            client.get_job("ft-none")
        context.detach(token)
        client.get_job(made.name)
    # Programs without OpenTelemetry name the trace themselves.
    given = f"00-{TRACE + 1:032x}-b7ad6b7169203331-01"
    with open_channel(process.address, TOKEN) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        stub.GetJob(job_pb2.GetJobRequest(name=made.name), metadata=(("traceparent", given),))
    process.stop()
    calls = {span.name.partition("/")[2]: span for span in collector.of(f"{TRACE:032x}") if span.name.startswith("luthier.v1.")}
    assert set(calls) == {"CreateJob", "WatchJob", "GetJob"}
    create = calls["CreateJob"]
    assert (create.service, create.parent_id, create.failed) == ("luthier-coordinator", f"{CALLER.span_id:016x}", "")
    assert create.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "luthier.v1.JobService",
        "rpc.method": "CreateJob",
        "rpc.grpc.status_code": 0,
        "luthier.project": "default",
    }
    missing = calls["GetJob"]
    assert (missing.attributes["rpc.grpc.status_code"], missing.failed) == (grpc.StatusCode.NOT_FOUND.value[0], "")
    (write,) = [span for span in collector.of(f"{TRACE:032x}") if span.name == "store.write"]
    assert write.parent_id == create.span_id
    assert [span.name for span in collector.of(f"{TRACE + 1:032x}")] == ["luthier.v1.JobService/GetJob"]
    # Of traces that begin here none is kept at a ratio of 0.
    assert {span.trace_id for span in collector.spans} == {f"{TRACE:032x}", f"{TRACE + 1:032x}"}
    assert TOKEN not in str(collector.spans)


def test_without_a_callers_trace_calls_begin_one_but_health_does_not(fresh: Fresh, collector: Collector) -> None:
    process = fresh(otlp_endpoint=collector.endpoint).start()
    with process.client() as client:
        client.status()
    assert process.stop() == 0
    (status,) = [span for span in collector.spans if span.name.startswith("luthier.v1.")]
    assert (status.name, status.parent_id) == ("luthier.v1.AdminService/GetStatus", "")
    assert not [span for span in collector.spans if "Health" in span.name]


def test_a_collector_that_does_not_exist_is_no_reason_not_to_work(fresh: Fresh, collector: Collector) -> None:
    process = fresh(otlp_endpoint="http://127.0.0.1:9").start()
    with process.client() as client:
        client.status()
    assert process.stop() == 0


def test_what_is_no_collectors_address_is_refused_at_once(fresh: Fresh) -> None:
    process = fresh(otlp_endpoint="collector:4317")
    done = subprocess.run(
        [sys.executable, "-m", "coordinator"], env=process.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: otlp_endpoint (LUTHIER_OTLP_ENDPOINT): 'collector:4317' is not the URL")
