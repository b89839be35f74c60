"""What answers are worth, and that no pattern, schema or text can hold a run up."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf import json_format

from agents.training.rewards.base import Answer, check_references, make_rewards
from agents.training.rewards.numeric import last_number
from common.errors import InvalidArgument
from luthier.v1 import training_pb2


def _score(settings: dict[str, Any], text: str, reference: str = "") -> float:
    (named,) = make_rewards([json_format.ParseDict(settings, training_pb2.Reward())], {}, "cpu")
    (score,) = named.reward.score([Answer("p", text, reference, 7)])
    return score


@pytest.mark.parametrize(
    ("settings", "text", "reference", "worth"),
    [
        ({"exact_match": {}}, " yes\n", "yes", 1.0),
        ({"exact_match": {}}, "Yes", "yes", 0.0),
        ({"exact_match": {"ignore_case": True}}, "Yes", "yes", 1.0),
        ({"regex": {"pattern": r"\bcat\b"}}, "the cat sat", "", 1.0),
        ({"regex": {"pattern": r"^cat"}}, "the cat sat", "", 0.0),
        ({"regex": {"pattern": r"= {answer}$"}}, "x = 1.5", "1.5", 1.0),
        ({"regex": {"pattern": r"= {answer}$"}}, "x = 1x5", "1.5", 0.0),
        ({"numeric": {}}, "3 and 4 make 7.", "7", 1.0),
        ({"numeric": {}}, "it is 1,234", "1234", 1.0),
        ({"numeric": {"absolute_tolerance": 0.5}}, "7.4", "7", 1.0),
        ({"numeric": {"relative_tolerance": 0.01}}, "1011", "1000", 0.0),
        ({"numeric": {}}, "none", "7", 0.0),
        ({"similarity": {}}, "The cat sat.", "the cat ran", 2 / 3),
        ({"similarity": {}}, "", "the cat", 0.0),
    ],
)
def test_what_an_answer_is_worth(settings: dict[str, Any], text: str, reference: str, worth: float) -> None:
    assert _score(settings, text, reference) == pytest.approx(worth)


SCHEMA = '{"type": "object", "required": ["n"], "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}'


@pytest.mark.parametrize(
    ("text", "worth"),
    [('{"n": 1}', 1.0), ('```json\n{"n": 1}\n```', 1.0), ('{"n": "1"}', 0.0), ("{", 0.0), ("[" * 100_000, 0.0)],
)
def test_json_of_a_form(text: str, worth: float) -> None:
    assert _score({"json_schema": {"schema": SCHEMA}}, text) == worth


@pytest.mark.parametrize(
    "schema",
    ['{"type": "banana"}', '{"$ref": "http://127.0.0.1:9/x"}', '{"$ref": "#/nowhere"}', '{"pattern": "(a)\\\\1"}'],
)
def test_a_schema_that_cannot_be_used_fails_before_anything_is_judged(schema: str) -> None:
    with pytest.raises(InvalidArgument, match="no JSON schema that can be used"):
        make_rewards([json_format.ParseDict({"json_schema": {"schema": schema}}, training_pb2.Reward())], {}, "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"regex": {"pattern": r"^(a+)+$"}},
        {"json_schema": {"schema": '{"pattern": "^(a+)+$"}'}},
        {"json_schema": {"schema": '{"patternProperties": {"^(a+)+$": {"type": "number"}}}'}},
    ],
)
def test_a_pattern_that_explodes_elsewhere_takes_no_time_here(settings: dict[str, Any]) -> None:
    bad = "a" * 50_000 + "!"
    text = bad if "regex" in settings else f'"{bad}"' if "patternP" not in str(settings) else f'{{"{bad}": 1}}'
    began = time.monotonic()
    _score(settings, text)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("text", "number"), [("-1.5e3 units", -1500.0), ("a .5", 0.5), ("1e999", None), ("x", None)])
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_a_row_whose_answer_holds_no_number_is_named() -> None:
    with pytest.raises(InvalidArgument, match="row at line 7 holds no number"):
        _score({"numeric": {}}, "1", "none")


def test_rows_without_an_answer_are_named_where_one_is_compared_with() -> None:
    rewards = make_rewards([training_pb2.Reward(exact_match=training_pb2.ExactMatchReward())], {}, "cpu")
    check_references(rewards, [(1, "a")], "train")
    with pytest.raises(InvalidArgument) as caught:
        check_references(rewards, [(1, "a"), (2, ""), (5, "")], "train")
    assert [violation.field for violation in caught.value.violations] == ["train line 2", "train line 5"]
    free = make_rewards([json_format.ParseDict({"regex": {"pattern": "a"}}, training_pb2.Reward())], {}, "cpu")
    check_references(free, [(2, "")], "train")
