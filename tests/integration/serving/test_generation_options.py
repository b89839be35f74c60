"""What a request may ask of a generation, on a micro model: penalties, biases, likelihoods, and texts that follow something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import InvalidArgument
from serving.engines import SamplingParams, load_engine, tool_calls
from serving.engines.transformers_engine import TransformersEngine

PROMPT = "my invoice is wrong"


@pytest.fixture(scope="module")
def engine(micro_llama: Path) -> TransformersEngine:
    engine = load_engine(micro_llama, device="cpu")
    assert isinstance(engine, TransformersEngine)
    return engine


def text(engine: TransformersEngine, **params: Any) -> str:
    (completion,) = engine.generate([PROMPT], SamplingParams(**{"max_tokens": 40, **params}))
    return completion.text


SCHEMA = {
    "type": "object",
    "properties": {
        "queue": {"enum": ["billing", "delivery"]},
        "urgent": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["queue", "urgent", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_followed_by_a_model_that_knows_nothing(engine: TransformersEngine, seed: int) -> None:
    found = json.loads(text(engine, json_schema=json.dumps(SCHEMA), temperature=1.0, seed=seed, max_tokens=120))
    assert set(found) == {"queue", "urgent", "count"}
    assert (found["queue"] in ("billing", "delivery"), type(found["urgent"])) == (True, bool)
    assert 1 <= found["count"] <= 99


def test_rows_with_a_grammar_leave_the_others_alone(engine: TransformersEngine) -> None:
    from serving.engines import Request
    from tests.integration.serving.test_lanes import generate

    free = Request(PROMPT, SamplingParams(max_tokens=12))
    bound = Request(PROMPT, SamplingParams(max_tokens=60, json_schema='{"enum": ["red", "blue"]}'))
    mixed = generate(engine.lanes(), [free, bound, free])
    assert mixed[0].text == mixed[2].text == generate(engine.lanes(), [free])[0].text
    assert json.loads(mixed[1].text) in ("red", "blue")
    assert mixed[1].finish_reason == "stop"


@pytest.mark.parametrize(
    "params",
    [{"json_schema": '{"type": "frobnicate"}'}, {"json_schema": "{"}, {"grammar": "start: ("}, {"json_schema": "[" * 9000}],
)
def test_what_cannot_be_followed_is_refused(engine: TransformersEngine, params: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="cannot be followed"):
        text(engine, **params)
    assert text(engine)


@pytest.mark.parametrize("style", ["hermes", "llama"])
def test_a_call_can_be_enforced(engine: TransformersEngine, style: str) -> None:
    tools = [
        {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "hang_up", "parameters": {"type": "object", "properties": {}}}},
    ]
    said = text(engine, grammar=tool_calls.grammar(tools, style, "look_up"), temperature=1.0, seed=1, max_tokens=200)
    rest, (call,) = tool_calls.parse(said, style, ["look_up", "hang_up"])
    assert (rest, call.name, set(json.loads(call.arguments))) == ("", "look_up", set(SCHEMA["properties"]))


def test_a_bias_decides(engine: TransformersEngine) -> None:
    (token,) = engine._tokenizer(" refund", add_special_tokens=False)["input_ids"][:1]
    assert engine._decode([token]) * 5 == text(engine, max_tokens=5, logit_bias=((token, 100.0),))
    banned = tuple((each, -100.0) for each in range(len(engine._tokenizer)) if each != token)
    assert text(engine, max_tokens=3, logit_bias=banned) == engine._decode([token]) * 3
    with pytest.raises(InvalidArgument, match="there is no token"):
        engine.check_params(SamplingParams(logit_bias=((10_000, 1.0),)))


def test_penalties_keep_from_repeating(engine: TransformersEngine) -> None:
    def repeated(**params: float) -> int:
        (completion,) = engine.generate([PROMPT], SamplingParams(max_tokens=60, top_logprobs=0, **params))  # type: ignore[arg-type]
        tokens = [each.token for each in completion.logprobs]
        return len(tokens) - len(set(tokens))

    (token,) = engine._tokenizer(" refund", add_special_tokens=False)["input_ids"][:1]
    favourite = {"logit_bias": ((token, 5.0),)}
    assert repeated(**favourite, frequency_penalty=2.0) < repeated(**favourite)  # type: ignore[arg-type]


def test_top_k_of_one_is_greedy(engine: TransformersEngine) -> None:
    assert text(engine, temperature=2.0, top_k=1, seed=5) == text(engine)
    assert text(engine, temperature=2.0, top_k=50, seed=5) != text(engine)


def test_likelihoods_are_the_models_own(engine: TransformersEngine, micro_llama: Path) -> None:
    params = SamplingParams(max_tokens=6, top_logprobs=3, temperature=0.5, seed=2, presence_penalty=1.0)
    (completion,) = engine.generate([PROMPT], params)
    assert len(completion.logprobs) == completion.completion_tokens - (completion.finish_reason == "stop")
    model = AutoModelForCausalLM.from_pretrained(micro_llama).eval()
    ids = engine._codec.encode(PROMPT)
    with torch.inference_mode():
        for told in completion.logprobs:
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            values, tokens = logprobs.topk(3)
            assert [value for _, value in told.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert [token for token, _ in told.top] == [engine._decode([token]) for token in tokens.tolist()]
            likely = [token for token in range(len(logprobs)) if engine._decode([token]) == told.token]
            token = min(likely, key=lambda token: abs(float(logprobs[token]) - told.logprob))
            assert math.isclose(float(logprobs[token]), told.logprob, abs_tol=1e-4)
            ids.append(token)
