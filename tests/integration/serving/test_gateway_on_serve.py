"""The gateway and its models on a real Ray Serve, deployed by the rendered configuration and asked by real clients."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from common import manifest
from coordinator.cluster.serve_config import (
    EndpointEntry,
    GatewaySpec,
    KeyEntry,
    ModelApp,
    RouteEntry,
    Snapshot,
    render,
)
from serving.engines import SamplingParams, load_engine

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "my invoice is wrong, größer 東京"}]


def key(token: str, **more: Any) -> KeyEntry:
    return KeyEntry(hashlib.sha256(token.encode()).hexdigest(), "acme", token, "ROLE_QUERY", **more)


class Stack:
    """Two models behind one gateway."""

    def __init__(self, ray: Any, fast: Path, slow: Path, storage: Path) -> None:
        self.ray = ray
        self.apps = {}
        for name, folder in (("fast", fast), ("slow", slow)):
            uri = (storage / name).as_uri()
            self.apps[name] = ModelApp(uri, manifest.publish(folder, uri).sha256, cpus=0.5)
        self.spec = GatewaySpec(port=ray.gateway_port, max_body_bytes=100_000)
        self.url = f"http://127.0.0.1:{ray.gateway_port}"

    def deploy(self, *keys: KeyEntry) -> None:
        endpoints = [
            *(EndpointEntry("acme", name, 1, (RouteEntry(app.name),)) for name, app in self.apps.items()),
            EndpointEntry("acme", "gone", 1, (RouteEntry("m-never-deployed"),)),
            EndpointEntry("other", "theirs", 1, (RouteEntry(self.apps["fast"].name),)),
        ]
        self.ray.serve(render(self.spec, list(self.apps.values()), Snapshot(keys, endpoints)))

    def client(self, token: str = "good") -> openai.OpenAI:
        # What is kept of an earlier answer would come in one piece.
        headers = {"x-luthier-cache": "off"}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=60, default_headers=headers)

    def post(self, body: Any, token: str = "good", **kwargs: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}", **kwargs.pop("headers", {})}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60, **kwargs)

    def replicas(self) -> set[str]:
        found = set()
        for app in self.ray.details()["applications"].values():
            for deployment in app["deployments"].values():
                found |= {replica["actor_id"] for replica in deployment["replicas"]}
        return found


@pytest.fixture(scope="module")
def stack(private_ray: Any, micro_llama: Path, slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(private_ray, micro_llama, slow_llama, tmp_path_factory.mktemp("storage"))
    stack.deploy(key("good"), key("revoked-later"), key("late", expire_time=1.0))
    private_ray.wait_ready("gateway", *(app.name for app in stack.apps.values()))
    return stack


def chat(model: str = "fast", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 24, **more}


def test_the_configuration_is_what_serve_takes() -> None:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    adapter = ModelApp("file:///m", "aa", "file:///b", "bb", gpus=1, min_replicas=2, max_replicas=5, target_ongoing_requests=2.5)
    config = ServeDeploySchema.model_validate(render(GatewaySpec(port=8123), [adapter], Snapshot([key("good")])))
    assert config.http_options.port == 8123
    assert [(app.name, app.route_prefix) for app in config.applications] == [("gateway", "/"), (adapter.name, None)]
    model = config.applications[1].deployments[0]
    assert model.ray_actor_options.num_gpus == 1
    scaling = AutoscalingConfig(**model.autoscaling_config)
    assert (scaling.min_replicas, scaling.max_replicas, scaling.get_target_ongoing_requests()) == (2, 5, 2.5)


def test_the_openai_client_gets_the_engines_own_answer(stack: Stack, micro_llama: Path) -> None:
    engine = load_engine(micro_llama, device="cpu")
    (expected,) = engine.generate([engine.render(QUESTION)], SamplingParams(max_tokens=24))
    answer = stack.client().chat.completions.create(**chat())
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)

    chunks = list(stack.client().chat.completions.create(**chat(stream=True, stream_options={"include_usage": True})))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert len(chunks) > 5
    assert chunks[-1].usage == answer.usage

    (raw,) = engine.generate(["the printer"], SamplingParams(max_tokens=9))
    completion = stack.client().completions.create(model="fast", prompt="the printer", max_tokens=9, temperature=0)
    assert completion.choices[0].text == raw.text
    assert [model.id for model in stack.client().models.list()] == ["fast", "gone", "slow"]


SCHEMA = {
    "type": "object",
    "properties": {"queue": {"enum": ["billing", "delivery"]}},
    "required": ["queue"],
    "additionalProperties": False,
}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "ticket", "strict": True, "schema": schema}}


def test_the_openai_client_gets_what_it_asks_for(stack: Stack) -> None:
    client = stack.client().chat.completions
    several = client.create(**chat(n=3, temperature=1.0, seed=7, logprobs=True, top_logprobs=2))
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) == 3
    again = client.create(**chat(n=3, temperature=1.0, seed=7))
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in several.choices]
    told = several.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert all(len(token.top_logprobs) == 2 for token in told.content)
    assert abs(len(told.content) - several.usage.completion_tokens / 3) < 24  # type: ignore[union-attr]

    answer = client.create(**chat(response_format=schema_format(SCHEMA), max_tokens=60, temperature=1.0))
    assert set(json.loads(answer.choices[0].message.content or "")) == {"queue"}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        client.create(**chat(response_format=schema_format({"type": "frobnicate"})))

    chunks = list(client.create(**chat(n=2, stream=True)))
    texts = dict.fromkeys((0, 1), "")
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts[0] == texts[1] != ""


def test_the_node_client_gets_it_too(stack: Stack, tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not installed")
    install = [npm, "install", "--silent", "--no-fund", "--no-audit", "--fetch-retries=1", "--fetch-timeout=20000", "openai@6"]
    try:
        installed = subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=100, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not reach its registry")
    if installed.returncode:
        pytest.skip(f"npm cannot install openai: {installed.stderr.decode()[-300:]}")
    shutil.copy(Path(__file__).with_name("openai_node.mjs"), tmp_path)
    environment = {**os.environ, "OPENAI_API_KEY": "good", "OPENAI_BASE_URL": f"{stack.url}/v1"}
    ran = subprocess.run(
        [node, "openai_node.mjs"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    answer = stack.client().chat.completions.create(**chat())
    assert said["models"] == ["fast", "gone", "slow"]
    assert said["answer"] == said["stream"] == answer.choices[0].message.content
    assert said["queue"] in ("billing", "delivery")
    assert said["refused"] == {"status": 404, "code": "model_not_found"}


def test_refusals_reach_openais_client_as_its_own_exceptions(stack: Stack) -> None:
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        stack.client("bad").models.list()
    with pytest.raises(openai.AuthenticationError, match="expired"):
        stack.client("late").models.list()
    with pytest.raises(openai.NotFoundError, match="`theirs` does not exist"):
        stack.client().chat.completions.create(**chat("theirs"))
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        stack.client().chat.completions.create(**chat(), tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.InternalServerError, match="not ready"):
        stack.client().chat.completions.create(**chat("gone"))


@pytest.mark.parametrize("stream", [False, True])
def test_an_overlong_prompt_names_both_lengths(stack: Stack, stream: bool) -> None:
    long = [{"role": "user", "content": "word " * 400}]
    response = stack.post(chat(messages=long, stream=stream))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2," in error["message"]
    assert "takes 256" in error["message"]


def test_plain_http_gets_openais_shapes(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/healthz").json() == {"status": "ok"}
    response = stack.post(chat(padding="x" * 200_000))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert stack.post(chat(), headers={"host": "evil.example"}).status_code == 403
    response = stack.post(chat(n=0), headers={"x-request-id": "mine-7"})
    assert response.headers.get_list("x-request-id") == ["mine-7"]
    assert response.json()["error"]["param"] == "n"
    response = httpx.get(f"{stack.url}/v1/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


def test_a_revoked_key_stops_counting_and_no_replica_restarts(stack: Stack) -> None:
    before = stack.replicas()
    assert stack.client("revoked-later").models.list()
    stack.deploy(key("good"), key("new"))
    start = time.monotonic()
    while stack.post(chat(max_tokens=1), "revoked-later").status_code != 401:
        assert time.monotonic() - start < 15, "the key still counts"
        time.sleep(0.1)
    assert stack.post(chat(max_tokens=1), "new").status_code == 200
    assert stack.replicas() == before


def test_clients_that_leave_free_the_replica(stack: Stack) -> None:
    # The replica takes sixteen requests at a time: with all of them held, another one waits until streams end or are left.
    endless = chat("slow", max_tokens=6000, stream=True)
    with httpx.Client(timeout=60, headers={"authorization": "Bearer good"}) as client:
        requests = [client.build_request("POST", f"{stack.url}/v1/chat/completions", json=endless) for _ in range(16)]
        streams = [client.send(request, stream=True) for request in requests]
        for stream in streams:
            assert stream.status_code == 200
            lines = stream.iter_lines()
            while "content" not in next(lines):
                pass
        for stream in streams:
            stream.close()
    start = time.monotonic()
    assert stack.post(chat("slow", max_tokens=2)).status_code == 200
    assert time.monotonic() - start < 5


def test_a_replica_that_dies_ends_the_stream_with_an_error(stack: Stack) -> None:
    app = stack.ray.details()["applications"][stack.apps["slow"].name]
    (replica,) = app["deployments"]["Model"]["replicas"]
    body = chat("slow", max_tokens=6000, stream=True)
    seen: list[str] = []
    with httpx.stream(
        "POST", f"{stack.url}/v1/chat/completions", json=body, headers={"authorization": "Bearer good"}, timeout=60
    ) as response:
        for line in response.iter_lines():
            if line:
                seen.append(line.removeprefix("data: "))
            if len(seen) == 5:
                os.kill(replica["pid"], signal.SIGKILL)
    assert len(seen) > 5
    assert json.loads(seen[-1])["error"]["code"] == "unavailable"
    assert "[DONE]" not in seen
    assert stack.post(chat()).status_code == 200  # the other model does not notice
