"""The DeepSpeed configuration of a run. "auto" values are filled in by transformers from its own arguments."""

from __future__ import annotations

from typing import Any

BUCKET = 50_000_000


def deepspeed_config(zero_stage: int) -> dict[str, Any]:
    """Return the configuration for a ZeRO stage, in fp32 or bf16 as the trainer's arguments say.

    There is no `optimizer` section on purpose: the trainer hands over torch's AdamW with its own parameter groups, and
    DeepSpeed wraps it. A section would make DeepSpeed build a fused or CPU kernel of its own where it finds a compiler.
    """
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage:
        zero |= {
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        }
    if zero_stage == 3:
        zero |= {
            # A model of few parameters would stay whole on every rank below the default thresholds.
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Nodes share nothing but the storage: each keeps the shards of its own ranks.
        "checkpoint": {"use_node_local_storage": True},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
