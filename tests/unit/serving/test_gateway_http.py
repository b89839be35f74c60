"""The HTTP API with a backend of our own: keys, errors, shapes, streams, and what happens when either side leaves."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from common.errors import InvalidArgument, LuthierError, ResourceExhausted, Unavailable, Violation
from luthier.v1.admin_pb2 import Role
from serving.engines.base import Completion, Piece, TokenLogprob
from serving.gateway.http import GatewayState, create_app
from serving.gateway.snapshot import Snapshot
from serving.wire import AdapterRef, Ask, Event, GatewayArgs, Started


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


CONFIG: dict[str, Any] = {
    "keys": {
        digest("good"): {"project": "acme", "key": "k1", "role": "ROLE_QUERY", "expire_time": None},
        digest("late"): {"project": "acme", "key": "k2", "role": "admin", "expire_time": 1.0},
        digest("one"): {"project": "acme", "key": "k4", "role": "query", "scopes": ["endpoints/tickets"]},
        digest("looks"): {"project": "acme", "key": "k5", "role": "admin", "scopes": ["endpoints:read", "jobs"]},
        digest("jobs"): {"project": "acme", "key": "k6", "role": "admin", "scopes": ["jobs"]},
        digest("rival"): {"project": "rival", "key": "k3", "role": "admin", "expire_time": time.time() + 3600},
    },
    "endpoints": [
        {"project": "acme", "endpoint": "tickets", "create_time": 5, "routes": [{"app": "m-1", "weight": 1}]},
        {"project": "acme", "endpoint": "split", "routes": [{"app": "m-1", "weight": 9}, {"app": "m-2", "weight": 1}]},
        {"project": "acme", "endpoint": "starting", "routes": []},
    ],
    "allowed_hosts": ["localhost", "127.0.0.1", "::1"],
}


class FakeBackend:
    """Answers with what it is told to; remembers what it was asked."""

    def __init__(self) -> None:
        self.asks: list[tuple[str, Ask]] = []
        self.asked = asyncio.Semaphore(0)
        self.pieces = ["Hé", "llo"]
        self.calls = ""
        self.logprobs: tuple[TokenLogprob, ...] = ()
        self.error: BaseException | None = None
        self.fail_after: int | None = None
        self.wait = asyncio.Event()
        self.wait.set()
        self.cancelled = 0
        self.prepared: list[tuple[str, AdapterRef]] = []
        self.unfit: dict[str, BaseException] = {}

    async def prepare(self, app: str, adapter: AdapterRef) -> None:
        self.prepared.append((app, adapter))
        if adapter.name in self.unfit:
            raise self.unfit[adapter.name]

    async def complete(self, app: str, ask: Ask) -> list[Completion]:
        self.asks.append((app, ask))
        self.asked.release()
        if self.error:
            raise self.error
        try:
            await self.wait.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        count = len(ask.prompts or (None,)) * ask.n
        return [Completion("".join(self.pieces), "stop", 7, 3, self.logprobs, index, self.calls) for index in range(count)]

    async def stream(self, app: str, ask: Ask) -> AsyncIterator[Event]:
        self.asks.append((app, ask))
        self.asked.release()
        if self.error and self.fail_after is None:
            raise self.error
        finished = False
        try:
            yield Started(7, self.calls)
            for place, piece in enumerate(self.pieces):
                if place == self.fail_after and self.error:
                    raise self.error
                await self.wait.wait()
                for index in range(ask.n):
                    yield Piece(piece, self.logprobs, index)
            finished = True
            for index in range(ask.n):
                yield Completion("".join(self.pieces), "length", 7, 3, self.logprobs, index)
        finally:
            self.cancelled += not finished


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def state(backend: FakeBackend) -> GatewayState:
    state = GatewayState(GatewayArgs(max_body_bytes=10_000, max_in_flight=3, names_requests=True), backend, seed=1)
    state.snapshot = Snapshot.of(CONFIG)
    return state


@pytest.fixture
async def client(state: GatewayState) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    headers = {"authorization": "Bearer good"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers) as client:
        yield client


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tickets", "messages": [{"role": "user", "content": "hi"}], **more}


def events(text: str) -> list[Any]:
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


async def refused(client: httpx.AsyncClient, status: int, path: str = "/v1/chat/completions", **kwargs: Any) -> dict[str, Any]:
    response = await client.post(path, **kwargs)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize("role", [name for name, number in Role.items() if number])
def test_a_key_of_every_role_is_taken_over(role: str) -> None:
    key = {"project": "acme", "key": "k1", "role": role, "expire_time": None}
    assert Snapshot.of({"keys": {digest("x"): key}}).keys[digest("x")].role == role.removeprefix("ROLE_").lower()


async def test_a_chat_answer_has_openais_shape(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = (
        await client.post("/v1/chat/completions", json=chat(temperature=0.2, stop="\n", seed=4, max_completion_tokens=9))
    ).json()
    assert body["id"].startswith("chatcmpl-")
    assert abs(body["created"] - time.time()) < 5
    assert (body["object"], body["model"]) == ("chat.completion", "tickets")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Héllo", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    ((app, ask),) = backend.asks
    assert (app, ask.messages) == ("m-1", ({"role": "user", "content": "hi"},))
    params = ask.params
    assert (params.temperature, params.top_p, params.stop, params.seed, params.max_tokens) == (0.2, 1.0, ("\n",), 4, 9)


async def test_completions_take_several_prompts(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = (await client.post("/v1/completions", json={"model": "tickets", "prompt": ["a", "b"]})).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "Héllo"), (1, "Héllo")]
    assert body["usage"]["total_tokens"] == 20
    assert backend.asks[0][1].params.max_tokens == 16


async def test_messages_are_flattened_as_templates_take_them(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    assert (await client.post("/v1/chat/completions", json=chat(messages=messages))).status_code == 200
    assert backend.asks[0][1].messages == ({"role": "system", "content": "x"}, {"role": "user", "content": "ab"})


async def test_a_stream_is_server_sent_events_with_an_end(client: httpx.AsyncClient) -> None:
    request = chat(stream=True, stream_options={"include_usage": True})
    response = await client.post("/v1/chat/completions", json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Héllo"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 10)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1

    *chunks, done = events((await client.post("/v1/completions", json={"model": "tickets", "prompt": "a", "stream": True})).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Héllo"
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("header", [None, "Bearer bad", "Bearer late", "Basic good", "good", "Bearer ", "Bearer gööd"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/tickets"])
async def test_every_route_wants_a_key(client: httpx.AsyncClient, header: str | None, path: str) -> None:
    del client.headers["authorization"]
    headers = {"authorization": header.encode("latin-1")} if header else {}
    response = await (client.get(path, headers=headers) if "models" in path else client.post(path, headers=headers, json=chat()))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "invalid_request_error"
    if header in ("Bearer bad", "Bearer late"):
        assert response.json()["error"]["code"] == "invalid_api_key"


async def test_a_revoked_key_no_longer_counts(client: httpx.AsyncClient, state: GatewayState) -> None:
    assert (await client.get("/v1/models")).status_code == 200
    state.snapshot = Snapshot.of({**CONFIG, "keys": {}})
    assert (await client.get("/v1/models")).status_code == 401


async def test_models_are_the_projects_own(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["split", "starting", "tickets"]
    assert listed["data"][2] == {"id": "tickets", "object": "model", "created": 5, "owned_by": "acme"}
    assert (await client.get("/v1/models/tickets")).json()["id"] == "tickets"
    client.headers["authorization"] = "Bearer rival"
    assert (await client.get("/v1/models")).json()["data"] == []
    theirs = await refused(client, 404, json=chat())
    nobodys = await refused(client, 404, json=chat(model="nobody"))
    assert theirs["code"] == nobodys["code"] == "model_not_found"
    assert theirs["message"].replace("tickets", "nobody") == nobodys["message"]


async def test_an_endpoint_without_ready_routes_says_so(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=chat(model="starting"))
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert "not ready" in response.json()["error"]["message"]


async def test_weights_split_the_traffic(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for _ in range(200):
        await client.post("/v1/chat/completions", json=chat(model="split"))
    second = sum(app == "m-2" for app, _ in backend.asks)
    assert 8 <= second <= 34


async def test_a_bad_parameter_is_named_in_openais_shape(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    error = await refused(client, 400, json=chat(temperature=9))
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "temperature", "invalid_value")
    error = await refused(client, 400, json=chat(stop=["a"] * 5))
    assert error["param"] == "stop"
    await refused(client, 400, content=b"{")
    assert not backend.asks


async def test_a_body_too_large_is_refused_whether_or_not_it_says_so(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await refused(client, 413, content=b"x" * 10_001))["code"] == "request_too_large"

    async def unsaid() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 1000

    assert (await refused(client, 413, content=unsaid()))["code"] == "request_too_large"
    assert not backend.asks


async def test_a_body_that_trickles_in_is_given_up_and_one_that_pauses_is_not(state: GatewayState, backend: FakeBackend) -> None:
    state.args = GatewayArgs(body_timeout_s=0.2, names_requests=True)
    whole = json.dumps(chat()).encode()

    async def trickle(pause_s: float) -> AsyncIterator[bytes]:
        for start in range(0, len(whole), 8):
            yield whole[start : start + 8]
            await asyncio.sleep(pause_s)

    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    headers = {"authorization": "Bearer good"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        error = await refused(client, 408, content=trickle(0.05))
        assert (error["code"], "0.2 seconds" in error["message"]) == ("request_timeout", True)
        assert not backend.asks
        backend.wait.clear()
        answering = asyncio.create_task(client.post("/v1/chat/completions", content=trickle(0.001)))
        await backend.asked.acquire()
        await asyncio.sleep(0.25)  # an answer may take longer than a body
        backend.wait.set()
        assert (await answering).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/docs", "/openapi.json", "/v1/models/a/b"])
async def test_unknown_paths_have_openais_shape(client: httpx.AsyncClient, path: str) -> None:
    assert (await refused(client, 404, path, json={}))["code"] == "unknown_url"
    response = await client.get("/v1/chat/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:8000@evil.example", 403),
        ("evil.example:80", 403),
        ("[::1].evil.example", 403),
        ("", 403),
    ],
)
async def test_only_its_own_host_names_are_answered(client: httpx.AsyncClient, host: str, status: int) -> None:
    assert (await client.get("/v1/models", headers={"host": host})).status_code == status


async def test_pages_of_other_sites_are_given_nothing(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    page = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    asked_before = await client.options("/v1/chat/completions", headers={**page, **wants})
    assert asked_before.status_code == 405  # so that the browser does not send the request itself
    read = await client.get("/v1/models", headers=page)
    del client.headers["authorization"]  # what a form sends without asking before has no key
    await refused(client, 401, content=json.dumps(chat()), headers={**page, "content-type": "text/plain"})
    assert not backend.asks
    for response in (asked_before, read):
        assert not [name for name in response.headers if name.startswith("access-control-")]


async def test_health_needs_no_key_and_any_host_where_none_is_listed(client: httpx.AsyncClient, state: GatewayState) -> None:
    del client.headers["authorization"]
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/healthz", headers={"host": "evil.example"})).status_code == 403
    state.snapshot = Snapshot.of({**CONFIG, "allowed_hosts": []})
    assert (await client.get("/healthz", headers={"host": "any.example"})).status_code == 200


async def test_requests_have_an_id(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models", headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
    ids = {(await client.get("/v1/models", headers={"x-request-id": "a b\t"})).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(name.startswith("req_") for name in ids)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidArgument.of([Violation("messages", "no")]), 400, None),
        (InvalidArgument("too long", "PROMPT_TOO_LONG"), 400, "context_length_exceeded"),
        (ResourceExhausted("full"), 429, "rate_limit_exceeded"),
        (Unavailable("gone"), 503, "unavailable"),
        (RuntimeError("secret at /srv/key"), 500, "internal_error"),
        (LuthierError("secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_backend_have_their_status_also_for_streams(
    client: httpx.AsyncClient, backend: FakeBackend, error: BaseException, status: int, code: str | None, stream: bool
) -> None:
    backend.error = error
    for _ in range(5):  # more often than max_in_flight: nothing stays counted
        told = await refused(client, status, json=chat(stream=stream), headers={"x-request-id": "abc"})
        assert told["code"] == code
    assert "secret" not in told["message"]
    if status == 500:
        assert "abc" in told["message"]
    backend.error = None
    assert (await client.post("/v1/chat/completions", json=chat(stream=stream))).status_code == 200


async def test_a_stream_that_breaks_ends_with_an_error_and_not_as_if_whole(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.error, backend.fail_after = Unavailable("The replica stopped"), 1
    response = await client.post("/v1/chat/completions", json=chat(stream=True))
    *chunks, last = events(response.text)
    assert chunks[1]["choices"][0]["delta"]["content"] == "Hé"
    assert last["error"]["message"] == "The replica stopped"
    assert "[DONE]" not in response.text
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


async def test_more_than_the_gateway_takes_is_refused_and_room_comes_back(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.wait.clear()
    tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=chat(stream=n == 0))) for n in range(3)]
    for _ in tasks:
        await backend.asked.acquire()
    error = await refused(client, 503, json=chat())
    assert error["code"] == "unavailable"
    backend.wait.set()
    assert [(await task).status_code for task in tasks] == [200, 200, 200]
    assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200


async def test_an_answer_that_takes_too_long_is_given_up(
    state: GatewayState, client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    state.args = GatewayArgs(request_timeout_s=0.05)
    backend.wait.clear()
    assert (await refused(client, 504, json=chat()))["code"] == "timeout"
    assert backend.cancelled == 1
    response = await client.post("/v1/chat/completions", json=chat(stream=True))
    assert events(response.text)[-1]["error"]["code"] == "timeout"
    assert backend.cancelled == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_generation(state: GatewayState, backend: FakeBackend, stream: bool) -> None:
    backend.wait.clear()
    leave = asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps(chat(stream=stream)).encode(), "more_body": False}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if body:
            return body.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer good")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": ""}
    task = asyncio.create_task(create_app(state)(scope, receive, send))
    await backend.asked.acquire()
    await asyncio.sleep(0.05)
    leave.set()
    await asyncio.wait_for(task, 5)
    assert backend.cancelled == 1
    assert state._in_flight == 0
    if stream:
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)


async def test_several_answers_to_one_prompt(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = (await client.post("/v1/chat/completions", json=chat(n=3))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    response = await client.post("/v1/chat/completions", json=chat(n=2, stream=True, stream_options={"include_usage": True}))
    chunks = events(response.text)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    texts = dict.fromkeys((0, 1), "")
    for chunk in chunks[:-2]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "Héllo", 1: "Héllo"}
    ends = [chunk["choices"][0] for chunk in chunks[:-2] if chunk["choices"][0]["finish_reason"]]
    assert [(end["index"], end["finish_reason"]) for end in ends] == [(0, "length"), (1, "length")]


async def test_likelihoods_have_openais_shapes(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.logprobs = (TokenLogprob("Hé", -0.5, (("Hé", -0.5), ("x", -float("inf")))),)
    body = (await client.post("/v1/chat/completions", json=chat(logprobs=True, top_logprobs=2))).json()
    (told,) = body["choices"][0]["logprobs"]["content"]
    assert (told["token"], told["logprob"], told["bytes"]) == ("Hé", -0.5, list("Hé".encode()))
    assert [(top["token"], top["logprob"]) for top in told["top_logprobs"]] == [("Hé", -0.5), ("x", -9999.0)]
    request = {"model": "tickets", "prompt": "a", "logprobs": 2}
    plain = (await client.post("/v1/completions", json=request)).json()["choices"][0]["logprobs"]
    assert plain == {
        "tokens": ["Hé"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"Hé": -0.5, "x": -9999.0}],
        "text_offset": [0],
    }


TOOLS = [{"type": "function", "function": {"name": "look_up"}}]


@pytest.mark.parametrize(
    ("calls", "pieces"),
    [
        ("hermes", ["I look. ", "<tool", '_call>\n{"name": "look_up", "argu', 'ments": {"id": 7}}\n</tool_call>']),
        ("llama", ['{"name": "look_up",', ' "parameters": {"id": 7}}']),
    ],
)
async def test_calls_of_tools_are_found_in_the_text(
    client: httpx.AsyncClient, backend: FakeBackend, calls: str, pieces: list[str]
) -> None:
    backend.calls, backend.pieces = calls, pieces
    (choice,) = (await client.post("/v1/chat/completions", json=chat(tools=TOOLS))).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["type"], call["function"]["name"]) == ("tool_calls", "function", "look_up")
    assert json.loads(call["function"]["arguments"]) == {"id": 7}
    chunks = events((await client.post("/v1/chat/completions", json=chat(tools=TOOLS, stream=True))).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    (told,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert (told[0]["index"], told[0]["function"]) == (0, call["function"])
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text.strip() == (choice["message"]["content"] or "")
    assert "tool_call" not in text
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_what_only_looks_like_a_call_stays_text(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.calls, backend.pieces = "llama", ['{"name": "somebody', ' else"}']
    (choice,) = (await client.post("/v1/chat/completions", json=chat(tools=TOOLS))).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"name": "somebody else"}', "stop")
    chunks = events((await client.post("/v1/chat/completions", json=chat(tools=TOOLS, stream=True))).text)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == '{"name": "somebody else"}'
