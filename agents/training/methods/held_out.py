"""What methods that the serving engine cannot score find out by themselves: held-out figures before training and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from agents.training.callbacks import RunCallback
from agents.training.context import TrainContext, Wish

_BEFORE = "held_out_before"


class HeldOut(TrainerCallback):
    """Measures once before the first step and once after the last. Collective, as the trainer's callbacks are.

    The figures from before go into the checkpoints, so that a run that goes on still has them.
    """

    def __init__(self, context: TrainContext, run: RunCallback, measure: Callable[[], dict[str, float]]) -> None:
        self._context, self._run, self._measure = context, run, measure
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}

    @property
    def figures(self) -> dict[str, float]:
        """The figures after training by name, and those from before with `before_`."""
        return self._after | {f"before_{name}": value for name, value in self._before.items()}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, or take over what the first run has measured."""
        if state.global_step:
            self._before = next((entry[_BEFORE] for entry in state.log_history if _BEFORE in entry), {})
            return
        self._before = self._measured(state, "before training")
        state.log_history.append({"step": 0, _BEFORE: self._before})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, unless the run was stopped."""
        if self._run.wish not in (Wish.END, Wish.PAUSE):
            self._after = self._measured(state, "after training")

    def _measured(self, state: TrainerState, when: str) -> dict[str, float]:
        self._context.watch.at_length(state.global_step, f"scores held-out rows {when}", self._run.state_bytes())
        figures = self._measure()
        self._context.watch.at(state.global_step, f"has scored held-out rows {when}")
        return figures
