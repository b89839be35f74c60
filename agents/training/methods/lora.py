"""Methods that train a low-rank adapter beside the frozen base: `lora` (Hu et al., 2021) and its variants.

`rslora` scales by alpha / sqrt(rank) (Kalajdzievski, 2023), `dora` learns the length of a weight's columns apart from their
direction (Liu et al., 2024), and `qlora` keeps the base in 4 bits (Dettmers et al., 2023).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from peft import LoraConfig

from agents.training.config import TrainConfig
from agents.training.context import TrainContext, TrainedModel
from agents.training.methods.sft import run_sft
from common.errors import FailedPrecondition, Violation


class LoraMethod:
    """Supervised fine-tuning of a LoRA adapter."""

    name = "lora"
    model_kind = "adapter"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        return run_sft(context, self.model_kind, adapter_shape(context.config))


class RsLoraMethod(LoraMethod):
    """LoRA, rank-stabilised."""

    name = "rslora"


class DoraMethod(LoraMethod):
    """LoRA, decomposed into length and direction."""

    name = "dora"


class QloraMethod(LoraMethod):
    """LoRA on a base in 4 bits. The adapter serves on the base as it is, in its own format."""

    name = "qlora"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank. Raises FailedPrecondition where there is no GPU, or no bitsandbytes."""
        if obstacle := obstacle_to_quantising(context.use_gpu):
            raise FailedPrecondition(
                f"method qlora cannot run here: {obstacle}", "NO_QUANTISATION", [Violation("method", obstacle)]
            )
        return run_sft(context, self.model_kind, adapter_shape(context.config), quantization=_nf4(context))


def adapter_shape(config: TrainConfig) -> LoraConfig:
    """The adapter that a job asks for, as PEFT knows it."""
    lora = config.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        use_rslora=lora.rank_stabilized,
        use_dora=lora.decompose,
        task_type="CAUSAL_LM",
    )


def obstacle_to_quantising(use_gpu: bool) -> str:
    """Why weights cannot be kept in 4 bits here; empty where they can."""
    if not use_gpu:
        return "4-bit weights need a GPU; use method lora, or give the workers GPUs (worker_resources.gpus)"
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed on the node (pip install 'luthier[gpu]')"
    return ""


def _nf4(context: TrainContext) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    from agents.training.methods.trainer import dtype

    computed = dtype(context)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
        bnb_4bit_quant_storage=computed if computed is torch.bfloat16 else torch.uint8,
    )
