"""Method `lora`: a low-rank adapter is trained beside the frozen base (Hu et al., 2021)."""

from __future__ import annotations

from peft import LoraConfig

from agents.training.context import TrainContext, TrainedModel
from agents.training.methods.sft import run_sft


class LoraMethod:
    """Supervised fine-tuning of a LoRA adapter."""

    name = "lora"
    model_kind = "adapter"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        lora = context.config.lora
        shape = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules) or "all-linear",
            task_type="CAUSAL_LM",
        )
        return run_sft(context, self.model_kind, shape)
