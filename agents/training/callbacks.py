"""What happens at step boundaries: progress and figures, the engine's proof, checkpoints, and the wish to stop."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from agents.training.checkpoints import CheckpointPublisher
from agents.training.context import TrainContext, Wish
from agents.training.engine_check import engine_report
from agents.training.speed import GpuFigures
from common.errors import FailedPrecondition
from luthier.v1 import job_pb2, training_pb2

# Names in the trainer's log, and under which they are recorded.
_RECORDED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "margin": "reward_margin",
    "accuracy": "reward_accuracy",
    "kl": "kl",
    "reward": "reward",
    "reward_std": "reward_std",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "completions_clipped",
}
# Of each reward that answers get: rewards/NAME/mean.
_EACH_REWARD = re.compile(r"rewards/(\w+)/mean")


HELD_OUT = "eval_loss"


def _recorded(logs: dict[str, Any]) -> dict[str, float]:
    """The figures of a step, by the names under which they are recorded."""
    names = {key: _RECORDED.get(key) or _EACH_REWARD.sub(r"reward_\1", key) for key in logs}
    return {name: float(logs[key]) for key, name in names.items() if logs[key] is not None and (key in _RECORDED or name != key)}


def _waiting(state: TrainerState) -> str:
    return f"waits for the rows of step {state.global_step + 1}"


def _computing(state: TrainerState) -> str:
    return f"computes step {state.global_step + 1} with the others"


class RunCallback(TrainerCallback):
    """Reports a run and steers it. One instance a rank; set `trainer` before training starts."""

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._held_out: Callable[[], dict[str, float]] | None = None
        self._checkpoints = CheckpointPublisher(context)
        self._start = self._last = time.monotonic()
        self._start_step = self._last_tokens = self._last_step = 0
        self._trial_step = 0
        self.trainer: Any = None
        self.engine: training_pb2.EngineReport | None = None
        self.gpu: GpuFigures | None = None
        self.wish = Wish.NONE
        self.tokens = 0
        self.losses: list[float] = []
        self._figures: dict[str, float] = {}
        self._told = job_pb2.Progress()

    def hold_out(self, measure: Callable[[], dict[str, float]]) -> None:
        """Measure the held-out loss with `measure` whenever a trial reports, or a checkpoint is judged by it."""
        self._held_out = measure

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clocks."""
        self._start = self._last = time.monotonic()
        self._start_step = self._last_step = state.global_step
        self._context.watch.at(state.global_step, _waiting(state))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The rows of a step are there, on this rank."""
        self._context.watch.at(state.global_step, _computing(state))

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A micro-step of several is done."""
        self._context.watch.at(state.global_step, _computing(state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After every optimiser step, on every rank."""
        context = self._context
        context.watch.stepped(state.global_step, f"agrees with the others after step {state.global_step}")
        if self.engine is None:
            model = self.trainer.model
            self.engine = engine_report(self.trainer.model_wrapped, model, context.config.zero_stage, context.rank, context.node)
            if context.is_main:
                context.reporter.engine(self.engine)
            # The first step pays for compiling and warming up; the rate is measured from here.
            self._start, self._start_step = time.monotonic(), state.global_step
        self._heed(context.agreed_wish(), state, control)
        reports = context.trial_reports
        if reports is not None and (state.global_step % reports.every_steps == 0 or state.global_step == state.max_steps):
            control.should_log = True
            self._trial_step = state.global_step
        if control.should_save and context.config.keep.best:
            control.should_log = True  # what it is judged by
        if control.should_save or self._trial_step == state.global_step:
            context.watch.at_length(state.global_step, f"scores or saves after step {state.global_step}", self.state_bytes())
        else:
            context.watch.at(state.global_step, _waiting(state))

    def _heed(self, wish: Wish, state: TrainerState, control: TrainerControl) -> None:
        if wish is Wish.PAUSE and state.global_step >= state.max_steps:
            return  # the last step: it is quicker to end than to go on later
        self.wish = wish
        if wish is not Wish.NONE:
            control.should_training_stop = True
            control.should_save = wish is Wish.PAUSE and bool(self._context.run_uri)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Figures of the steps since the last log; `loss` is their mean over all ranks."""
        if logs and "num_tokens" in logs:
            self.tokens = int(logs["num_tokens"])
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise FailedPrecondition(
                f"the training loss is {loss} at step {state.global_step}; lower the learning rate or max_grad_norm",
                "LOSS_NOT_FINITE",
            )
        self.losses.append(loss)
        self._figures = _recorded(logs)
        if self._context.is_main:
            self._report(args, state, logs, loss)
        if self._trial_step == state.global_step and self._context.trial_reports is not None:
            self._trial_step = 0
            held_out = self._held_out() if self._held_out is not None else {}
            self._context.trial_reports.report({"step": float(state.global_step), "loss": loss, **held_out})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell of the tokens of the steps since the last log, which the trainer's closing words have."""
        if self._context.is_main and self.tokens > self._told.trained_tokens:
            last = job_pb2.Progress()
            last.CopyFrom(self._told)
            last.step, last.trained_tokens = state.global_step, self.tokens
            self._context.reporter.progress(last)
            self._told = last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The ranks have written a checkpoint into this node's folder: publish it."""
        keep, figures = self._context.config.keep, {}
        if keep.best:
            known = self._held_out() if keep.metric == HELD_OUT and self._held_out is not None else self._figures
            figures = {keep.metric: known[keep.metric]} if keep.metric in known else {}
        self._checkpoints.publish(Path(args.output_dir or "") / f"checkpoint-{state.global_step}", state.global_step, figures)
        self._context.watch.at(state.global_step, _waiting(state))

    def state_bytes(self) -> int:
        """Bytes of parameters and optimiser state over all ranks: what a checkpoint has to move."""
        ranks = self.engine.ranks if self.engine is not None else ()
        return sum(rank.parameter_bytes + rank.optimizer_bytes for rank in ranks)

    def _report(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any], loss: float) -> None:
        now = time.monotonic()
        rate = (self.tokens - self._last_tokens) / max(now - self._last, 1e-9)
        self._last, self._last_tokens = now, self.tokens
        done = state.global_step - self._start_step
        pace = (now - self._start) / done if done > 0 else 0.0
        progress = job_pb2.Progress(
            step=state.global_step,
            total_steps=max(state.max_steps, 0),
            loss=loss,
            tokens_per_second=rate,
            phase="training",
            learning_rate=float(logs.get("learning_rate", 0.0)),
            epoch=float(logs.get("epoch", 0.0)),
            trained_tokens=self.tokens,
        )
        if pace:
            progress.remaining.FromMilliseconds(int(1000 * pace * max(state.max_steps - state.global_step, 0)))
        self._context.reporter.progress(progress)
        self._told = progress
        figures = {name: value for name, value in _recorded(logs).items() if math.isfinite(value)}
        figures |= {"tokens_per_second": rate, "epoch": progress.epoch}
        if self.gpu is not None:
            figures |= self.gpu.at(rate)
        self._context.reporter.metrics(state.global_step, figures, self._context.trial)
