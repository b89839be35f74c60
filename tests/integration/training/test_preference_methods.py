"""Methods that learn from preferences or from raw text beat their own start on unseen rows, on one rank and on two."""

from __future__ import annotations

import math
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.model_files import check_model_folder
from tests.support.micro_model import build_micro
from tests.support.preference_rows import judged_rows, pair_rows, text_rows, write_rows
from tests.support.training_ranks import run_plan

pytestmark = pytest.mark.slow

STEPS, SAVED = 10, 4


def spec(method: str, steps: int, rate: float, **more: Any) -> dict[str, Any]:
    hyper = {"learning_rate": rate, "max_steps": steps, "batch_size": 16}
    return {"base": "micro", "method": method, "hyperparameters": hyper} | more


def plan_of(work: Path, runs: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = work / f"out-{world_size}"
    out.mkdir()
    paths = {"base": str(work / "base"), "data": str(work / "pairs"), "out": str(out)}
    return {"port": port, "world_size": world_size, "runs": runs} | paths


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    build_micro(folder / "base")
    write_rows(folder / "pairs", pair_rows, 256, 64)
    write_rows(folder / "judged", judged_rows, 256, 64)
    write_rows(folder / "texts", text_rows, 64, 16)
    return folder


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, dict[str, Any]]:
    uri = (work / "storage").as_uri()
    saving = {"checkpoints": {"every_steps": SAVED, "keep": 9}}
    strong = {"lora": {"alpha": 64}, "preference": {"beta": 1.0}}
    texts = spec("pretrain", 40, 5e-3)
    texts["hyperparameters"]["max_length"] = 32
    runs = [
        {"name": "dpo", "spec": spec("dpo", 60, 5e-3)},
        {"name": "adapter", "spec": spec("dpo", 80, 5e-3, **strong)},
        {"name": "kto", "spec": spec("kto", 60, 5e-3, **strong), "data": str(work / "judged")},
        {"name": "kto-full", "spec": spec("kto", 6, 5e-3), "data": str(work / "judged")},
        {"name": "reward", "spec": spec("reward", 60, 5e-3)},
        {"name": "pretrain", "spec": texts, "data": str(work / "texts")},
        {"name": "pretrain-adapter", "spec": texts | {"lora": {}}, "data": str(work / "texts")},
        {"name": "smooth", "spec": spec("dpo", 4, 5e-3, preference={"loss": "robust", "label_smoothing": 0.1})},
        {"name": "whole", "spec": spec("dpo", STEPS, 5e-3, **saving), "storage": uri},
        {"name": "resumed", "spec": spec("dpo", STEPS, 5e-3, **saving), "resume": f"{uri}/checkpoints/step-{SAVED}"},
    ]
    return run_plan(plan_of(work, runs, 1), work)


@pytest.fixture(scope="module")
def together(work: Path) -> dict[str, dict[str, Any]]:
    runs = [
        {"name": f"{name}-zero{stage}", "spec": spec("dpo", 6, rate, workers=2, sharding={"zero_stage": stage}, **more)}
        for name, rate, more in (("full", 5e-3, {}), ("adapter", 5e-2, {"lora": {"rank": 8}}))
        for stage in (3, 2)
    ]
    for method, data in (("kto", "judged"), ("reward", "pairs"), ("pretrain", "texts")):
        for stage in (3, 2):
            settings = spec(method, 6, 5e-3, workers=2, sharding={"zero_stage": stage})
            runs.append({"name": f"{method}-zero{stage}", "spec": settings, "data": str(work / data)})
    return run_plan(plan_of(work, runs, 2), work)


def test_chosen_answers_become_the_likelier_ones_on_unseen_prompts(alone: dict[str, dict[str, Any]]) -> None:
    for name in ("dpo", "adapter"):
        figures = alone[name]["metrics"]
        assert figures["before_preference_accuracy"] < 0.65
        assert figures["preference_accuracy"] > figures["before_preference_accuracy"] + 0.15, name
        assert figures["reward_accuracy"] > 0.75
        assert figures["reward_margin"] > 0.5
        assert figures["before_reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert (alone["dpo"]["kind"], alone["adapter"]["kind"]) == ("full", "adapter")


def test_the_figures_of_a_step_tell_margin_and_accuracy(alone: dict[str, dict[str, Any]]) -> None:
    last = alone["dpo"]["figures"][-1]
    assert last["reward_margin"] > 0.2
    assert last["reward_accuracy"] > 0.6


def test_a_loss_that_expects_wrong_pairs_is_another_one(alone: dict[str, dict[str, Any]]) -> None:
    assert alone["smooth"]["losses"][1:] != pytest.approx(alone["dpo"]["losses"][1:4], abs=1e-4)


def test_what_it_trained_is_served(alone: dict[str, dict[str, Any]], work: Path) -> None:
    from serving.engines import load_engine

    for name, base in (("dpo", None), ("adapter", work / "base")):
        engine = load_engine(work / "out-1" / name, base)
        right = 0
        rows = pair_rows(64, seed=1)
        for row in rows:
            prompt = engine.render([{"role": "user", "content": row.prompt or row.messages[0].content}])  # type: ignore[index]
            chosen = row.completion or row.messages[-1].content  # type: ignore[index]
            good, bad = engine.score([(prompt, chosen), (prompt, row.rejected)])
            right += good.logprob > bad.logprob
        assert right / len(rows) == pytest.approx(alone[name]["metrics"]["preference_accuracy"], abs=0.02), name


def test_a_run_that_goes_on_is_the_same_to_the_bit(alone: dict[str, dict[str, Any]], work: Path) -> None:
    whole, resumed = alone["whole"], alone["resumed"]
    assert whole["losses"][SAVED:] == resumed["losses"]
    first, second = (work / "out-1" / name / "model.safetensors" for name in ("whole", "resumed"))
    assert first.read_bytes() == second.read_bytes()
    kept = [name for name in whole["metrics"] if name.startswith("before_")]
    assert kept
    assert {name: resumed["metrics"][name] for name in kept} == {name: whole["metrics"][name] for name in kept}


def test_what_is_desired_gains_on_what_is_not(alone: dict[str, dict[str, Any]]) -> None:
    figures = alone["kto"]["metrics"]
    assert figures["before_reward_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert figures["reward_accuracy"] > 0.8
    assert figures["reward_margin"] > 0.5
    assert "kl" in alone["kto"]["figures"][-1]
    assert (alone["kto"]["kind"], alone["kto-full"]["kind"]) == ("adapter", "full")


def test_a_reward_model_tells_the_better_answer_far_more_often_than_chance(alone: dict[str, dict[str, Any]], work: Path) -> None:
    from agents.training.rewards.base import Answer
    from agents.training.rewards.reward_model import RewardModel

    figures = alone["reward"]["metrics"]
    assert alone["reward"]["kind"] == "reward"
    assert figures["reward_accuracy"] > max(0.5, figures["before_reward_accuracy"]) + 0.2
    rows = [row for row in pair_rows(64, seed=1) if row.messages is None]
    model = RewardModel(work / "out-1" / "reward")
    good, bad = (
        model.score([Answer(row.prompt, answer(row), messages=({"role": "user", "content": row.prompt},)) for row in rows])
        for answer in (lambda row: row.completion, lambda row: row.rejected)
    )
    right = sum(a > b for a, b in zip(good, bad, strict=True)) / len(rows)
    assert right == pytest.approx(figures["reward_accuracy"], abs=0.15)
    assert right > 0.7


def test_raw_text_is_foreseen_better_than_by_how_often_words_occur(alone: dict[str, dict[str, Any]], work: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    train, test = ([tokenizer(row.completion)["input_ids"] for row in text_rows(n, seed)] for n, seed in ((64, 0), (16, 1)))
    counts = Counter(token for ids in train for token in ids)
    seen = [token for ids in test for token in ids[1:]]
    unigram = math.exp(-sum(math.log(counts[token] / counts.total()) for token in seen) / len(seen))
    figures = alone["pretrain"]["metrics"]
    assert figures["before_perplexity"] > 100
    assert figures["perplexity"] < unigram / 2
    adapter = alone["pretrain-adapter"]
    assert adapter["kind"] == "adapter"
    assert adapter["metrics"]["perplexity"] < adapter["metrics"]["before_perplexity"] * 0.75


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["full", "adapter", "kto", "reward", "pretrain"])
def test_two_ranks_learn_the_same_in_every_stage(together: dict[str, dict[str, Any]], work: Path, kind: str) -> None:
    two, three = together[f"{kind}-zero2"], together[f"{kind}-zero3"]
    assert two["losses"] == pytest.approx(three["losses"], abs=1e-4)
    assert two["losses"][-1] < two["losses"][0]
    for stage, run in ((2, two), (3, three)):
        assert run["engine"]["engine_class"] == "deepspeed.runtime.engine.DeepSpeedEngine"
        assert run["engine"]["zero_stage"] == stage
        folder = work / "out-2" / f"{kind}-zero{stage}"
        assert check_model_folder(folder).kind == ("adapter" if kind == "adapter" else "full")
