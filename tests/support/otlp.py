"""A collector: an OTLP gRPC server in this process that keeps every span it is sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Told:
    """A span as it arrived."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    failed: str
    seconds: float


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What was sent, in order of arrival."""

    def __init__(self) -> None:
        self.spans: list[Told] = []
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:
        for group in request.resource_spans:
            service = next(item.value.string_value for item in group.resource.attributes if item.key == "service.name")
            for scope in group.scope_spans:
                self.spans.extend(_told(service, span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[Told]:
        """The spans of one trace."""
        return [span for span in self.spans if span.trace_id == trace_id]

    def wait(self, enough: Callable[[list[Told]], bool], seconds: float = 15.0) -> list[Told]:
        """Wait until what was sent is enough, and return it."""
        deadline = time.monotonic() + seconds
        while not enough(list(self.spans)):
            assert time.monotonic() < deadline, [(span.service, span.name) for span in self.spans]
            time.sleep(0.02)
        return list(self.spans)


def _told(service: str, span: Any) -> Told:
    attributes = {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
    failed = span.status.message if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR else ""
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    return Told(service, span.name, *ids, attributes, failed, seconds)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens on a free port."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()
