"""A canary under many clients: a good one is promoted and a bad one goes back by itself, and no request fails meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from google.protobuf.duration_pb2 import Duration

from luthier.client import Client
from luthier.client.errors import NotFound
from luthier.v1 import endpoint_pb2
from tests.integration.serving.conftest import build_micro_llama
from tests.support.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 50
PROMPT = {"model": "desk", "messages": [{"role": "user", "content": "the printer"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def versions(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Three versions of a model: the second answers as the first does, the third does not."""
    folder = tmp_path_factory.mktemp("versions")
    made = []
    for number, (seed, positions) in enumerate([(0, 256), (0, 250), (5, 256)]):
        uploaded = client.upload_model(build_micro_llama(folder / str(number), seed, positions), "desk")
        made.append("@".join(uploaded.name.split("/")[3::2]))
    yield made
    with contextlib.suppress(NotFound):
        client.delete_endpoint("desk")
    client.wait_gone("desk", 120)


@dataclass
class Load:
    """What many clients see. A client says how good an answer was: as the first model would have answered, or not."""

    url: str
    token: str
    expected: str = ""
    statuses: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, client: httpx.AsyncClient, number: int) -> None:
        while not self.done.is_set():
            stream = number % 2 == 0
            body = {**PROMPT, "stream": stream, "user": f"user-{number}-{time.monotonic_ns()}"}
            try:
                response = await client.post(f"{self.url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                self.statuses[type(error).__name__] += 1
                continue
            whole = response.status_code == 200 and (not stream or response.text.rstrip().endswith("data: [DONE]"))
            self.statuses["fine" if whole else f"{response.status_code} {response.text[-200:]}"] += 1
            if not whole:
                continue
            text, fingerprint, id_ = read(response, stream)
            self.answered[fingerprint] += 1
            if self.answered[fingerprint] % 2:
                rating = {"id": id_, "score": float(text == self.expected)}
                await client.post(f"{self.url}/feedback", json=rating)

    async def run(self, until: asyncio.Task[None]) -> None:
        # Answers out of the cache would say nothing about who answers.
        headers = {"authorization": f"Bearer {self.token}", "x-luthier-cache": "off"}
        limits = httpx.Limits(max_connections=CLIENTS + 10, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(headers=headers, timeout=60, limits=limits) as client:
            clients = [asyncio.create_task(self.ask(client, number)) for number in range(CLIENTS)]
            try:
                await until
            finally:
                self.done.set()
                await asyncio.gather(*clients)


def read(response: httpx.Response, stream: bool) -> tuple[str, str, str]:
    """Text, fingerprint and id of an answer."""
    if not stream:
        body = response.json()
        return body["choices"][0]["message"]["content"], body["system_fingerprint"], body["id"]
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    return text, chunks[0]["system_fingerprint"], chunks[0]["id"]


def deploy(client: Client, version: str, canary: bool) -> None:
    wanted = endpoint_pb2.Endpoint(routes=[endpoint_pb2.Route(model_version=version)])
    wanted.resources.cpus = 0.2
    if canary:
        # Latency says nothing on a machine that is shared with other tests.
        spec = {"steps": [20, 100], "min_requests": 30, "max_latency_ratio": 0, "min_feedback_score": 0.5}
        wanted.rollout.CopyFrom(endpoint_pb2.Rollout(min_duration=Duration(seconds=2), **spec))
    client.deploy_endpoint("desk", wanted)


async def until_ended(client: Client, seconds: float = 180.0) -> None:
    """Wait for the rollout to end, and for what it does not need any more to be gone."""
    deadline = time.monotonic() + seconds
    while True:
        found = await asyncio.to_thread(client.get_endpoint, "desk")
        if found.rollout_status.state != endpoint_pb2.ROLLOUT_STATE_PROGRESSING:
            await asyncio.sleep(6)
            return
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.5)


def under_load(stack: Stack, client: Client, version: str, expected: str) -> Load:
    async def run() -> Load:
        load = Load(stack.gateway_url, stack.token, expected)
        deploy(client, version, canary=True)
        await load.run(asyncio.create_task(until_ended(client)))
        return load

    return asyncio.run(run())


def test_a_good_canary_is_promoted_and_a_bad_one_goes_back_and_no_request_fails(
    stack: Stack, client: Client, versions: list[str]
) -> None:
    first, same, other = versions
    deploy(client, first, canary=False)
    client.wait_ready("desk", 180)
    headers = {"authorization": f"Bearer {stack.token}"}
    expected = httpx.post(f"{stack.gateway_url}/chat/completions", json=PROMPT, headers=headers, timeout=60).json()
    text = expected["choices"][0]["message"]["content"]

    good = under_load(stack, client, same, text)
    found = client.get_endpoint("desk")
    assert found.rollout_status.state == endpoint_pb2.ROLLOUT_STATE_PROMOTED, found
    assert [route.model_version for route in found.serving] == [same]
    assert set(good.statuses) == {"fine"}, good.statuses
    assert len(good.answered) == 2

    bad = under_load(stack, client, other, text)
    found = client.get_endpoint("desk")
    assert found.rollout_status.state == endpoint_pb2.ROLLOUT_STATE_ROLLED_BACK, found
    assert "feedback is 0.00" in found.rollout_status.message
    assert [route.model_version for route in found.routes] == [same]
    assert set(bad.statuses) == {"fine"}, bad.statuses
    told = [event.message for event in found.events]
    assert any(message.startswith(f"promoted: {same} answers now instead of {first}") for message in told)
    assert told[-1].startswith(f"rolled back: {same} answers again instead of {other}")


def test_a_new_version_takes_over_under_load_and_no_request_fails(stack: Stack, client: Client, versions: list[str]) -> None:
    deploy(client, versions[0], canary=False)
    client.wait_ready("desk", 180)

    async def taken_over() -> None:
        await asyncio.sleep(1)
        await asyncio.to_thread(deploy, client, versions[1], False)
        await asyncio.to_thread(client.wait_ready, "desk", 180)
        await asyncio.sleep(6)

    async def run() -> Load:
        load = Load(stack.gateway_url, stack.token)
        await load.run(asyncio.create_task(taken_over()))
        return load

    load = asyncio.run(run())
    assert set(load.statuses) == {"fine"}, load.statuses
    assert len(load.answered) == 2


def test_all_replicas_go_and_the_next_request_brings_one(stack: Stack, client: Client, versions: list[str]) -> None:
    wanted = endpoint_pb2.Endpoint(routes=[endpoint_pb2.Route(model_version=versions[0])])
    wanted.resources.cpus = 0.2
    wanted.autoscaling.MergeFrom(endpoint_pb2.Autoscaling(scale_to_zero=True, downscale_seconds=5))
    client.deploy_endpoint("sleepy", wanted)
    client.wait_ready("sleepy", 180)
    deadline = time.monotonic() + 90
    while client.get_endpoint("sleepy").routes[0].ready_replicas:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert client.get_endpoint("sleepy").state == endpoint_pb2.ENDPOINT_STATE_READY
    headers = {"authorization": f"Bearer {stack.token}", "x-luthier-cache": "off"}
    answer = httpx.post(f"{stack.gateway_url}/chat/completions", json={**PROMPT, "model": "sleepy"}, headers=headers, timeout=90)
    assert answer.status_code == 200, answer.text
    client.delete_endpoint("sleepy")
    client.wait_gone("sleepy", 120)
