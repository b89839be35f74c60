"""Method `rloo`: each answer is held against the mean of the others to the same prompt (RLOO, Ahmadian et al., 2024)."""

from __future__ import annotations

from trl import RLOOConfig, RLOOTrainer

from agents.training.context import TrainContext, TrainedModel
from agents.training.methods.reinforcement import run_reinforcement
from agents.training.methods.trainer import WatchedTrainer


class _Trainer(WatchedTrainer, RLOOTrainer):  # type: ignore[misc]
    """TRL's trainer with our order of prompts."""


class RlooMethod:
    """REINFORCE with a leave-one-out baseline, of all weights or of an adapter."""

    name = "rloo"
    model_kind = "full"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        return run_reinforcement(context, _Trainer, RLOOConfig)
