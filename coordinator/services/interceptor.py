"""What happens around every call: who it is, may he, and how errors leave the house."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from common.errors import Internal, LuthierError, PermissionDenied, Unauthenticated
from coordinator import metrics
from coordinator.services.keys import Keys
from coordinator.services.principal import NEEDS, OPEN, VIEWER, Context, check_scope, current
from coordinator.services.streams import Streams
from coordinator.services.traced import Traced
from luthier.v1 import admin_pb2

log = logging.getLogger(__name__)

DOMAIN = "luthier"
"""Domain of the ErrorInfo of every error."""


def to_status(error: LuthierError) -> status_pb2.Status:
    """An error as google.rpc.Status with ErrorInfo and, for bad fields, BadRequest."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_code), message=error.message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.violations:
        violation = error_details_pb2.BadRequest.FieldViolation
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[violation(field=bad.field, description=bad.description) for bad in error.violations]
            )
        )
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


class Guard(grpc.aio.ServerInterceptor):
    """Authenticates, authorises, and turns exceptions into statuses."""

    def __init__(self, keys: Keys, streams: Streams) -> None:
        self._keys = keys
        self._streams = streams
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a call, once for each method."""
        wrapped = self._wrapped.get(details.method)
        if wrapped is None:
            handler = await continuation(details)
            if handler is None or details.method.startswith(OPEN[0]):
                return handler
            wrapped = self._wrapped[details.method] = self._wrap(handler, details.method)
        return wrapped

    def _wrap(self, handler: Any, method: str) -> Any:
        direction = ("stream_" if handler.request_streaming else "unary_") + ("stream" if handler.response_streaming else "unary")
        behaviour = getattr(handler, direction)
        wrapped: Any = self._stream(behaviour, method) if handler.response_streaming else self._unary(behaviour, method)
        make = getattr(grpc, f"{direction}_rpc_method_handler")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    async def _admit(self, method: str, context: Context) -> None:
        if method.startswith(OPEN):
            return
        headers = {str(name): value for name, value in context.invocation_metadata() or ()}
        scheme, _, token = str(headers.get("authorization", "")).partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("no key: send the metadata `authorization: Bearer lut_…` (LUTHIER_TOKEN)", "KEY_MISSING")
        who = await self._keys.find(token)
        needed = VIEWER if "ServerReflection" in method else NEEDS.get(method)
        if needed is None or who.role < needed:
            word = admin_pb2.Role.Name(needed).removeprefix("ROLE_").lower() if needed else "that does not exist"
            raise PermissionDenied(f"this call needs a key with the role {word} or more", "ROLE_TOO_LOW")
        if method in NEEDS:
            check_scope(who, method)
        current.set(who)

    def _unary(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Awaitable[Any]]:
        handling = metrics.HANDLING.labels(method)

        async def call(request: Any, context: Context) -> Any:
            with handling.time(), _counted(method, Traced(method, context, attached=True)):
                try:
                    await self._admit(method, context)
                    return await behaviour(request, context)
                except Exception as error:
                    await _abort(context, method, error)

        return call

    def _stream(self, behaviour: Callable[..., Any], method: str) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            traced = Traced(method, context, attached=False)
            with metrics.STREAMS.labels(method).track_inprogress(), _counted(method, traced):
                try:
                    await self._admit(method, context)
                    with self._streams.opened(current.get().project):
                        async for response in behaviour(request, context):
                            yield response
                except Exception as error:
                    await _abort(context, method, error)

        return call


@contextlib.contextmanager
def _counted(method: str, traced: Traced) -> Iterator[None]:
    """Count a call with the status that it ends with, and end its span with that."""
    code = "OK"
    try:
        yield
    except _Ended as ended:
        code = ended.code
        raise ended.abort from None
    except (asyncio.CancelledError, GeneratorExit):
        code = "CANCELLED"
        raise
    finally:
        metrics.HANDLED.labels(method, code).inc()
        traced.end(code)


class _Ended(Exception):
    """A call was ended with a status."""

    def __init__(self, code: str, abort: BaseException) -> None:
        super().__init__(code)
        self.code = code
        self.abort = abort


async def _abort(context: Context, method: str, error: Exception) -> None:
    """End the call with the error's status. What nobody foresaw is logged under an id, and only the id leaves the house."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, LuthierError):
        correlation = secrets.token_hex(6)
        log.error("%s failed [%s]", method, correlation, exc_info=error)
        error = Internal(f"an unforeseen error; the coordinator's log has it under {correlation}", "INTERNAL")
    try:
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
    except grpc.aio.AbortError as abort:
        raise _Ended(error.grpc_code, abort) from None
