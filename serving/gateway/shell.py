"""What happens around every request: its id, the host check, the bounds on bodies, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from serving.gateway.auth import check_host
from serving.gateway.errors import ApiError, from_exception
from serving.gateway.snapshot import Snapshot

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Shell:
    """ASGI middleware, outermost. A body has `body_timeout_s` to arrive; `names_requests` writes x-request-id on answers."""

    def __init__(
        self,
        app: ASGIApp,
        snapshot: Callable[[], Snapshot],
        max_body_bytes: int,
        body_timeout_s: float,
        names_requests: bool,
    ) -> None:
        self._app = app
        self._snapshot = snapshot
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._names_requests = names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def named_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._names_requests:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            check_host(headers.get("host"), self._snapshot())
            self._check_length(headers.get("content-length"))
            await self._app(scope, self._bounded(receive), named_send)
        except Exception as error:
            if started:  # too late for an answer; the connection breaks, which no client takes for an end
                raise
            await from_exception(error, request_id).response()(scope, receive, named_send)

    def _check_length(self, length: str | None) -> None:
        if length is not None and length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Count a body that does not tell its length, and give up one that never comes to its end.

        The time is that of the whole body: one that comes a byte at a time is never idle.
        """
        taken = 0
        whole = False
        deadline = asyncio.get_running_loop().time() + self._body_timeout_s

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:  # what is waited for now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise self._too_slow() from error
            taken += len(message.get("body", b""))
            if taken > self._max_body_bytes:
                raise self._too_large()
            whole = not message.get("more_body", False)
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._max_body_bytes:,} bytes.", "request_too_large")

    def _too_slow(self) -> ApiError:
        why = f"The body was not complete within {self._body_timeout_s:g} seconds."
        return ApiError(408, why, "request_timeout", headers={"connection": "close"})  # the rest of it may still come
