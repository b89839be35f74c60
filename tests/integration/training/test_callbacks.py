"""What a rank does at step boundaries, without training anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from agents.failures import end_reason_of, job_error_of
from agents.training.callbacks import RunCallback
from agents.training.config import TrainConfig
from agents.training.context import TrainContext
from agents.training.local import SilentReporter
from common.errors import FailedPrecondition
from coordinator.jobs.retry import next_try
from coordinator.jobs.states import EndReason
from luthier.v1 import training_pb2


@pytest.fixture
def callback(tmp_path: Path) -> RunCallback:
    spec = training_pb2.FinetuneSpec(base="micro", method="full", checkpoints={"every_steps": 5, "keep_best": 1})  # type: ignore[arg-type]
    config = TrainConfig.of(spec)
    return RunCallback(TrainContext(config, tmp_path, "micro", tmp_path, tmp_path, 0, 1, SilentReporter()))


def test_tokens_are_counted_to_the_last_step(callback: RunCallback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    reporter = callback._context.reporter
    monkeypatch.setattr(reporter, "progress", lambda progress: told.append((progress.step, progress.trained_tokens)))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)

    def log(step: int, **logs: float) -> None:
        callback.on_log(arguments, TrainerState(global_step=step, max_steps=12), TrainerControl(), logs)

    log(5, loss=2.0, num_tokens=500)
    log(10, loss=1.0, num_tokens=1000)
    log(12, train_runtime=3.0, num_tokens=1210)  # the trainer's closing words
    callback.on_train_end(arguments, TrainerState(global_step=12), TrainerControl())
    callback.on_train_end(arguments, TrainerState(global_step=12), TrainerControl())
    assert told == [(5, 500), (10, 1000), (12, 1210)]
    assert callback.tokens == 1210


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
def test_a_loss_that_is_no_number_ends_the_run_naming_the_step_and_is_not_tried_again(callback: RunCallback, loss: str) -> None:
    arguments: Any = SimpleNamespace(output_dir="")
    with pytest.raises(FailedPrecondition) as caught:
        callback.on_log(arguments, TrainerState(global_step=17), TrainerControl(), {"loss": float(loss)})
    error = job_error_of(caught.value, "rank-0")
    assert error.message == f"the training loss is {loss} at step 17; lower the learning rate or max_grad_norm"
    assert error.code == "LOSS_NOT_FINITE"
    reason = EndReason.of(end_reason_of(error))
    assert reason is EndReason.ERROR
    assert next_try(reason, 0, {}, {}) is None


def test_a_checkpoint_is_judged_by_the_loss_of_its_own_step(
    callback: RunCallback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(callback._checkpoints, "publish", lambda _, step, figures: published.append((step, figures)))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    callback.engine = training_pb2.EngineReport()
    for step in (5, 10):
        control = TrainerControl(should_save=True)
        callback.on_step_end(arguments, TrainerState(global_step=step), control)
        assert control.should_log, "the figure of the step has to be known before it is saved"
        callback.on_log(arguments, TrainerState(global_step=step, max_steps=10), control, {"loss": 10.0 / step})
        callback.on_save(arguments, TrainerState(global_step=step), control)
    assert published == [(5, {"loss": 2.0}), (10, {"loss": 1.0})]
