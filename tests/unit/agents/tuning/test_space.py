"""What may vary in a sweep, and how it is read."""

import subprocess
import sys

import pytest
from google.protobuf import json_format

from agents.tuning.space import Search, as_text, check_values, grid_size, settle, with_values
from common.errors import InvalidArgument
from luthier.v1 import sweep_pb2, training_pb2


def sweep(space, **fields):
    return json_format.ParseDict({"space": space, **fields}, sweep_pb2.SweepSpec())


def refused(space, **fields):
    with pytest.raises(InvalidArgument) as caught:
        Search.of(sweep(space, **fields))
    return {violation.field: violation.description for violation in caught.value.violations}


LR = {"hyperparameters.learning_rate": {"log_uniform": {"min": 1e-5, "max": 1e-3}}}


def test_values_are_of_the_type_of_their_field():
    search = Search.of(
        sweep(
            {
                "hyperparameters.batch_size": {"choice": {"values": ["4", "8"]}},
                "hyperparameters.learning_rate": {"choice": {"values": ["1e-3", "1"]}},
                "hyperparameters.scheduler": {"choice": {"values": ["linear"]}},
                "precision": {"choice": {"values": ["PRECISION_FP32"]}},
                "lora.rank": {"integer": {"min": 2, "max": 8}},
            },
            trials=3,
        )
    )
    values = {one.path: one.values for one in search.dimensions}
    assert values["hyperparameters.batch_size"] == (4, 8)
    assert [type(value) for value in values["hyperparameters.batch_size"]] == [int, int]
    assert [type(value) for value in values["hyperparameters.learning_rate"]] == [float, float]
    assert values["precision"] == ("PRECISION_FP32",)
    assert (search.algorithm, search.metric, search.maximize, search.seed, search.grace) == (
        "random",
        "eval_loss",
        False,
        42,
        0.25,
    )
    assert search.concurrent == 1


def test_drawn_values_land_in_their_fields_and_leave_the_rest():
    spec = training_pb2.FinetuneSpec(base="builtin:tiny")
    spec.hyperparameters.epochs = 2
    changed = with_values(spec, {"hyperparameters.learning_rate": 0.01, "lora.rank": 4, "precision": "PRECISION_BF16"})
    assert changed.hyperparameters.learning_rate == 0.01
    assert changed.hyperparameters.epochs == 2
    assert changed.lora.rank == 4
    assert changed.precision == training_pb2.PRECISION_BF16
    assert not spec.hyperparameters.HasField("learning_rate")


def test_a_grid_counts_itself():
    space = {
        "hyperparameters.batch_size": {"choice": {"values": ["4", "8"]}},
        "lora.rank": {"choice": {"values": ["2", "4", "8"]}},
    }
    search = Search.of(sweep(space, algorithm="SWEEP_ALGORITHM_GRID", max_concurrent_trials=20))
    assert (search.trials, grid_size(search.dimensions), search.concurrent) == (6, 6, 6)
    said = refused(space, algorithm="SWEEP_ALGORITHM_GRID", trials=4)
    assert "the grid has 6 combinations" in said["job.sweep.trials"]


def test_a_grid_of_a_range_is_refused():
    said = refused(LR, algorithm="SWEEP_ALGORITHM_GRID")
    assert "a grid needs a choice" in said["job.sweep.space.hyperparameters.learning_rate"]


def test_more_of_accuracy_is_better_unless_told_otherwise():
    assert Search.of(sweep(LR, trials=1, metric="accuracy")).maximize
    assert not Search.of(sweep(LR, trials=1, metric="accuracy", maximize=False)).maximize


@pytest.mark.parametrize(
    ("path", "dimension", "said"),
    [
        ("learning_rate", {"uniform": {"min": 0, "max": 1}}, "no single value of FinetuneSpec"),
        ("hyperparameters", {"uniform": {"min": 0, "max": 1}}, "no single value of FinetuneSpec"),
        ("nothing.here", {"uniform": {"min": 0, "max": 1}}, "no field of FinetuneSpec"),
        ("hyperparameters.lr", {"uniform": {"min": 0, "max": 1}}, "there are batch_size, epochs"),
        ("lora.target_modules", {"choice": {"values": ["q_proj"]}}, "no single value"),
        ("base", {"choice": {"values": ["builtin:tiny"]}}, "the same for all trials"),
        ("workers", {"choice": {"values": ["1"]}}, "the same for all trials"),
        ("evaluation.max_rows", {"choice": {"values": ["1"]}}, "the same for all trials"),
        ("hyperparameters.batch_size", {"uniform": {"min": 1, "max": 9}}, "whole numbers; use integer"),
        ("hyperparameters.batch_size", {"choice": {"values": ["4", "x"]}}, "'x' is not a whole number"),
        ("hyperparameters.batch_size", {"choice": {"values": ["4.5"]}}, "'4.5' is not a whole number"),
        ("hyperparameters.learning_rate", {"choice": {"values": ["nan"]}}, "not a finite number"),
        ("hyperparameters.learning_rate", {"choice": {"values": []}}, "empty choice"),
        ("hyperparameters.learning_rate", {"choice": {"values": ["0.1", "1e-1"]}}, "twice"),
        ("hyperparameters.learning_rate", {"uniform": {"min": 1, "max": 1}}, "min 1.0 is not below max 1.0"),
        ("hyperparameters.learning_rate", {"uniform": {"min": "NaN", "max": 1}}, "not below"),
        ("hyperparameters.learning_rate", {"log_uniform": {"min": 0, "max": 1}}, "not above 0"),
        ("hyperparameters.learning_rate", {}, "says no values"),
        ("hyperparameters.scheduler", {"integer": {"min": 0, "max": 1}}, "takes no numbers"),
        ("precision", {"choice": {"values": ["bf16"]}}, "none of PRECISION_FP32, PRECISION_BF16"),
        ("precision", {"choice": {"values": ["PRECISION_UNSPECIFIED"]}}, "none of"),
    ],
)
def test_bad_dimensions_are_named(path, dimension, said):
    assert said in refused({path: dimension}, trials=1)[f"job.sweep.space.{path}"]


def test_everything_that_is_wrong_is_named_at_once():
    said = refused(
        {}, trials=0, metric="f1", grace=2.0, seed=-1, max_concurrent_trials=-1, finetune={"evaluation": {"disabled": True}}
    )
    assert set(said) == {
        "job.sweep.space",
        "job.sweep.metric",
        "job.sweep.grace",
        "job.sweep.seed",
        "job.sweep.max_concurrent_trials",
        "job.sweep.finetune.evaluation.disabled",
    }
    assert set(refused(LR, trials=0)) == set(refused(LR, trials=1001)) == {"job.sweep.trials"}


def test_values_as_text():
    assert [as_text(value) for value in (0.00012345678, 8, 1.0, "linear")] == ["0.000123457", "8", "1", "linear"]


def test_importing_it_brings_in_neither_ray_nor_torch():
    code = "import sys, agents.tuning.space; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_values_that_the_fine_tune_refuses_are_named_before_a_trial_starts():
    spec = sweep(
        {
            "hyperparameters.batch_size": {"choice": {"values": ["0", "8"]}},
            "lora.rank": {"integer": {"min": 1, "max": 5000}},
            "hyperparameters.warmup_ratio": {"uniform": {"min": 0, "max": 2}},
            "hyperparameters.max_steps": {"integer": {"min": 1, "max": 2**40}},
        },
        trials=1,
        finetune={"base": "builtin:tiny", "method": "full"},
    )
    with pytest.raises(InvalidArgument) as caught:
        check_values(spec.finetune, Search.of(spec))
    said = {violation.field.rpartition(".")[2]: violation.description for violation in caught.value.violations}
    assert said["batch_size"].startswith("0: has to be at least 1")
    assert said["rank"].startswith("5000: has to be between 1 and 1024")
    assert said["warmup_ratio"].startswith("2: ")
    assert said["max_steps"].startswith(str(2**40))


def test_a_fine_tune_that_is_wrong_by_itself_is_told_as_it_is():
    spec = sweep(LR, trials=1, finetune={"hyperparameters": {"batch_size": -1}})
    with pytest.raises(InvalidArgument) as caught:
        check_values(spec.finetune, Search.of(spec))
    assert [violation.field for violation in caught.value.violations] == ["hyperparameters.batch_size"]


def test_a_trial_runs_with_the_number_that_it_shows():
    assert settle({"b": 0.000123456789, "a": 8}) == {"a": 8, "b": 0.000123457}
