"""Method `grpo`: answers that are worth more than others to the same prompt become likelier (GRPO, Shao et al., 2024)."""

from __future__ import annotations

from trl import GRPOConfig, GRPOTrainer

from agents.training.context import TrainContext, TrainedModel
from agents.training.methods.reinforcement import run_reinforcement
from agents.training.methods.trainer import WatchedTrainer


class _Trainer(WatchedTrainer, GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with our order of prompts."""


class GrpoMethod:
    """Group-relative policy optimisation of all weights, or of an adapter."""

    name = "grpo"
    model_kind = "full"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        return run_reinforcement(context, _Trainer, GRPOConfig)
