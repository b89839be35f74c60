"""Adapters of every kind learn, and answer from the engine that serves as they did when they were trained."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from agents.training.config import TrainConfig
from agents.training.context import TrainContext
from agents.training.local import SilentReporter
from common.errors import FailedPrecondition
from luthier.v1 import training_pb2
from tests.support.micro_model import build_data, build_micro, colour_rows
from tests.support.training_ranks import run_plan

VARIANTS = ("lora", "rslora", "dora")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    build_micro(folder / "base")
    build_data(folder / "data")
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    judged = {"every_steps": 12, "keep_best": 1, "metric": "eval_loss"}
    hyper = {"learning_rate": 1e-2, "max_steps": 12, "batch_size": 8}

    def run(name: str, **lora: Any) -> dict[str, Any]:
        method = name.partition("-")[0]
        spec = {"base": "micro", "method": method, "lora": {"rank": 4} | lora, "hyperparameters": hyper, "checkpoints": judged}
        return {"name": name, "spec": spec | {"workers": 2}, "storage": (work / "storage" / name).as_uri()}

    fields = run("lora-fields", rank_stabilized=True, decompose=True)
    plan = {
        "port": port,
        "world_size": 2,
        "base": str(work / "base"),
        "data": str(work / "data"),
        "out": str(work / "out"),
        "runs": [*map(run, VARIANTS), fields],
    }
    return run_plan(plan, work)


def _served_loss(folder: Path, base: Path) -> float:
    from serving.engines import load_engine

    engine = load_engine(folder, base)
    rows = colour_rows(16, seed=1)
    scores = engine.score([(engine.render([{"role": "user", "content": row.prompt}]), row.completion) for row in rows])
    return -sum(score.logprob for score in scores) / sum(score.tokens for score in scores)


@pytest.mark.parametrize("name", [*VARIANTS, "lora-fields"])
def test_an_adapter_is_served_as_it_was_trained(runs: dict[str, dict[str, Any]], work: Path, name: str) -> None:
    losses = runs[name]["losses"]
    assert runs[name]["kind"] == "adapter"
    assert losses[-1] < losses[0] - 0.3
    assert _served_loss(work / "out" / name, work / "base") == pytest.approx(runs[name]["judged"]["eval_loss"], abs=1e-3)


def test_the_variants_are_what_they_are_called(runs: dict[str, dict[str, Any]], work: Path) -> None:
    for name, rslora, dora in (
        ("lora", False, False),
        ("rslora", True, False),
        ("dora", False, True),
        ("lora-fields", True, True),
    ):
        config = json.loads((work / "out" / name / "adapter_config.json").read_text())
        assert (config["use_rslora"], config["use_dora"]) == (rslora, dora)
    assert len({runs[name]["judged"]["eval_loss"] for name in runs}) == len(runs)


def test_a_base_in_four_bits_is_refused_without_a_gpu_before_anything_is_loaded(tmp_path: Path) -> None:
    from agents.training.methods.base import find_method

    spec = training_pb2.FinetuneSpec(base="micro", method="qlora")
    context = TrainContext(
        config=TrainConfig.of(spec),
        base_dir=tmp_path / "nothing",
        base_name="micro",
        data_dir=tmp_path,
        output_dir=tmp_path,
        rank=0,
        world_size=1,
        reporter=SilentReporter(),
    )
    with pytest.raises(FailedPrecondition, match="need a GPU; use method lora") as caught:
        find_method("qlora").run(context)
    assert caught.value.violations[0].field == "method"
