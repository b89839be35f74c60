"""Keys with scopes at the gateway: one endpoint, or looking only."""

from __future__ import annotations

import httpx
import pytest

from tests.unit.serving.test_gateway_http import backend, chat, client, state  # noqa: F401


def as_key(name: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {name}"}}


async def models(client: httpx.AsyncClient, key: str) -> list[str]:  # noqa: F811
    return [model["id"] for model in (await client.get("/v1/models", **as_key(key))).json()["data"]]


@pytest.mark.parametrize(
    ("key", "model", "status"),
    [
        ("good", "split", 200),
        ("one", "tickets", 200),
        ("one", "split", 403),
        ("one", "none", 403),  # what it may not touch looks alike, whether or not it is there
        ("looks", "tickets", 403),
        ("jobs", "tickets", 403),
    ],
)
async def test_a_key_queries_what_its_scopes_name(client: httpx.AsyncClient, key: str, model: str, status: int) -> None:  # noqa: F811
    answer = await client.post("/v1/chat/completions", json=chat(model=model), **as_key(key))
    assert answer.status_code == status
    if status == 403:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("insufficient_scope", "model")
        assert f"lacks the scope endpoints/{model}." in error["message"]


async def test_a_key_sees_what_its_scopes_name(client: httpx.AsyncClient) -> None:  # noqa: F811
    assert await models(client, "good") == await models(client, "looks") == ["split", "starting", "tickets"]
    assert await models(client, "one") == ["tickets"]
    assert await models(client, "jobs") == []
    assert (await client.get("/v1/models/split", **as_key("looks"))).status_code == 200
    assert (await client.get("/v1/models/split", **as_key("one"))).status_code == 403
