"""Methods that learn from rewards: answers to unseen prompts become worth more, and a run goes on where it was, to the bit."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest

from agents.training import local
from common.errors import InvalidArgument
from common.model_files import check_model_folder
from common.rows import Row, write_split
from tests.support.micro_model import COLOURS, build_micro
from tests.support.preference_rows import pair_rows, prompt_rows, write_rows
from tests.support.training_ranks import run_plan

pytestmark = pytest.mark.slow

STEPS, SAVED = 7, 4
COLOUR = {"regex": {"pattern": "|".join(COLOURS)}}
FUNCTION = {"function": {"source": "def reward(prompt, completion, answer):\n    return float(answer in completion)"}}


def spec(method: str, steps: int, rate: float = 1e-2, *, rewards: Any = (COLOUR,), **more: Any) -> dict[str, Any]:
    hyper = {"learning_rate": rate, "max_steps": steps, "batch_size": 64, "max_length": 64, "scheduler": "constant"}
    wanted = {"num_generations": 16, "max_completion_length": 2, "rewards": list(rewards)} | more.pop("reinforcement", {})
    return {"base": "micro", "method": method, "reinforcement": wanted, "hyperparameters": hyper | more.pop("hyper", {})} | more


def plan_of(work: Path, runs: list[dict[str, Any]], world_size: int, name: str) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = work / name
    out.mkdir()
    paths = {"base": str(work / "base"), "data": str(work / "prompts"), "out": str(out)}
    return {"port": port, "world_size": world_size, "runs": runs} | paths


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reinforcement")
    build_micro(folder / "base")
    write_rows(folder / "prompts", prompt_rows, 24, 64)
    write_rows(folder / "pairs", pair_rows, 64, 16)
    return folder


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, dict[str, Any]]:
    uri = (work / "storage").as_uri()
    # Six steps an epoch of two micro-steps each, so that the checkpoint lies in the first and the run ends in the second.
    saving = {"checkpoints": {"every_steps": SAVED, "keep": 9}, "hyper": {"batch_size": 32, "gradient_accumulation": 2}}
    judge = {"reward_model": {"model": "judge@1"}, "name": "judge", "weight": 0.1}
    mixed = [COLOUR, FUNCTION | {"weight": 0.5}, judge]
    runs = [
        {"name": "grpo", "spec": spec("grpo", 25)},
        {"name": "rloo", "spec": spec("rloo", 25, reinforcement={"beta": 0.0})},
        {"name": "adapter", "spec": spec("grpo", 60, 2e-2, lora={"alpha": 64}, reinforcement={"beta": 1e-3})},
        {
            "name": "judge",
            "data": str(work / "pairs"),
            "spec": {"base": "micro", "method": "reward", "hyperparameters": {"max_steps": 2}},
        },
        {"name": "mixed", "spec": spec("grpo", 2, rewards=mixed), "inputs": {"judge": str(work / "alone" / "judge")}},
        {"name": "whole", "spec": spec("grpo", STEPS, **saving), "storage": uri},
        {"name": "resumed", "spec": spec("grpo", STEPS, **saving), "resume": f"{uri}/checkpoints/step-{SAVED}"},
    ]
    return run_plan(plan_of(work, runs, 1, "alone"), work)


@pytest.fixture(scope="module")
def together(work: Path) -> dict[str, dict[str, Any]]:
    settings = {"workers": 2, "hyper": {"batch_size": 32}}
    runs = [
        {"name": f"grpo-zero{stage}", "spec": spec("grpo", 4, sharding={"zero_stage": stage}, **settings)} for stage in (3, 2)
    ]
    runs.append({"name": "rloo", "spec": spec("rloo", 3, lora={}, **settings)})
    return run_plan(plan_of(work, runs, 2, "together"), work)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_answers_to_unseen_prompts_become_worth_more(alone: dict[str, dict[str, Any]], name: str) -> None:
    figures = alone[name]["metrics"]
    assert figures["before_reward"] < 0.2
    assert figures["reward"] > figures["before_reward"] + 0.5
    assert figures["reward"] == pytest.approx(figures["reward_regex"])
    assert alone[name]["kind"] == "full"


def test_an_adapter_learns_from_rewards_too(alone: dict[str, dict[str, Any]]) -> None:
    run = alone["adapter"]
    first, last = ([figures["reward"] for figures in run["figures"][part]] for part in (slice(0, 10), slice(-10, None)))
    assert run["kind"] == "adapter"
    assert sum(last) > sum(first) * 1.5
    assert "kl" in run["figures"][-1]


def test_the_figures_of_a_step_tell_each_reward_length_and_what_was_cut(alone: dict[str, dict[str, Any]]) -> None:
    last = alone["mixed"]["figures"][-1]
    parts = {name: last[f"reward_{name}"] for name in ("regex", "function", "judge")}
    assert last["reward"] == pytest.approx(parts["regex"] + 0.5 * parts["function"] + 0.1 * parts["judge"], abs=1e-4)
    assert 0 < last["completion_length"] <= 2
    assert 0 <= last["completions_clipped"] <= 1
    assert parts["judge"] != 0


def test_a_run_that_goes_on_is_the_same_to_the_bit(alone: dict[str, dict[str, Any]], work: Path) -> None:
    whole, resumed = alone["whole"], alone["resumed"]
    names = ("loss", "grad_norm", "reward", "entropy", "completion_length")
    told = [[{name: step[name] for name in names} for step in run["figures"]] for run in (whole, resumed)]
    assert len(told[0]) == STEPS
    assert told[0][SAVED:] == told[1]
    first, second = (work / "alone" / name / "model.safetensors" for name in ("whole", "resumed"))
    assert first.read_bytes() == second.read_bytes()
    assert resumed["metrics"]["before_reward"] == whole["metrics"]["before_reward"]
    assert resumed["metrics"]["reward"] == whole["metrics"]["reward"]


@pytest.mark.chaos
def test_two_ranks_learn_from_rewards_on_sharded_models(together: dict[str, dict[str, Any]], work: Path) -> None:
    for stage in (2, 3):
        run = together[f"grpo-zero{stage}"]
        assert run["engine"]["zero_stage"] == stage
        assert run["engine"]["world_size"] == 2
        assert check_model_folder(work / "together" / f"grpo-zero{stage}").kind == "full"
        assert any(step["grad_norm"] > 0 for step in run["figures"])
    assert check_model_folder(work / "together" / "rloo").kind == "adapter"


def _run(work: Path, tmp_path: Path, settings: dict[str, Any], rows: list[Row] | None = None) -> None:
    from google.protobuf import json_format

    from luthier.v1 import training_pb2

    data = work / "prompts"
    if rows is not None:
        data = tmp_path / "data"
        data.mkdir()
        write_split(rows, data / "train.parquet")
    parsed = json_format.ParseDict(settings, training_pb2.FinetuneSpec())
    local.train_locally(parsed, work / "base", data, tmp_path / "out", use_gpu=False, reporter=local.SilentReporter())


@pytest.mark.parametrize(
    ("settings", "rows", "says"),
    [
        ({}, [Row(prompt="cat", line=3)] * 8, "8 of 8 rows of the split 'train' have no answer.*'exact_match'.*line 3"),
        ({}, [Row(prompt="cat", completion="dog", line=3)], "a step takes 4 prompts, 16 answers each, train has 1"),
        (
            {},
            [Row(prompt="cat " * 100, completion="dog", line=3)] * 4,
            "none of the 4 prompts of 'train' leaves room for an answer",
        ),
        (
            {"rewards": [{"function": {"source": "def reward(p, c, a):\n    return {}[a]"}}]},
            None,
            r"'function' failed on the row at line \d+: it raised KeyError: 'red' \(line 2 of its source\)",
        ),
    ],
)
def test_rows_and_functions_that_cannot_be_used_are_named(
    work: Path, tmp_path: Path, settings: dict[str, Any], rows: list[Row] | None, says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        _run(
            work,
            tmp_path,
            spec("grpo", 1, **({"rewards": [{"exact_match": {}}], "evaluation": {"disabled": True}} | settings)),
            rows,
        )


def test_the_order_of_prompts_is_a_function_of_seed_and_epoch() -> None:
    from agents.training.methods.reinforcement import PromptOrder

    def order(*epochs: int) -> list[int]:
        sampler = PromptOrder(range(12), 2, 3, 1, shuffle=True, seed=random.Random(0).randrange(99))
        seen: list[int] = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            seen = list(sampler)
        return seen

    assert order(0, 1) == order(1) != order(0)
