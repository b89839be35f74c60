"""The HTTP API: routes and handlers, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from serving.engines.base import Completion, Piece
from serving.gateway.answers import Answer, ChatAnswer, TextAnswer, sse, usage
from serving.gateway.asked import Asked
from serving.gateway.auth import authenticate, only_coordinator
from serving.gateway.cache import HEADER, AnswerCache
from serving.gateway.errors import ApiError, from_exception, overloaded
from serving.gateway.exposition import exposition
from serving.gateway.limits import Limits
from serving.gateway.openai_types import ChatRequest, CompletionRequest, parse, parse_feedback
from serving.gateway.readiness import Readiness
from serving.gateway.routing import find_endpoint, pick_route, shadows
from serving.gateway.shell import Shell
from serving.gateway.snapshot import Endpoint, Key, Route, Snapshot
from serving.gateway.traffic import Traffic
from serving.wire import AdapterRef, Ask, Event, GatewayArgs, Started

Result = TypeVar("Result")

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

MAX_COPIES = 16
"""Requests that shadows have at a time."""


class Backend(Protocol):
    """Where the gateway sends what it is asked. Errors are LuthierErrors."""

    async def prepare(self, app: str, adapter: AdapterRef) -> None:
        """Have the application try an adapter; raises what is wrong with it."""
        ...

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
        self.traffic = Traffic()
        self.readiness = Readiness(backend.prepare)
        self.cache = AnswerCache(args.cache_bytes, args.cache_seconds)
        self.limits = Limits()
        self._in_flight = 0
        self._copies: set[asyncio.Task[None]] = set()

    def take(self, snapshot: Snapshot) -> None:
        """Go by another snapshot from now on."""
        self.snapshot = snapshot
        self.traffic.keep(snapshot.names())

    def copy(self, endpoint: Endpoint, ask: Ask) -> None:
        """Ask the endpoint's shadows too, for their counts alone. Nobody waits for them; beyond so many they are not asked."""
        for route in shadows(endpoint):
            if len(self._copies) >= MAX_COPIES:
                return
            task = asyncio.create_task(self._shadow(endpoint.name(route), route, ask))
            self._copies.add(task)
            task.add_done_callback(self._copies.discard)

    async def _shadow(self, name: str, route: Route, ask: Ask) -> None:
        measure = self.traffic.begin(name, route.app)
        try:
            async with asyncio.timeout(self.args.request_timeout_s):
                completions = await self.backend.complete(route.app, replace(ask, adapter=route.adapter, trace_parent=""))
        except Exception:
            measure.failed()
        else:
            measure.answered(sum(each.completion_tokens for each in completions))

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

    @app.get("/-/report")
    async def report(request: Request) -> dict[str, Any]:
        only_coordinator(request.headers, state.snapshot)
        adapters = state.readiness.look(state.snapshot.adapters())
        return {"version": state.snapshot.version, "adapters": adapters, **state.traffic.told()}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        key = caller(request)
        if key.role == "query":
            raise ApiError(403, "Metrics need a key with the role viewer or more.", "insufficient_role", kind="permission_error")
        project = "" if key.role == "operator" else key.project
        return Response(exposition(state.traffic, state.cache, state.limits, project), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> dict[str, Any]:
        key = caller(request)
        given = parse_feedback(await request.body())
        if not state.traffic.rate(key.project, given.id, given.score):
            raise ApiError(404, f"No recent answer has the id `{given.id[:100]}`.", "answer_not_found", "id")
        return {"object": "feedback", "id": given.id, "score": given.score}

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
        body_timeout_s=state.args.body_timeout_s,
        names_requests=state.args.names_requests,
    )
    return app


def _model(endpoint: Endpoint) -> dict[str, Any]:
    return {"id": endpoint.endpoint, "object": "model", "created": endpoint.create_time, "owned_by": endpoint.project}


async def _answer(
    state: GatewayState, request: Request, key: Key, parsed: ChatRequest | CompletionRequest, shape: type[Answer]
) -> Response:
    ask = parsed.ask()
    endpoint = find_endpoint(parsed.model, key, state.snapshot)
    told = state.limits.enter(key)
    route = pick_route(endpoint, state.random, parsed.sticky, request.headers)
    ask = replace(ask, adapter=route.adapter)
    version = f"{route.app}-{route.adapter.name[:12]}" if route.adapter is not None else route.app
    tools = [tool["function"]["name"] for tool in ask.tools]
    answer = shape(parsed.model, f"fp_{version}", parsed.include_usage, ask.n, tools)
    cached = state.cache.key(key.project, f"{route.app}/{route.adapter.name if route.adapter else ''}", ask, request.headers)
    name = endpoint.name(route)
    if (kept := state.cache.get(cached)) is not None:
        state.limits.spend(key, _tokens(kept, ask.n))
        state.traffic.remember(key.project, name, request.state.request_id, answer.whole_id)
        return _kept(answer, kept, parsed.stream, told | {HEADER: "hit"})
    if cached:
        told |= {HEADER: "miss"}
    asked = Asked(request, key.project, endpoint.endpoint, route.app, state.traffic.begin(name, route.app))
    ask = replace(ask, trace_parent=asked.traceparent)
    try:
        leave = asked.until(state.enter())
    except ApiError:
        asked.dropped()
        raise
    state.traffic.remember(key.project, name, request.state.request_id, answer.whole_id)
    state.copy(endpoint, ask)

    def done(completions: Sequence[Completion]) -> None:
        asked.answered(sum(completion.completion_tokens for completion in completions))
        state.limits.spend(key, _tokens(completions, ask.n))
        state.cache.put(cached, completions)

    try:
        if parsed.stream:
            return await _stream(state, request, route.app, ask, answer, leave, asked, done, told)
        with _time_limit():
            async with asyncio.timeout(state.args.request_timeout_s):
                completions = await _while_connected(request, state.backend.complete(route.app, ask))
        done(completions)
        return JSONResponse(answer.whole(completions), headers=told)
    except BaseException as error:
        asked.failed(error)
        raise
    finally:
        if not parsed.stream:
            leave()


def _tokens(completions: Sequence[Completion], n: int) -> int:
    return usage(completions, n)["total_tokens"]


def _kept(answer: Answer, completions: Sequence[Completion], stream: bool | None, headers: dict[str, str]) -> Response:
    """An answer out of the cache, as a whole or as a stream of few events."""
    if not stream:
        return JSONResponse(answer.whole(completions), headers=headers)

    def chunks() -> Iterator[bytes]:
        for chunk in answer.begin(Started(completions[0].prompt_tokens, completions[0].calls)):
            yield sse(chunk)
        for each in completions:
            for chunk in [*answer.text(Piece(each.text, each.logprobs, each.index)), *answer.close(each)]:
                yield sse(chunk)
        for chunk in answer.closing(completions):
            yield sse(chunk)
        yield sse("[DONE]")

    return StreamingResponse(chunks(), media_type="text/event-stream", headers={**STREAM_HEADERS, **headers})


async def _stream(
    state: GatewayState,
    request: Request,
    app: str,
    ask: Ask,
    answer: Answer,
    leave: Callable[[], None],
    asked: Asked,
    done: Callable[[Sequence[Completion]], None],
    told: dict[str, str],
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
    body = _events(first, events, answer, request.state.request_id, state.args.request_timeout_s, leave, asked, done)
    return _Stream(body, leave, events, told)


class _Stream(StreamingResponse):
    """Server-sent events; cleans up also where the client left before the first of them."""

    def __init__(
        self, body: AsyncIterator[bytes], leave: Callable[[], None], events: AsyncIterator[Event], told: dict[str, str]
    ) -> None:
        super().__init__(body, media_type="text/event-stream", headers={**STREAM_HEADERS, **told})
        self._leave = leave
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()
            await _close(self._events)


async def _events(
    first: Started,
    events: AsyncIterator[Event],
    answer: Answer,
    request_id: str,
    idle_s: float,
    leave: Callable[[], None],
    asked: Asked,
    done: Callable[[Sequence[Completion]], None],
) -> AsyncIterator[bytes]:
    """Yield the stream. Only one that came to its end has [DONE]; one that broke ends with an error event."""
    try:
        for chunk in answer.begin(first):
            yield sse(chunk)
        completions: list[Completion] = []
        while len(completions) < answer.n:
            with _time_limit():
                event = await asyncio.wait_for(anext(events), idle_s)
            if isinstance(event, Completion):
                completions.append(event)
                chunks = answer.close(event)
            elif isinstance(event, Piece):
                chunks = answer.text(event)
            else:
                raise RuntimeError("a stream begins but once")
            for chunk in chunks:
                yield sse(chunk)
        completions = [replace(each, calls=first.calls) for each in sorted(completions, key=lambda each: each.index)]
        done(completions)
        for chunk in answer.closing(completions):
            yield sse(chunk)
        yield sse("[DONE]")
    except Exception as error:
        broken = RuntimeError("the stream ended without its completion") if isinstance(error, StopAsyncIteration) else error
        asked.failed(broken)
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
