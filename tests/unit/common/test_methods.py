"""What is wrong with a method's settings is told by field, before anything runs; and which rows it learns from."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import json_format

from common import methods
from common.errors import InvalidArgument
from luthier.v1 import dataset_pb2, training_pb2

EXACT = {"exact_match": {}}


def _spec(method: str, **fields: Any) -> training_pb2.FinetuneSpec:
    return json_format.ParseDict({"method": method} | fields, training_pb2.FinetuneSpec())


def _told(spec: training_pb2.FinetuneSpec) -> dict[str, str]:
    return {violation.field: violation.description for violation in methods.violations(spec, "f.")}


@pytest.mark.parametrize("method", [name for name, facts in methods.METHODS.items() if facts.settings != "reinforcement"])
def test_defaults_are_fine(method: str) -> None:
    assert not _told(_spec(method))


@pytest.mark.parametrize("beta", [math.nan, math.inf, 0.0, -1.0])
def test_a_beta_that_is_no_positive_number_is_refused(beta: float) -> None:
    spec = _spec("dpo")
    spec.preference.beta = beta
    assert list(_told(spec)) == ["f.preference.beta"]


@pytest.mark.parametrize(
    ("method", "given", "field"),
    [
        ("dpo", {"loss": "warp"}, "loss"),
        ("kto", {"loss": "sigmoid"}, "loss"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("dpo", {"label_smoothing": 0.1, "loss": "hinge"}, "label_smoothing"),
        ("kto", {"label_smoothing": 0.1}, "label_smoothing"),
        ("dpo", {"desirable_weight": 1.0}, "desirable_weight"),
        ("kto", {"undesirable_weight": 0.0}, "undesirable_weight"),
    ],
)
def test_settings_of_preferences(method: str, given: dict[str, Any], field: str) -> None:
    assert list(_told(_spec(method, preference=given))) == [f"f.preference.{field}"]


@pytest.mark.parametrize("name", ["preference", "reinforcement"])
def test_settings_that_a_method_does_not_take_are_not_ignored(name: str) -> None:
    assert "takes none" in _told(_spec("full", **{name: {}}))[f"f.{name}"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"rewards": []}, "rewards"),
        ({"rewards": [EXACT] * 2}, "rewards[1].name"),
        ({"rewards": [{}]}, "rewards[0]"),
        ({"rewards": [EXACT | {"name": "Bad Name"}]}, "rewards[0].name"),
        ({"rewards": [EXACT | {"weight": "NaN"}]}, "rewards[0].weight"),
        ({"rewards": [{"regex": {}}]}, "rewards[0].regex.pattern"),
        ({"rewards": [{"regex": {"pattern": r"(?=a)"}}]}, "rewards[0].regex.pattern"),
        ({"rewards": [{"regex": {"pattern": r"(a)\1"}}]}, "rewards[0].regex.pattern"),
        ({"rewards": [{"json_schema": {"schema": "{"}}]}, "rewards[0].json_schema.schema"),
        ({"rewards": [{"json_schema": {"schema": "[]"}}]}, "rewards[0].json_schema.schema"),
        ({"rewards": [{"numeric": {"absolute_tolerance": -1}}]}, "rewards[0].numeric.absolute_tolerance"),
        ({"rewards": [{"reward_model": {}}]}, "rewards[0].reward_model.model"),
        ({"rewards": [{"function": {"source": "x = 1"}}]}, "rewards[0].function.source"),
        (
            {"rewards": [{"function": {"source": "def reward(p, c, a): return 1", "timeout_seconds": 0}}]},
            "rewards[0].function.timeout_seconds",
        ),
        ({"rewards": [EXACT], "num_generations": 3}, "num_generations"),
        ({"rewards": [EXACT], "num_generations": 1}, "num_generations"),
        ({"rewards": [EXACT], "temperature": 0}, "temperature"),
        ({"rewards": [EXACT], "beta": "NaN"}, "beta"),
        ({"rewards": [EXACT], "max_completion_length": 512}, "max_completion_length"),
    ],
)
def test_settings_of_reinforcement(given: dict[str, Any], field: str) -> None:
    assert list(_told(_spec("grpo", reinforcement=given))) == [f"f.reinforcement.{field}"]


def test_answers_that_do_not_divide_the_step_are_told_with_the_numbers() -> None:
    spec = _spec("rloo", workers=3, hyperparameters={"batch_size": 2}, reinforcement={"rewards": [EXACT], "num_generations": 4})
    assert "4 answers to a prompt do not divide the 6 of a step" in _told(spec)["f.reinforcement.num_generations"]


def test_every_reward_of_the_contract_can_be_given() -> None:
    rewards = [
        EXACT,
        {"regex": {"pattern": r"^the answer is {answer}\b"}},
        {"json_schema": {"schema": '{"type": "object"}'}},
        {"numeric": {}},
        {"similarity": {}},
        {"reward_model": {"model": "judge@1"}},
        {"function": {"source": "def reward(prompt, completion, answer):\n    return 1.0"}},
    ]
    assert not _told(_spec("grpo", reinforcement={"rewards": rewards}))


def test_weights_in_four_bits_are_not_spread() -> None:
    assert list(_told(_spec("qlora", sharding={"zero_stage": 3}))) == ["f.sharding.zero_stage"]


def test_a_row_alone_tells_nothing_of_a_divergence() -> None:
    assert list(_told(_spec("kto", hyperparameters={"batch_size": 1}))) == ["f.hyperparameters.batch_size"]


@pytest.mark.parametrize(
    ("method", "adapter", "reference"),
    [("dpo", True, False), ("dpo", False, True), ("grpo", False, False), ("rloo", False, True), ("full", False, False)],
)
def test_what_is_held_in_memory(method: str, adapter: bool, reference: bool) -> None:
    spec = _spec(method, **({"lora": {}} if adapter else {}))
    assert (methods.trains_adapter(spec), methods.holds_reference(spec)) == (adapter, reference)


@pytest.mark.parametrize(
    ("method", "shape", "says"),
    [
        ("dpo", dataset_pb2.ROW_SHAPE_CHAT, "method dpo learns from prompts with a chosen and a rejected answer"),
        ("full", dataset_pb2.ROW_SHAPE_PREFERENCE, "the data set holds prompts with a chosen and a rejected answer"),
        ("pretrain", dataset_pb2.ROW_SHAPE_TEXT_LABEL, "learns from texts"),
    ],
)
def test_rows_of_another_shape_are_refused(method: str, shape: int, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        methods.check_rows(method, shape, [], "job.finetune.dataset")
    assert caught.value.violations[0].field == "job.finetune.dataset"


@pytest.mark.parametrize("labels", [[], ["true"], ["false"], ["good", "bad"]])
def test_judged_answers_need_both_labels(labels: list[str]) -> None:
    shape = dataset_pb2.ROW_SHAPE_PROMPT_COMPLETION
    methods.check_rows("kto", shape, ["false", "true"], "d")
    with pytest.raises(InvalidArgument, match="needs rows of both labels"):
        methods.check_rows("kto", shape, labels, "d")
