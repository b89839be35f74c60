"""Method `pretrain`: continued pretraining on raw text, of all weights or of an adapter. Every token is learned."""

from __future__ import annotations

from agents.training.context import TrainContext, TrainedModel
from agents.training.methods.lora import adapter_shape
from agents.training.methods.sft import run_sft


class PretrainMethod:
    """Next-token prediction on texts as they stand, in pieces of max_length tokens."""

    name = "pretrain"
    model_kind = "full"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        config = context.config
        kind = "adapter" if config.adapter else "full"
        return run_sft(context, kind, adapter_shape(config) if config.adapter else None, raw=True)
