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


CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"id": 7}'}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "finds", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
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
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}, "messages[0].tool_calls[0].function"),
        ({"model": 3}, "model"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"logit_bias": {"one": 2}}, "logit_bias"),
        ({"logit_bias": {"1": 200}}, "logit_bias.1"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"top_k": -1}, "top_k"),
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


def test_options_reach_the_engine() -> None:
    more = {"n": 3, "top_k": 5, "presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"7": -100, "3": 1}}
    told = {"logprobs": True, "top_logprobs": 2}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}}
    ask = parse(ChatRequest, json.dumps(chat(**more, **told, **form)).encode()).ask()
    params = ask.params
    assert (ask.n, params.top_k, params.presence_penalty, params.frequency_penalty) == (3, 5, 0.5, -1)
    assert (params.logit_bias, params.top_logprobs) == (((3, 1.0), (7, -100.0)), 2)
    assert json.loads(params.json_schema) == schema


def test_tools_and_their_answers_reach_the_template() -> None:
    talk = [
        {"role": "user", "content": "where is 7?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "in Oslo"},
    ]
    ask = parse(ChatRequest, json.dumps({"model": "m", "messages": talk, "tools": [TOOL], "tool_choice": "auto"}).encode()).ask()
    assert ask.messages[1]["tool_calls"][0]["function"] == {"name": "look_up", "arguments": {"id": 7}}
    assert ask.messages[2] == {"role": "tool", "content": "in Oslo"}
    assert (ask.tools[0]["function"]["name"], ask.must_call) == ("look_up", False)
    named = {"tool_choice": {"type": "function", "function": {"name": "look_up"}}}
    assert parse(ChatRequest, json.dumps(chat(tools=[TOOL], **named)).encode()).ask().must_call == "look_up"
    assert parse(ChatRequest, json.dumps(chat(tools=[TOOL], tool_choice="none")).encode()).ask().tools == ()


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
