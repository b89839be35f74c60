"""The one place where channels to a coordinator are made: address, key, TLS, retries, and errors as exceptions."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import grpc

from luthier.client.errors import LuthierError, from_call
from luthier.client.tls import Tls

MAX_MESSAGE_BYTES = 64 * 2**20
HEADER = "traceparent"


class _Details(NamedTuple):
    """The fields of grpc.ClientCallDetails, which offers no way to change one of them."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Call:
    """A running call whose failure is raised as a LuthierError; everything else is the call's own."""

    def __init__(self, call: Any, server: str, tls: Tls) -> None:
        self._call = call
        self._server = server
        self._tls = tls

    def _error(self, error: grpc.RpcError) -> LuthierError:
        return from_call(error, self._server, self._tls.advice)

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._call.result(timeout)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = self._call.exception(timeout)
        return self._error(error) if isinstance(error, grpc.RpcError) else error

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class _Interceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor):
    """Adds key, default deadline and request id to each call, and turns failures into exceptions."""

    def __init__(self, server: str, token: str, timeout: float | None, tls: Tls) -> None:
        self._server = server
        self._timeout = timeout
        self._tls = tls
        self._metadata: tuple[tuple[str, str | bytes], ...] = (("authorization", f"Bearer {token}"),) if token else ()

    def _details(self, details: Any, timeout: float | None) -> Any:
        return _Details(
            details.method,
            timeout if details.timeout is None else details.timeout,
            (*(details.metadata or ()), *self._metadata, *_trace(details.metadata)),
            details.credentials,
            details.wait_for_ready,
            getattr(details, "compression", None),
        )

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return _Call(
            continuation(self._details(client_call_details, self._timeout), _repeatable(request)), self._server, self._tls
        )

    def intercept_unary_stream(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return _Call(continuation(self._details(client_call_details, None), request), self._server, self._tls)

    def intercept_stream_unary(self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Any) -> Any:
        return _Call(continuation(self._details(client_call_details, None), request_iterator), self._server, self._tls)


def _trace(given: Sequence[tuple[str, str | bytes]] | None) -> tuple[tuple[str, str], ...]:
    """The trace that a call belongs to, unless it is given one: OpenTelemetry's present one, else what TRACEPARENT says."""
    if any(name == HEADER for name, _ in given or ()):
        return ()
    carrier: dict[str, str] = {}
    # Nothing can be under way where nobody has imported it, so that this needs no dependency.
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carrier)
    if not carrier and (outer := os.environ.get(HEADER.upper())):
        carrier[HEADER] = outer
    return tuple(carrier.items())


def _repeatable(request: Any) -> Any:
    """Give a request that takes a request_id one, so that a retry of the call cannot create a second thing."""
    if "request_id" not in request.DESCRIPTOR.fields_by_name or request.request_id:
        return request
    copy = type(request)()
    copy.CopyFrom(request)
    copy.request_id = str(uuid.uuid4())
    return copy


def service_config() -> str:
    """JSON of the gRPC service config: which calls are repeated by themselves, and how often."""
    return (files("luthier.client") / "service_config.json").read_text(encoding="utf-8")


def open_channel(server: str, token: str = "", timeout: float | None = 60.0, tls: Tls | None = None) -> grpc.Channel:
    """Return a channel to the coordinator at `server` (host:port).

    `token` goes along as a bearer key. `timeout` in seconds bounds each call that is not a stream, retries included. Without
    `tls`, the environment says whether there is any.
    """
    tls = Tls.of() if tls is None else tls
    host = server.rpartition(":")[0].strip("[]")
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", service_config()),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # After a restart of the coordinator the first calls should not wait for the usual two-minute reconnect backoff.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if host in ("localhost", "::1") or host.startswith("127."):
        # A proxy from the environment cannot reach this machine's loopback.
        options.append(("grpc.enable_http_proxy", 0))
    channel = bare_channel(server, options, tls)
    return grpc.intercept_channel(channel, _Interceptor(server, token, timeout, tls))


def bare_channel(server: str, options: list[tuple[str, Any]], tls: Tls) -> grpc.Channel:
    """Return a channel that adds nothing to calls, for services that are not a coordinator's own."""
    credentials = tls.credentials()
    if credentials is None:
        return grpc.insecure_channel(server, options=options)
    return grpc.secure_channel(server, credentials, options=options)
