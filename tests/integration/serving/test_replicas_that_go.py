"""Replicas that die or are taken down while they answer, on a real Ray Serve: nobody is cut off silently."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from common import manifest
from coordinator.cluster.serve_config import EndpointEntry, GatewaySpec, KeyEntry, ModelApp, RouteEntry, Snapshot, render

pytestmark = pytest.mark.slow

CLIENTS = 8


class Stack:
    """One model with two replicas behind a gateway."""

    def __init__(self, ray: Any, model: Path, storage: Path) -> None:
        self._ray = ray
        self.storage = storage
        uri = storage.as_uri()
        self.app = ModelApp(uri, manifest.publish(model, uri).sha256, cpus=0.5, min_replicas=2, max_replicas=2)
        self.url = f"http://127.0.0.1:{ray.gateway_port}/v1/chat/completions"

    def deploy(self, *apps: ModelApp) -> None:
        key = KeyEntry(hashlib.sha256(b"good").hexdigest(), "acme", "good", "ROLE_QUERY")
        endpoint = EndpointEntry("acme", "tickets", 1, tuple(RouteEntry(app.name) for app in apps))
        self._ray.serve(render(GatewaySpec(port=self._ray.gateway_port), apps, Snapshot([key], [endpoint])))
        self._ray.wait_ready("gateway", *(app.name for app in apps))

    def replicas(self) -> list[int]:
        """Process ids. For some seconds Serve still names those that were killed."""
        (model,) = self._ray.details()["applications"][self.app.name]["deployments"].values()
        return [replica["pid"] for replica in model["replicas"] if replica["state"] == "RUNNING" and alive(replica["pid"])]


@pytest.fixture(scope="module")
def stack(private_ray: Any, slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(private_ray, slow_llama, tmp_path_factory.mktemp("storage") / "model")
    stack.deploy(stack.app)
    return stack


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(headers={"authorization": "Bearer good"}, timeout=120) as client:
        yield client


QUESTIONS = itertools.count()


def chat(max_tokens: int, **more: Any) -> dict[str, Any]:
    """A request like no other, so that it takes a replica to answer it."""
    messages = [{"role": "user", "content": f"question {next(QUESTIONS)}"}]
    return {"model": "tickets", "messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_no_request_fails_as_a_replica_is_killed_under_load(stack: Stack, client: httpx.Client) -> None:
    begun, enough = threading.Barrier(CLIENTS + 1), threading.Event()

    def ask() -> list[tuple[int, str]]:
        answers = []
        for number in range(200):
            response = client.post(stack.url, json=chat(400))
            answers.append((response.status_code, "" if response.is_success else response.text))
            if number == 0:
                begun.wait(60)
            if enough.is_set() and number >= 2:
                break
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask) for _ in range(CLIENTS)]
        begun.wait(60)
        os.kill(stack.replicas()[0], signal.SIGKILL)
        enough.set()
        answers = [answer for each in asking for answer in each.result(120)]
    assert len(answers) >= 3 * CLIENTS
    assert {status for status, _ in answers} == {200}, [text for _, text in answers if text]


def test_weights_reach_a_node_once(stack: Stack, client: httpx.Client) -> None:
    shutil.rmtree(stack.storage)  # whoever looks there from now on fails
    before = stack.replicas()
    for replica in before:
        os.kill(replica, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while len(after := set(stack.replicas()) - set(before)) < 2:
        assert time.monotonic() < deadline, after
        time.sleep(0.3)
    assert client.post(stack.url, json=chat(1)).status_code == 200


def test_a_model_that_is_taken_down_ends_its_answers_first(stack: Stack, client: httpx.Client) -> None:
    stack.deploy(stack.app)
    events: list[str] = []
    with client.stream("POST", stack.url, json=chat(5000, stream=True)) as response:
        for line in response.iter_lines():
            if line:
                events.append(line.removeprefix("data: "))
            if len(events) == 5:
                stack.deploy()
    assert events[-1] == "[DONE]", events[-1]
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert client.post(stack.url, json=chat(1)).status_code == 503
