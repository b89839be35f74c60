"""The gateway's span of a request, from its arrival to the last byte of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import Request
from opentelemetry.trace import SpanKind

from common import tracing
from common.errors import FailedPrecondition, InvalidArgument
from serving.gateway.errors import ApiError
from serving.gateway.traffic import Measure


class Asked:
    """Begins with the request; `traceparent` is what goes along to the replica. The span does nothing where traces are off.

    How it ends is counted at its route.
    """

    def __init__(self, request: Request, project: str, endpoint: str, app: str, measure: Measure) -> None:
        self._measure = measure
        who = {"luthier.project": project, "luthier.endpoint": endpoint, "luthier.app": app}
        name = f"{request.method} {request.url.path}"
        self._span = tracing.begin(name, tracing.of_headers(request.headers), SpanKind.SERVER, **who)
        self.traceparent = tracing.traceparent(self._span)
        self._ended = False

    def failed(self, error: BaseException) -> None:
        """It was not answered, or not to its end."""
        if _callers_fault(error) or isinstance(error, asyncio.CancelledError):
            self._measure.dropped()
        else:
            self._measure.failed()
        if not self._ended and not _callers_fault(error):
            tracing.failed(self._span, type(error).__name__)
        self._end()

    def dropped(self) -> None:
        """It was refused before its route was asked."""
        self._measure.dropped()
        self._end()

    def answered(self, tokens: int) -> None:
        """It was answered to its end."""
        self._measure.answered(tokens)

    def until(self, leave: Callable[[], None]) -> Callable[[], None]:
        """The same function, which ends the span too."""

        def left() -> None:
            leave()
            self._measure.dropped()  # says nothing where it is known how it ended
            self._end()

        return left

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._span.end()


def _callers_fault(error: BaseException) -> bool:
    return isinstance(error, InvalidArgument | FailedPrecondition) or (isinstance(error, ApiError) and error.status < 500)
