"""A request to an endpoint as spans, from the gateway to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import pytest

from common import tracing
from common.errors import InvalidArgument, Unavailable
from serving.batching import Batcher
from serving.engines.base import Completion, Done, Lanes, Piece, Request, SamplingParams
from serving.gateway.http import GatewayState, create_app
from serving.gateway.snapshot import Snapshot
from serving.replica import ModelReplica
from serving.wire import AdapterRef, Ask, Event, GatewayArgs
from tests.support.otlp import Collector, Told, collecting
from tests.unit.serving.test_gateway_http import CONFIG, chat

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"authorization": "Bearer good", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


class Engine:
    """Answers every prompt with its last letter, or fails."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    tool_style = ""

    def render(self, messages: Sequence[dict[str, str]], tools: Sequence[Any]) -> str:
        return messages[-1]["content"]

    def check_params(self, params: SamplingParams) -> None:
        return

    def check(self, prompt: str) -> int:
        if prompt == "too long":
            raise InvalidArgument("the prompt is too long", "PROMPT_TOO_LONG")
        return 1

    def lanes(self) -> AtOnce:
        return AtOnce(self)


class AtOnce(Lanes):
    """Answers in one step all that has joined."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: list[tuple[Request, Done]] = []

    def join(self, request: Request, done: Done) -> None:
        self._waiting.append((request, done))

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def step(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request, done in waiting:
            if self._engine.error is not None:
                done(self._engine.error)
                continue
            if request.on_piece:
                request.on_piece(Piece(request.prompt[-1]))
            done(Completion(request.prompt[-1], "stop", 1, 5))
        if self._engine.error is not None:
            raise self._engine.error


class Backend:
    """A replica in this process, which is asked as over Serve."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.replica = ModelReplica.__new__(ModelReplica)
        self.replica._engine = self.engine  # type: ignore[assignment]
        self.replica._batcher = Batcher(self.engine)  # type: ignore[arg-type]

    async def prepare(self, app: str, adapter: AdapterRef) -> None:
        await self.replica.prepare(adapter)

    async def complete(self, app: str, ask: Ask) -> list[Completion]:
        return await self.replica.complete(ask)

    async def stream(self, app: str, ask: Ask) -> AsyncIterator[Event]:
        async for event in self.replica.stream(ask):
            yield event


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        tracing.start("luthier-gateway", collector.endpoint, ratio=0.0)
        yield collector
        tracing.stop()


@pytest.fixture
def backend() -> Backend:
    return Backend()


async def ask(backend: Backend, headers: dict[str, str] = HEADERS, **body: Any) -> httpx.Response:
    state = GatewayState(GatewayArgs(), backend, seed=1)
    state.snapshot = Snapshot.of(CONFIG)
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers) as client:
        answer = await client.post("/v1/chat/completions", json=chat(**body))
    await asyncio.to_thread(tracing.stop)
    return answer


def by_name(spans: list[Told]) -> dict[str, Told]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


@pytest.mark.parametrize("stream", [False, True])
async def test_gateway_replica_and_engine_are_one_below_the_other(collector: Collector, backend: Backend, stream: bool) -> None:
    answer = await ask(backend, stream=stream)
    assert answer.status_code == 200
    spans = by_name(collector.of(TRACE))
    gateway, replica, engine = (spans[name] for name in ("POST /v1/chat/completions", "replica", "engine"))
    assert (gateway.parent_id, replica.parent_id, engine.parent_id) == ("b7ad6b7169203331", gateway.span_id, replica.span_id)
    assert gateway.attributes == {"luthier.project": "acme", "luthier.endpoint": "tickets", "luthier.app": "m-1"}
    assert (replica.attributes, engine.attributes) == ({"luthier.tokens": 5}, {})
    assert replica.seconds >= engine.seconds
    assert {span.failed for span in spans.values()} == {""}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_fails_is_a_failure_all_the_way(collector: Collector, backend: Backend, stream: bool) -> None:
    backend.engine.error = RuntimeError("out of luck")
    answer = await ask(backend, stream=stream)
    assert (answer.status_code == 500) or "internal_error" in answer.text
    failed = {span.name: span.failed for span in collector.of(TRACE)}
    assert failed["engine"] == "RuntimeError"
    assert failed["replica"]
    assert failed["POST /v1/chat/completions"] == "Internal"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_wrong_is_no_failure_of_the_gateway(collector: Collector, backend: Backend, stream: bool) -> None:
    answer = await ask(backend, messages=[{"role": "user", "content": "too long"}], stream=stream)
    assert answer.status_code == 400
    assert {span.name: span.failed for span in collector.of(TRACE)}["POST /v1/chat/completions"] == ""


async def test_a_gateway_that_has_too_much_to_do_says_so_in_its_span(collector: Collector, backend: Backend) -> None:
    backend.engine.error = Unavailable("gone")
    assert (await ask(backend)).status_code == 503
    assert {span.name: span.failed for span in collector.of(TRACE)}["POST /v1/chat/completions"] == "Unavailable"


async def test_without_a_callers_trace_the_ratio_decides(collector: Collector, backend: Backend) -> None:
    assert (await ask(backend, headers={"authorization": "Bearer good"})).status_code == 200
    assert collector.spans == []


async def test_off_a_traceparent_changes_nothing(backend: Backend) -> None:
    asks: list[Ask] = []
    complete = backend.complete

    async def remember(app: str, ask: Ask) -> list[Completion]:
        asks.append(ask)
        return await complete(app, ask)

    backend.complete = remember  # type: ignore[method-assign]
    assert (await ask(backend)).status_code == 200
    assert [each.trace_parent for each in asks] == [""]
