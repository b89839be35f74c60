"""What the gateway keeps, what it bounds, and what it tells Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from common.errors import Unavailable
from serving.gateway.errors import ApiError
from serving.gateway.http import GatewayState, create_app
from serving.gateway.limits import Limits
from serving.gateway.snapshot import Key, Snapshot
from serving.wire import GatewayArgs
from tests.unit.serving.test_gateway_http import FakeBackend, chat, digest, events

ROUTES = [{"app": "m-1", "weight": 1, "model_version": "desk@1"}]
CONFIG: dict[str, Any] = {
    "keys": {
        digest("good"): {"project": "acme", "key": "k1", "role": "viewer"},
        digest("slow"): {"project": "acme", "key": "k2", "role": "query", "requests_per_minute": 2},
        digest("short"): {"project": "acme", "key": "k3", "role": "query", "tokens_per_minute": 25},
        digest("rival"): {"project": "rival", "key": "k4", "role": "viewer"},
        digest("root"): {"project": "acme", "key": "k5", "role": "operator"},
    },
    "endpoints": [{"project": name, "endpoint": "desk", "routes": ROUTES} for name in ("acme", "rival")],
}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def state(backend: FakeBackend) -> GatewayState:
    state = GatewayState(GatewayArgs(), backend, seed=1)
    state.take(Snapshot.of(CONFIG))
    return state


@pytest.fixture
async def client(state: GatewayState) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    headers = {"authorization": "Bearer good"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers) as client:
        yield client


async def ask(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = chat(**{"model": "desk", "temperature": 0, **more})
    return await client.post("/v1/chat/completions", json=body, headers=headers or {})


async def test_the_same_greedy_question_is_asked_once(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    first, second = await ask(client), await ask(client)
    assert (first.headers["x-luthier-cache"], second.headers["x-luthier-cache"]) == ("miss", "hit")
    assert first.json()["choices"] == second.json()["choices"]
    assert first.json()["usage"] == second.json()["usage"]
    assert first.json()["id"] != second.json()["id"]
    stream = await ask(client, stream=True, stream_options={"include_usage": True})
    chunks = events(stream.text)
    assert (stream.headers["x-luthier-cache"], chunks[-1]) == ("hit", "[DONE]")
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-2])
    assert text == first.json()["choices"][0]["message"]["content"]
    assert chunks[-2]["usage"] == first.json()["usage"]
    assert len(backend.asks) == 1


async def test_a_stream_is_kept_too(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await ask(client, stream=True)
    assert (await ask(client)).headers["x-luthier-cache"] == "hit"
    assert len(backend.asks) == 1


@pytest.mark.parametrize(
    ("headers", "more"),
    [
        ({}, {"max_tokens": 9}),
        ({}, {"messages": [{"role": "user", "content": "ho"}]}),
        ({}, {"response_format": {"type": "json_object"}}),
        ({"authorization": "Bearer rival"}, {}),
        ({"x-luthier-cache": "off"}, {}),
        ({"cache-control": "no-cache"}, {}),
        ({}, {"temperature": 0.7}),
    ],
)
async def test_another_question_project_or_wish_is_asked_anew(
    client: httpx.AsyncClient, backend: FakeBackend, headers: dict[str, str], more: dict[str, Any]
) -> None:
    await ask(client)
    assert (await ask(client, headers, **more)).headers.get("x-luthier-cache") != "hit"
    assert len(backend.asks) == 2


async def test_samples_are_kept_where_that_is_asked_for(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    on = {"x-luthier-cache": "on"}
    assert (await ask(client, on, temperature=0.7)).headers["x-luthier-cache"] == "miss"
    assert (await ask(client, on, temperature=0.7)).headers["x-luthier-cache"] == "hit"
    assert "x-luthier-cache" not in (await ask(client, temperature=0.7)).headers
    assert len(backend.asks) == 2


async def test_a_new_version_answers_for_itself(client: httpx.AsyncClient, state: GatewayState, backend: FakeBackend) -> None:
    await ask(client)
    routes = [{"app": "m-1", "model_version": "desk@2", "adapter": {"uri": "s3://a", "sha256": "a" * 64}}]
    state.take(Snapshot.of({**CONFIG, "endpoints": [{"project": "acme", "endpoint": "desk", "routes": routes}]}))
    assert (await ask(client)).headers["x-luthier-cache"] == "miss"
    assert len(backend.asks) == 2


async def test_what_failed_is_not_kept(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.error = Unavailable("gone")
    assert (await ask(client)).status_code == 503
    backend.error, backend.fail_after = Unavailable("gone"), 1
    await ask(client, stream=True)
    backend.error = None
    assert (await ask(client)).headers["x-luthier-cache"] == "miss"


async def test_the_cache_is_bounded_in_bytes_and_age(
    client: httpx.AsyncClient, state: GatewayState, backend: FakeBackend
) -> None:
    backend.pieces = ["x" * 100]
    state.cache._most = 100 * 700
    for number in range(300):
        await ask(client, seed=number)
    assert state.cache._bytes <= state.cache._most
    assert (await ask(client, seed=299)).headers["x-luthier-cache"] == "hit"
    assert (await ask(client, seed=0)).headers["x-luthier-cache"] == "miss"
    state.cache._seconds = -1.0
    await ask(client, seed=1000)
    assert (await ask(client, seed=1000)).headers["x-luthier-cache"] == "miss"


async def test_a_key_asks_so_often_in_a_minute(client: httpx.AsyncClient, state: GatewayState) -> None:
    slow = {"authorization": "Bearer slow"}
    first = await ask(client, slow)
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert (await ask(client, slow)).status_code == 200
    refused = await ask(client, slow)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 28 <= int(refused.headers["retry-after"]) <= 30
    assert "2 requests per minute" in refused.json()["error"]["message"]
    assert (await ask(client)).status_code == 200  # another key of the project
    assert state.limits.refused == 1


async def test_a_key_spends_so_many_tokens_in_a_minute(client: httpx.AsyncClient) -> None:
    short = {"authorization": "Bearer short"}
    for number in range(3):  # ten tokens each; the third overdraws
        assert (await ask(client, short, seed=number)).status_code == 200
    refused = await ask(client, short, seed=9)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    stream = await ask(client, stream=True, seed=5)
    assert stream.status_code == 200


def test_what_was_spent_comes_back_evenly() -> None:
    now = [0.0]
    limits, key = Limits(lambda: now[0]), Key("acme", "k", "query", requests_per_minute=60)
    for _ in range(60):
        limits.enter(key)
    with pytest.raises(ApiError):
        limits.enter(key)
    now[0] = 1.01
    limits.enter(key)
    with pytest.raises(ApiError):
        limits.enter(key)
    now[0] = 1000.0
    for _ in range(60):
        limits.enter(key)
    with pytest.raises(ApiError):
        limits.enter(key)


async def test_prometheus_reads_the_counts_of_whom_the_key_may_see(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await ask(client)
    await ask(client)
    backend.error = Unavailable("gone")
    await ask(client, seed=1)
    backend.error = None
    await ask(client, {"authorization": "Bearer rival"})
    own = (await client.get("/metrics")).text
    line = 'luthier_gateway_requests_total{endpoint="desk",outcome="%s",project="acme",version="desk@1"} 1.0'
    assert line % "ok" in own
    assert line % "error" in own
    assert 'luthier_gateway_answer_seconds_bucket{endpoint="desk",le="+Inf",project="acme",version="desk@1"} 2.0' in own
    assert "rival" not in own
    assert "cache" not in own
    everything = (await client.get("/metrics", headers={"authorization": "Bearer root"})).text
    assert 'project="rival"' in everything
    assert "luthier_gateway_cache_hits_total 1.0" in everything
    assert (await client.get("/metrics", headers={"authorization": "Bearer slow"})).status_code == 403
    assert (await client.get("/metrics", headers={"authorization": "Bearer no"})).status_code == 401


def test_keys_without_limits_are_told_nothing() -> None:
    assert Limits().enter(Key("acme", "k", "query")) == {}
