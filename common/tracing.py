"""Traces by OpenTelemetry: one request, followed from its caller through coordinator, agents and endpoints.

Off unless a process calls `start`: until then all that happens is a look at one variable. The context of a trace travels as text
(W3C's `traceparent`), and whoever begins a trace decides whether it is kept. Spans go to a collector by OTLP over gRPC, in the
background; one that is away costs spans and nothing else. No attribute holds a secret or what a user wrote into a request.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.errors import FailedPrecondition, InvalidArgument, Violation

log = logging.getLogger(__name__)

ENDPOINT, RATIO = "LUTHIER_OTLP_ENDPOINT", "LUTHIER_TRACE_SAMPLE_RATIO"
"""What tells a process that the coordinator starts where to send spans."""

MISSING = (
    "otlp_endpoint (LUTHIER_OTLP_ENDPOINT) is set, and OpenTelemetry's SDK is missing: pip install 'luthier[otel]', or unset it"
)
EXPORT_SECONDS = 5.0
"""How long the collector may take for a batch, and how long the end of a process waits for it."""

DELAY_MILLISECONDS = 1000.0

HEADER = "traceparent"

_W3C = TraceContextTextMapPropagator()
_provider: Any = None
_tracer: trace.Tracer | None = None


def start(service: str, endpoint: str, ratio: float = 1.0, **attributes: str) -> None:
    """Send this process's spans to the collector at `endpoint` (http://host:4317, or https://) from now on.

    `ratio` is the part of the traces kept that begin here. `service` and `attributes` say who tells.

    Raises FailedPrecondition where the SDK is not installed, InvalidArgument for what is no such URL.
    """
    global _provider, _tracer
    if _provider is not None:
        return
    check_endpoint(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise FailedPrecondition(MISSING, "NO_OTEL") from error
    host = urlsplit(endpoint).hostname or ""
    direct = (("grpc.enable_http_proxy", "0"),) if host == "localhost" or host.startswith("127.") else None
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=not endpoint.startswith("https:"), timeout=EXPORT_SECONDS, channel_options=direct
    )
    resource = Resource.create({"service.name": service, "service.version": version("luthier"), **attributes})
    _provider = TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(ratio), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=DELAY_MILLISECONDS))
    _tracer = _provider.get_tracer("luthier")


def start_from_environment(service: str, **attributes: str) -> None:
    """`start` as the coordinator told this process to, if it did. Work goes on without traces where they cannot be sent."""
    endpoint = os.environ.get(ENDPOINT, "")
    if endpoint:
        try:
            start(service, endpoint, float(os.environ.get(RATIO) or 1.0), **attributes)
        except (FailedPrecondition, InvalidArgument, ValueError) as error:
            log.warning("no traces from this process: %s", error)


def environment(endpoint: str, ratio: float) -> dict[str, str]:
    """What tells a process that is started elsewhere to do the same; nothing where traces are off."""
    return {ENDPOINT: endpoint, RATIO: f"{ratio:g}"} if endpoint else {}


def check_endpoint(endpoint: str) -> None:
    """Raise InvalidArgument for what is no collector's URL."""
    try:
        parts = urlsplit(endpoint)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None and not parts.username
    except ValueError:
        right = False
    if not right:
        why = f"{endpoint!r} is not the URL of an OTLP collector's gRPC port; it looks like http://collector:4317"
        raise InvalidArgument.of([Violation("otlp_endpoint (LUTHIER_OTLP_ENDPOINT)", why)])


def flush(seconds: float = EXPORT_SECONDS) -> None:
    """Send what has ended so far, for at most so long."""
    if _provider is not None:
        _for_at_most(seconds, _provider.force_flush, int(seconds * 1000))


def stop(seconds: float = EXPORT_SECONDS) -> None:
    """Send what is left, for at most so long, and nothing more after that."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        _for_at_most(seconds, provider.shutdown)


def _for_at_most(seconds: float, call: Any, *arguments: Any) -> None:
    thread = threading.Thread(target=call, args=arguments, name="traces", daemon=True)
    thread.start()
    thread.join(seconds)


def on() -> bool:
    """Whether this process sends spans."""
    return _tracer is not None


def begin(name: str, parent: str | None = None, kind: SpanKind = SpanKind.INTERNAL, **attributes: Any) -> Span:
    """A span that its caller ends. It belongs to the one under way here, or to `parent`, a traceparent: where that is empty or no
    such thing, it begins a trace of its own.
    """
    if _tracer is None:
        return INVALID_SPAN
    above = None if parent is None else _context(parent)
    return _tracer.start_span(name, above, kind, {key.replace("__", "."): value for key, value in attributes.items()})


@contextmanager
def span(name: str, parent: str | None = None, kind: SpanKind = SpanKind.INTERNAL, **attributes: Any) -> Iterator[Span]:
    """A span around what happens inside, which is what is under way there. What is raised there marks it as failed."""
    if _tracer is None:
        yield INVALID_SPAN
        return
    made = begin(name, parent, kind, **attributes)
    token = contexts.attach(trace.set_span_in_context(made))
    try:
        yield made
    except BaseException as error:
        failed(made, type(error).__name__)
        raise
    finally:
        contexts.detach(token)
        made.end()


def failed(spoilt: Span, why: str) -> None:
    """Mark a span as failed, with a word for why."""
    spoilt.set_status(Status(StatusCode.ERROR, why))


def recording() -> bool:
    """Whether something is under way here whose trace is kept."""
    return _tracer is not None and trace.get_current_span().is_recording()


def traceparent(of: Span | None = None) -> str:
    """The context of a span, or of what is under way here, as text; empty where there is none."""
    if _tracer is None:
        return ""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, contexts.get_current() if of is None else trace.set_span_in_context(of))
    return carrier.get(HEADER, "")


def trace_id() -> str:
    """The trace that is under way here, in hex; empty where there is none."""
    found = trace.get_current_span().get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else ""


def of_headers(headers: Mapping[str, Any] | None) -> str:
    """The traceparent of a call; empty where it has none."""
    return str((headers or {}).get(HEADER, ""))


def _context(parent: str) -> contexts.Context:
    return _W3C.extract({HEADER: parent}, contexts.Context())
