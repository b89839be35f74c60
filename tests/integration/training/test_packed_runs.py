"""Two ranks on rows of uneven length: packed or not, and however a step is divided, it learns the same and goes on anywhere."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest

from common.rows import Row, write_split
from tests.support.micro_model import WORDS, build_micro
from tests.support.training_ranks import run_plan

pytestmark = pytest.mark.slow

ROWS, STEPS, SAVED = 48, 8, 5  # three steps an epoch, so that the checkpoint is in the middle of the second


def _rows() -> list[Row]:
    rng = random.Random(0)
    rows = []
    for line in range(1, ROWS + 1):
        words = [rng.choice(WORDS) for _ in range(min(60, round(rng.lognormvariate(2.3, 0.8)) + 1))]
        rows.append(Row(prompt=" ".join(words), completion=" ".join(sorted(words)[: 1 + len(words) // 3]), line=line))
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    build_micro(folder / "base")
    (folder / "data").mkdir()
    write_split(_rows(), folder / "data" / "train.parquet")
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def spec(packing: str, batch: int, accumulation: int, stage: int = 2) -> dict[str, Any]:
        hyper = {"learning_rate": 3e-3, "max_steps": STEPS, "batch_size": batch, "gradient_accumulation": accumulation}
        return {
            "base": "micro",
            "method": "full",
            "hyperparameters": hyper,
            "sharding": {"zero_stage": stage},
            "workers": 2,
            "packing": packing,
        }

    def whole_and_resumed(packing: str) -> list[dict[str, Any]]:
        uri = (work / "storage" / packing).as_uri()
        saving = spec(packing, 4, 2) | {"checkpoints": {"every_steps": SAVED, "keep": 2}}
        name = packing.removeprefix("PACKING_").lower()
        return [
            {"name": name, "spec": saving, "storage": uri},
            {"name": f"{name}-resumed", "spec": saving, "resume": f"{uri}/checkpoints/step-{SAVED}"},
        ]

    plan = {
        "port": port,
        "world_size": 2,
        "base": str(work / "base"),
        "data": str(work / "data"),
        "out": str(work / "out"),
        "runs": [
            {"name": "zero3", "spec": spec("PACKING_ON", 4, 2, stage=3)},
            *whole_and_resumed("PACKING_ON"),
            *whole_and_resumed("PACKING_OFF"),
            {"name": "auto", "spec": spec("PACKING_AUTO", 4, 2)},
            {"name": "undivided", "spec": spec("PACKING_ON", 8, 1)},
        ],
    }
    return run_plan(plan, work)


@pytest.mark.parametrize("name", ["on", "auto", "undivided", "zero3"])
def test_a_step_learns_the_same_from_its_rows_however_they_lie_and_are_divided(
    runs: dict[str, dict[str, Any]], name: str
) -> None:
    reference = runs["off"]["losses"]
    assert len(reference) == STEPS
    assert reference[-1] < reference[0] - 0.3
    # The second loss is that after one step: of equal gradients.
    assert runs[name]["losses"] == pytest.approx(reference, abs=1e-4)


def test_packed_and_padded_runs_leave_the_same_weights(runs: dict[str, dict[str, Any]], work: Path) -> None:
    import torch
    from safetensors.torch import load_file

    reference, packed = (load_file(work / "out" / name / "model.safetensors") for name in ("off", "on"))
    for weight, tensor in reference.items():
        torch.testing.assert_close(packed[weight], tensor, atol=2e-4, rtol=0)


def test_padding_is_not_counted(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["on"]["metrics"]["train_tokens"] == runs["off"]["metrics"]["train_tokens"]


@pytest.mark.parametrize("name", ["on", "off"])
def test_a_run_goes_on_in_the_middle_of_a_later_epoch(runs: dict[str, dict[str, Any]], work: Path, name: str) -> None:
    import torch
    from safetensors.torch import load_file

    assert runs[f"{name}-resumed"]["losses"] == pytest.approx(runs[name]["losses"][SAVED:], abs=1e-6)
    whole, resumed = (load_file(work / "out" / part / "model.safetensors") for part in (name, f"{name}-resumed"))
    for weight, tensor in whole.items():
        torch.testing.assert_close(resumed[weight], tensor, atol=1e-6, rtol=0)
