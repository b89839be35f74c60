"""Method `full`: every weight is trained."""

from __future__ import annotations

from agents.training.context import TrainContext, TrainedModel
from agents.training.methods.sft import run_sft


class FullMethod:
    """Supervised fine-tuning of all weights."""

    name = "full"
    model_kind = "full"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        return run_sft(context, self.model_kind)
