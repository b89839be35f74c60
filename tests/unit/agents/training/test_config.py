"""From a FinetuneSpec to settings: every default, and every number that is refused by the name of its field."""

from __future__ import annotations

import math

import pytest
from google.protobuf import json_format

from agents.training.config import TrainConfig
from common.errors import InvalidArgument
from luthier.v1 import training_pb2


def _spec(**fields: object) -> training_pb2.FinetuneSpec:
    return json_format.ParseDict({"base": "org/model", "dataset": "d@1", "method": "full"} | fields, training_pb2.FinetuneSpec())


def test_defaults_are_those_of_the_contract() -> None:
    config = TrainConfig.of(_spec())
    assert (config.epochs, config.max_steps, config.batch_size, config.gradient_accumulation) == (3.0, -1, 8, 1)
    assert (config.max_length, config.warmup_ratio, config.weight_decay, config.max_grad_norm) == (512, 0.03, 0.0, 1.0)
    assert (config.scheduler, config.seed, config.zero_stage, config.workers) == ("linear", 42, 2, 1)
    assert (config.checkpoint_every, config.keep.latest, config.loss_on_all, config.precision) == (0, 2, False, "auto")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.target_modules) == (16, 32.0, 0.0, ())
    assert config.gpus_per_worker is None


@pytest.mark.parametrize(
    ("base", "method", "rate"),
    [("org/model", "full", 5e-5), ("org/model", "lora", 2e-4), ("builtin:tiny", "full", 1e-3), ("builtin:tiny", "lora", 1e-3)],
)
def test_the_learning_rate_follows_base_and_method(base: str, method: str, rate: float) -> None:
    assert TrainConfig.of(_spec(base=base, method=method)).learning_rate == rate


def test_zero_is_a_value_and_not_an_absence() -> None:
    spec = _spec(hyperparameters={"warmup_ratio": 0.0, "seed": 0}, sharding={"zero_stage": 0}, worker_resources={"gpus": 0})
    config = TrainConfig.of(spec)
    assert (config.warmup_ratio, config.seed, config.zero_stage, config.gpus_per_worker) == (0.0, 0, 0, 0.0)


def test_alpha_is_twice_the_rank() -> None:
    assert TrainConfig.of(_spec(lora={"rank": 4})).lora.alpha == 8.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hyperparameters.learning_rate", 0.0),
        ("hyperparameters.learning_rate", math.nan),
        ("hyperparameters.learning_rate", math.inf),
        ("hyperparameters.epochs", -1.0),
        ("hyperparameters.max_steps", 0),
        ("hyperparameters.batch_size", -8),
        ("hyperparameters.gradient_accumulation", 0),
        ("hyperparameters.max_length", 1),
        ("hyperparameters.warmup_ratio", 1.5),
        ("hyperparameters.warmup_ratio", math.nan),
        ("hyperparameters.weight_decay", -0.1),
        ("hyperparameters.max_grad_norm", 0.0),
        ("hyperparameters.scheduler", "magic"),
        ("hyperparameters.seed", -1),
        ("lora.rank", 0),
        ("lora.alpha", math.nan),
        ("lora.dropout", 1.0),
        ("sharding.zero_stage", 4),
        ("workers", -2),
        ("worker_resources.cpus", 0.0),
        ("worker_resources.gpus", 0.5),
        ("checkpoints.every_steps", -1),
        ("checkpoints.keep", 0),
        ("checkpoints.keep_best", 0),
        ("checkpoints.keep_every", -1),
        ("checkpoints.metric", "eval_loss"),
    ],
)
def test_a_bad_number_is_refused_by_the_name_of_its_field(field: str, value: object) -> None:
    spec = _spec()
    part, _, name = field.rpartition(".")
    setattr(getattr(spec, part) if part else spec, name, value)
    with pytest.raises(InvalidArgument) as caught:
        TrainConfig.of(spec)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_all_that_is_wrong_is_told_at_once() -> None:
    spec = _spec(hyperparameters={"learning_rate": -1, "batch_size": 0}, sharding={"zero_stage": 9})
    with pytest.raises(InvalidArgument) as caught:
        TrainConfig.of(spec)
    assert len(caught.value.violations) == 3


def test_an_unknown_enum_number_is_refused() -> None:
    spec = _spec()
    spec.precision = 99  # type: ignore[assignment]
    with pytest.raises(InvalidArgument) as caught:
        TrainConfig.of(spec)
    assert caught.value.violations[0].field == "precision"


def test_parameters_tell_what_was_used() -> None:
    used = TrainConfig.of(_spec(method="lora", hyperparameters={"max_steps": 7, "learning_rate": 0.001})).parameters()
    assert used["hyperparameters.learning_rate"] == "0.001"
    assert used["hyperparameters.max_steps"] == "7"
    assert "hyperparameters.epochs" not in used
    assert used["lora.rank"] == "16"
    assert used["lora.target_modules"] == "all-linear"
    assert "lora.rank" not in TrainConfig.of(_spec()).parameters()
