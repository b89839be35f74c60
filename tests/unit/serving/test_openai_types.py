"""Which requests are taken, and what is said about the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.gateway.errors import ApiError
from serving.gateway.openai_types import ChatRequest, CompletionRequest, parse


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tickets", "messages": [{"role": "user", "content": "hi"}], **more}


def refused(kind: type[Any], content: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        parse(kind, json.dumps(content).encode()).ask()
    assert (refusal.value.status, refusal.value.kind) == (400, "invalid_request_error")
    return refusal.value


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"model": 3}, "model"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"best_of": 3}, "best_of"),
        ({"guided_json": {}}, "guided_json"),
    ],
)
def test_a_bad_or_unsupported_parameter_is_named(more: dict[str, Any], param: str) -> None:
    error = refused(ChatRequest, chat(**more))
    assert error.param == param, error.message
    assert param.split(".")[-1].split("[")[0] in error.message


def test_parameters_that_ask_for_nothing_are_taken() -> None:
    nothing = {"n": 1, "tools": [], "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me"}
    more = {"response_format": {"type": "text"}, "logprobs": False, "metadata": {"a": "b"}, "store": None, "service_tier": "auto"}
    ask = parse(ChatRequest, json.dumps(chat(**nothing, **more)).encode()).ask()
    assert ask == parse(ChatRequest, json.dumps(chat()).encode()).ask()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"model": NaN}',
        b"[" * 9000,
        b'{"model": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"model": ' + b"1" * 9000 + b"}",
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refusal:
        parse(ChatRequest, body)
    assert refusal.value.status == 400
    refusal.value.response()  # what it says can be sent


@pytest.mark.parametrize("prompt", [None, "", [], [""], ["a"] * 200, [1, 2], 5])
def test_a_bad_prompt_is_refused(prompt: Any) -> None:
    assert str(refused(CompletionRequest, {"model": "tickets", "prompt": prompt}).param).startswith("prompt")


def test_a_stream_takes_one_prompt() -> None:
    request = {"model": "tickets", "prompt": ["a", "b"], "stream": True}
    assert refused(CompletionRequest, request).param == "prompt"
