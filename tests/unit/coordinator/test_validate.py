"""Bad fields of a job are named, all of them."""

from __future__ import annotations

import math

import pytest

from common.errors import InvalidArgument
from coordinator.jobs.validate import validate
from luthier.v1 import job_pb2, sweep_pb2, training_pb2

KNOWN = frozenset({"full", "lora"})


def finetune(**fields: object) -> job_pb2.Job:
    spec = {"base": "builtin:tiny", "dataset": "tickets", "method": "full"} | fields
    return job_pb2.Job(finetune=training_pb2.FinetuneSpec(**spec))  # type: ignore[arg-type]


def fields_of(job: job_pb2.Job) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        validate(job, KNOWN)
    return sorted(violation.field for violation in caught.value.violations)


def test_a_plain_job_is_fine() -> None:
    validate(finetune(), KNOWN)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-3, 0.0])
def test_a_learning_rate_has_to_be_a_positive_number(value: float) -> None:
    job = finetune(hyperparameters=training_pb2.Hyperparameters(learning_rate=value))
    assert fields_of(job) == ["job.finetune.hyperparameters.learning_rate"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", -1),
        ("batch_size", 0),
        ("epochs", math.nan),
        ("warmup_ratio", 1.5),
        ("max_grad_norm", 0),
        ("scheduler", "warp"),
    ],
)
def test_other_settings(name: str, value: object) -> None:
    job = finetune(hyperparameters=training_pb2.Hyperparameters(**{name: value}))  # type: ignore[arg-type]
    assert fields_of(job) == [f"job.finetune.hyperparameters.{name}"]


def test_all_bad_fields_at_once() -> None:
    job = finetune(method="magic", base="", workers=-1, output_model="../x", sharding=training_pb2.Sharding(zero_stage=4))
    job.priority = 1000
    job.time_limit.seconds = -5
    assert fields_of(job) == [
        "job.finetune.base",
        "job.finetune.method",
        "job.finetune.output_model",
        "job.finetune.sharding.zero_stage",
        "job.finetune.workers",
        "job.priority",
        "job.time_limit",
    ]


def test_a_job_says_what_to_do() -> None:
    assert fields_of(job_pb2.Job(display_name="x")) == ["job"]


def test_the_kind_agrees_with_the_spec() -> None:
    job = finetune()
    job.kind = "sweep"
    assert fields_of(job) == ["job.kind"]


def test_an_adapter_setting_without_an_adapter_is_refused() -> None:
    assert fields_of(finetune(lora=training_pb2.LoraConfig(rank=4))) == ["job.finetune.lora"]


def test_an_unknown_enum_number_is_named() -> None:
    assert fields_of(finetune(precision=77)) == ["job.finetune.precision"]


def test_a_sweep_names_fields_that_cannot_vary_and_ranges_that_are_none() -> None:
    dimension = sweep_pb2.SearchDimension
    job = job_pb2.Job(
        sweep=sweep_pb2.SweepSpec(
            finetune=finetune().finetune,
            trials=4,
            space={
                "hyperparameters.learning_rate": dimension(log_uniform=sweep_pb2.LogUniformRange(min=0, max=1)),
                "hyperparameters.batch_size": dimension(integer=sweep_pb2.IntegerRange(min=8, max=4)),
                "hyperparameters.magic": dimension(choice=sweep_pb2.Choice(values=["1"])),
                "base": dimension(choice=sweep_pb2.Choice(values=["a"])),
                "lora.rank": dimension(),
            },
        )
    )
    assert fields_of(job) == [
        "job.sweep.space.base",
        "job.sweep.space.hyperparameters.batch_size",
        "job.sweep.space.hyperparameters.learning_rate",
        "job.sweep.space.hyperparameters.magic",
        "job.sweep.space.lora.rank",
    ]


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ({"every_steps": 5, "keep": 1, "keep_best": 2, "keep_every": 100, "metric": "eval_loss"}, []),
        ({"keep": 0}, ["keep"]),
        ({"keep_best": 0, "keep_every": -1}, ["keep_best", "keep_every"]),
        ({"keep_best": 1, "metric": "beauty"}, ["metric"]),
        ({"metric": "loss"}, ["metric"]),
    ],
)
def test_a_keep_policy_keeps_something(policy: dict[str, object], fields: list[str]) -> None:
    job = finetune(checkpoints=training_pb2.CheckpointPolicy(**policy))  # type: ignore[arg-type]
    if fields:
        assert fields_of(job) == [f"job.finetune.checkpoints.{name}" for name in fields]
    else:
        validate(job, KNOWN)


def test_a_run_may_stand_still_for_a_second_at_least() -> None:
    job = finetune()
    job.hang_timeout.FromMilliseconds(999)
    assert fields_of(job) == ["job.hang_timeout"]
    job.hang_timeout.FromMilliseconds(1000)
    validate(job, KNOWN)
