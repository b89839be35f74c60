"""Which route gets a request, what is counted of it, and what the coordinator is told."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from common.errors import InvalidArgument, Unavailable
from serving.gateway.errors import ApiError
from serving.gateway.http import GatewayState, create_app
from serving.gateway.routing import find_endpoint, pick_route
from serving.gateway.snapshot import Endpoint, Key, Route, Snapshot
from serving.wire import GatewayArgs
from tests.unit.serving.test_gateway_http import FakeBackend, chat, digest, events

USERS = [f"user-{number}" for number in range(2000)]


def endpoint(*weights: int, **more: Any) -> Endpoint:
    return Endpoint("acme", "desk", 0, tuple(Route(f"m-{n}", w, f"desk@{n}") for n, w in enumerate(weights)), **more)


def by_user(at: Endpoint) -> dict[str, str]:
    return {user: pick_route(at, random.Random(0), user).app for user in USERS}


def test_a_user_stays_and_few_move_when_weights_change() -> None:
    before, again, after = by_user(endpoint(95, 5)), by_user(endpoint(95, 5)), by_user(endpoint(75, 25))
    assert before == again
    assert abs(Counter(before.values())["m-1"] - 100) < 40
    assert abs(Counter(after.values())["m-1"] - 500) < 70
    # Whoever is at the canary stays there while it grows.
    assert all(after[user] == "m-1" for user, app in before.items() if app == "m-1")
    moved = sum(before[user] != after[user] for user in USERS)
    assert moved == Counter(after.values())["m-1"] - Counter(before.values())["m-1"]


def test_without_a_user_weights_decide() -> None:
    choose = random.Random(1)
    found = Counter(pick_route(endpoint(9, 1, 0), choose).app for _ in range(4000))
    assert found["m-2"] == 0
    assert abs(found["m-1"] - 400) < 80


def test_headers_lead_to_their_route_and_to_no_other() -> None:
    at = Endpoint(
        "acme", "desk", 0, (Route("m-0", 1, "desk@0"), Route("m-1", 1, "desk@1", headers={"x-variant": "new", "x-team": "a"}))
    )
    sent = {"x-variant": "new", "x-team": "a", "other": "b"}
    assert pick_route(at, random.Random(0), "user", sent).app == "m-1"
    assert {pick_route(at, random.Random(n), "", {"x-variant": "new"}).app for n in range(50)} == {"m-0"}


def test_an_alias_leads_to_the_version_that_it_stands_for() -> None:
    at = endpoint(1, 1, aliases={"champion": frozenset({"desk@1"}), "gone": frozenset({"desk@7"})})
    snapshot = Snapshot(endpoints={("acme", "desk"): at})
    key = Key("acme", "k", "query")
    assert [route.app for route in find_endpoint("desk@champion", key, snapshot).routes] == ["m-1"]
    for model in ("desk@gone", "desk@nobody", "other@champion"):
        with pytest.raises(ApiError) as caught:
            find_endpoint(model, key, snapshot)
        assert caught.value.status == 404


CONFIG: dict[str, Any] = {
    "version": "v7",
    "coordinator": digest("internal"),
    "keys": {
        digest("good"): {"project": "acme", "key": "k1", "role": "query"},
        digest("rival"): {"project": "rival", "key": "k2", "role": "admin"},
    },
    "endpoints": [
        {
            "project": "acme",
            "endpoint": "desk",
            "routes": [
                {"app": "m-1", "weight": 1, "model_version": "desk@1", "adapter": {"uri": "s3://a", "sha256": "a" * 64}},
                {"app": "m-2", "weight": 1, "model_version": "desk@2", "shadow": True},
            ],
        }
    ],
    "candidates": [{"app": "m-1", "adapter": {"uri": "s3://b", "sha256": "b" * 64}}],
}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def state(backend: FakeBackend) -> GatewayState:
    state = GatewayState(GatewayArgs(max_in_flight=3, names_requests=True), backend, seed=1)
    state.take(Snapshot.of(CONFIG))
    return state


@pytest.fixture
async def client(state: GatewayState) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    headers = {"authorization": "Bearer good"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers) as client:
        yield client


async def told(client: httpx.AsyncClient) -> dict[str, Any]:
    await asyncio.sleep(0)
    response = await client.get("/-/report", headers={"authorization": "Bearer internal"})
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def test_only_the_coordinator_is_told(client: httpx.AsyncClient, state: GatewayState) -> None:
    for token in ("good", "wrong", ""):
        assert (await client.get("/-/report", headers={"authorization": f"Bearer {token}"})).status_code == 404
    state.take(Snapshot.of({**CONFIG, "coordinator": ""}))
    assert (await client.get("/-/report", headers={"authorization": "Bearer "})).status_code == 404


async def test_answers_are_counted_at_their_route_and_shadows_see_them_too(
    client: httpx.AsyncClient, state: GatewayState, backend: FakeBackend
) -> None:
    answer = (await client.post("/v1/chat/completions", json=chat(model="desk"))).json()
    stream = await client.post("/v1/chat/completions", json=chat(model="desk", stream=True))
    assert events(stream.text)[-1] == "[DONE]"
    await asyncio.gather(*state._copies)
    found = await told(client)
    counts = found["routes"]
    assert (found["version"], found["in_flight"]) == ("v7", {})
    assert {name: (each["requests"], each["errors"], each["tokens"]) for name, each in counts.items()} == {
        "acme/desk/desk@1": (2, 0, 6),
        "acme/desk/desk@2": (2, 0, 6),
    }
    assert sum(counts["acme/desk/desk@1"]["buckets"]) == 2
    adapters = {app: ask.adapter.uri if ask.adapter else None for app, ask in backend.asks}
    assert adapters == {"m-1": "s3://a", "m-2": None}
    assert answer["system_fingerprint"] == f"fp_m-1-{'a' * 12}"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_counts_and_a_bad_request_does_not(
    client: httpx.AsyncClient, state: GatewayState, backend: FakeBackend, stream: bool
) -> None:
    backend.error = InvalidArgument("too long", "PROMPT_TOO_LONG")
    await client.post("/v1/chat/completions", json=chat(model="desk", stream=stream))
    backend.error = Unavailable("gone")
    await client.post("/v1/chat/completions", json=chat(model="desk", stream=stream))
    counts = (await told(client))["routes"]["acme/desk/desk@1"]
    assert (counts["requests"], counts["errors"]) == (1, 1)
    assert (await told(client))["in_flight"] == {}


async def test_a_stream_that_breaks_is_an_error(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.error, backend.fail_after = Unavailable("gone"), 1
    await client.post("/v1/chat/completions", json=chat(model="desk", stream=True))
    counts = (await told(client))["routes"]["acme/desk/desk@1"]
    assert (counts["requests"], counts["errors"], counts["tokens"]) == (1, 1, 0)


async def test_feedback_counts_for_who_answered(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=chat(model="desk"))
    for id_, score in ((response.json()["id"], 1.0), (response.headers["x-request-id"], 0.0)):
        rated = await client.post("/v1/feedback", json={"id": id_, "score": score, "comment": "so so"})
        assert rated.status_code == 200, rated.text
    rival = {"authorization": "Bearer rival"}
    for headers, body, status in (
        (rival, {"id": response.json()["id"], "score": 1}, 404),
        ({}, {"id": "chatcmpl-nobody", "score": 1}, 404),
        ({}, {"id": response.json()["id"], "score": 2}, 400),
        ({}, {"id": response.json()["id"]}, 400),
    ):
        assert (await client.post("/v1/feedback", json=body, headers=headers)).status_code == status
    counts = (await told(client))["routes"]["acme/desk/desk@1"]
    assert (counts["feedback"], counts["feedback_sum"]) == (2, 1.0)


async def test_adapters_are_tried_once_and_asked_again_only_where_it_could_not_be_told(
    client: httpx.AsyncClient, state: GatewayState, backend: FakeBackend
) -> None:
    backend.unfit["b" * 64] = Unavailable("no replica yet")
    await told(client)
    assert (await told(client))["adapters"] == {f"m-1/{'a' * 64}": ""}
    backend.unfit["b" * 64] = InvalidArgument("has no place in the base")
    await told(client)
    await told(client)
    found = await told(client)
    assert found["adapters"] == {f"m-1/{'a' * 64}": "", f"m-1/{'b' * 64}": "has no place in the base"}
    asked = Counter(adapter.name for _, adapter in backend.prepared)
    assert asked["a" * 64] == 1
    await told(client)
    assert Counter(adapter.name for _, adapter in backend.prepared) == asked
    state.take(Snapshot.of({**CONFIG, "candidates": []}))
    assert (await told(client))["adapters"] == {f"m-1/{'a' * 64}": ""}


async def test_counts_of_routes_that_are_gone_are_forgotten(client: httpx.AsyncClient, state: GatewayState) -> None:
    await client.post("/v1/chat/completions", json=chat(model="desk"))
    state.take(Snapshot.of({**CONFIG, "endpoints": []}))
    assert (await told(client))["routes"] == {}
