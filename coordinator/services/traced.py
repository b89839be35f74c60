"""The server's span of a call."""

from __future__ import annotations

from contextvars import Token
from typing import Any

import grpc
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from common import tracing
from coordinator.services.principal import Context, current

NOT_TRACED = ("/grpc.",)
"""Health and reflection."""

BY_PARENT_ONLY = ("/luthier.agent.v1.AgentService/",)
"""Agents report all the time: only what they say to be part of a trace is."""

OURS = frozenset({"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"})
"""Statuses with which a call failed for reasons that are not its caller's."""


class Traced:
    """The span of one call. Nothing where traces are off, or where the call is none of those that are traced.

    `attached` puts it into the context of what the call does; streams go without, because a generator may be closed elsewhere.
    """

    def __init__(self, method: str, context: Context, attached: bool) -> None:
        self._span: Span | None = None
        self._token: Token[Any] | None = None
        if not tracing.on() or method.startswith(NOT_TRACED):
            return
        headers = {str(name): value for name, value in context.invocation_metadata() or ()}
        parent = tracing.of_headers(headers)
        if not parent and method.startswith(BY_PARENT_ONLY):
            return
        service, _, name = method.removeprefix("/").partition("/")
        self._span = tracing.begin(
            f"{service}/{name}", parent, SpanKind.SERVER, rpc__system="grpc", rpc__service=service, rpc__method=name
        )
        if attached:
            self._token = contexts.attach(trace.set_span_in_context(self._span))

    def end(self, code: str) -> None:
        """The call has ended with a status."""
        if self._span is None:
            return
        if self._token is not None:
            contexts.detach(self._token)
        self._span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        who = current.get(None)
        if who is not None:
            self._span.set_attribute("luthier.project", who.project)
        if code in OURS:
            tracing.failed(self._span, code)
        self._span.end()
