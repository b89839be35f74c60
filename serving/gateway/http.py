"""The HTTP API: routes and handlers, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from serving.engines.base import Completion
from serving.gateway.answers import Answer, ChatAnswer, TextAnswer, sse
from serving.gateway.asked import Asked
from serving.gateway.auth import authenticate
from serving.gateway.errors import ApiError, from_exception, overloaded
from serving.gateway.openai_types import ChatRequest, CompletionRequest, parse
from serving.gateway.routing import find_endpoint, pick_route
from serving.gateway.shell import Shell
from serving.gateway.snapshot import Endpoint, Key, Snapshot
from serving.wire import Ask, Event, GatewayArgs, Started

Result = TypeVar("Result")


class Backend(Protocol):
    """Where the gateway sends what it is asked. Errors are LuthierErrors."""

    async def complete(self, app: str, ask: Ask) -> list[Completion]:
        """Return the completions of `ask` by the application `app`."""
        ...

    def stream(self, app: str, ask: Ask) -> AsyncIterator[Event]:
        """Yield Started, texts, and the Completion; closing it early ends the generation."""
        ...


class GatewayState:
    """What the handlers share: the snapshot of the moment, and how much is in flight."""

    def __init__(self, args: GatewayArgs, backend: Backend, seed: int | None = None) -> None:
        self.args = args
        self.backend = backend
        self.snapshot = Snapshot()
        self.random = random.Random(seed)
        self._in_flight = 0

    def enter(self) -> Callable[[], None]:
        """Count a request in, or refuse it; returns what counts it out, once."""
        if self._in_flight >= self.args.max_in_flight:
            raise overloaded("The gateway has too many requests in progress; try again shortly.")
        self._in_flight += 1
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._in_flight -= 1

        return leave


def create_app(state: GatewayState) -> FastAPI:
    """Build the application. Every answer that is an error has OpenAI's shape."""
    app = FastAPI(title="Luthier", docs_url=None, redoc_url=None, openapi_url=None)

    def caller(request: Request) -> Key:
        return authenticate(request.headers, state.snapshot)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        key = caller(request)
        mine = [
            entry
            for (project, _), entry in sorted(state.snapshot.endpoints.items())
            if project == key.project and key.may_see(entry.endpoint)
        ]
        return {"object": "list", "data": [_model(entry) for entry in mine]}

    @app.get("/v1/models/{model}")
    async def get_model(model: str, request: Request) -> dict[str, Any]:
        return _model(find_endpoint(model, caller(request), state.snapshot, query=False))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        key = caller(request)
        parsed = parse(ChatRequest, await request.body())
        return await _answer(state, request, key, parsed, ChatAnswer)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        key = caller(request)
        parsed = parse(CompletionRequest, await request.body())
        return await _answer(state, request, key, parsed, TextAnswer)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:200]
        told = {404: f"Unknown request URL: {request.method} {path}.", 405: f"{request.method} is not allowed for {path}."}
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        message = told.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, code, headers=dict(error.headers or {})).response()

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    app.add_middleware(
        Shell,
        snapshot=lambda: state.snapshot,
        max_body_bytes=state.args.max_body_bytes,
        names_requests=state.args.names_requests,
    )
    return app


def _model(endpoint: Endpoint) -> dict[str, Any]:
    return {"id": endpoint.endpoint, "object": "model", "created": endpoint.create_time, "owned_by": endpoint.project}


async def _answer(
    state: GatewayState, request: Request, key: Key, parsed: ChatRequest | CompletionRequest, shape: type[Answer]
) -> Response:
    ask = parsed.ask()
    route = pick_route(find_endpoint(parsed.model, key, state.snapshot), state.random)
    answer = shape(parsed.model, f"fp_{route.app}", parsed.include_usage)
    asked = Asked(request, key.project, parsed.model, route.app)
    ask = replace(ask, trace_parent=asked.traceparent)
    try:
        leave = asked.until(state.enter())
    except ApiError as error:
        asked.failed(error)
        raise
    try:
        if parsed.stream:
            return await _stream(state, request, route.app, ask, answer, leave, asked)
        with _time_limit():
            async with asyncio.timeout(state.args.request_timeout_s):
                completions = await _while_connected(request, state.backend.complete(route.app, ask))
        return JSONResponse(answer.whole(completions))
    except BaseException as error:
        asked.failed(error)
        raise
    finally:
        if not parsed.stream:
            leave()


async def _stream(
    state: GatewayState, request: Request, app: str, ask: Ask, answer: Answer, leave: Callable[[], None], asked: Asked
) -> Response:
    """Wait for the replica to accept the request, so that a refusal still has its status, then stream."""
    events = state.backend.stream(app, ask)
    try:
        with _time_limit():
            async with asyncio.timeout(state.args.request_timeout_s):
                first = await _while_connected(request, anext(events))
        if not isinstance(first, Started):
            raise RuntimeError("a stream has to begin with Started")
    except BaseException as error:
        asked.failed(error)
        leave()
        await _close(events)
        raise
    body = _events(events, answer, request.state.request_id, state.args.request_timeout_s, leave, asked.failed)
    return _Stream(body, leave, events)


class _Stream(StreamingResponse):
    """Server-sent events; cleans up also where the client left before the first of them."""

    def __init__(self, body: AsyncIterator[bytes], leave: Callable[[], None], events: AsyncIterator[Event]) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._leave = leave
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()
            await _close(self._events)


async def _events(
    events: AsyncIterator[Event],
    answer: Answer,
    request_id: str,
    idle_s: float,
    leave: Callable[[], None],
    failed: Callable[[BaseException], None],
) -> AsyncIterator[bytes]:
    """Yield the stream. Only one that came to its end has [DONE]; one that broke ends with an error event."""
    try:
        for chunk in answer.opening():
            yield sse(chunk)
        while True:
            with _time_limit():
                event = await asyncio.wait_for(anext(events), idle_s)
            if isinstance(event, Completion):
                break
            if isinstance(event, str):
                yield sse(answer.text(event))
        for chunk in answer.closing(event):
            yield sse(chunk)
        yield sse("[DONE]")
    except Exception as error:
        broken = RuntimeError("the stream ended without its completion") if isinstance(error, StopAsyncIteration) else error
        failed(broken)
        yield sse(from_exception(broken, request_id).body())
    finally:
        leave()
        await _close(events)


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Await `work`, but cancel it where the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client closed the request.", "client_closed_request")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _close(events: AsyncIterator[Event]) -> None:
    close = getattr(events, "aclose", None)
    if close is not None:
        with contextlib.suppress(Exception):
            await close()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise ApiError(504, "The model did not answer in time.", "timeout", kind="server_error") from error
