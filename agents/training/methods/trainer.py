"""What all methods on an HF trainer share: how one is set up, fed, watched, told what to do, and what it leaves behind."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from trl.trainer import utils as trl_utils

from agents.training.callbacks import RunCallback
from agents.training.config import TrainConfig
from agents.training.context import TrainContext, Wish
from agents.training.deepspeed_config import deepspeed_config
from agents.training.distributed import sums
from agents.training.environment import join_deepspeed, limit_threads
from agents.training.saving import save_model
from agents.training.watch import Watch
from common.errors import InvalidArgument, Violation

logger = logging.getLogger(__name__)

LOGGED_POINTS = 1000
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class WatchedTrainer:
    """Mixed into a trainer: it takes its rows in an order of ours and tells the watch whenever it got some.

    It writes no model card, which would name local paths.
    """

    watch: Watch
    # A sampler with set_epoch, a function of seed and epoch, so that a run goes on anywhere in it.
    order: Any

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.order

    def _run_epoch(self, model: Any, epoch: int, *arguments: Any, **more: Any) -> Any:
        # A run that goes on in the middle of an epoch wraps the sampler deeper than accelerate looks for it.
        self.order.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *arguments, **more)  # type: ignore[misc]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any) -> Any:
        """Fetch the rows of a step, of which the ranks then agree on the number."""
        return super().get_batch_samples(self._told(epoch_iterator), *arguments)  # type: ignore[misc]

    def _told(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            step = self.state.global_step  # type: ignore[attr-defined]
            self.watch.at(step, f"has rows for step {step + 1} and goes on with the others")
            yield batch

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none."""

    def _send_telemetry(self) -> None:
        """Send none."""


def begin(context: TrainContext) -> Any:
    """Set this rank up and return the base's tokenizer, with a token to pad with."""
    context.watch.at_length(0, "loads the model and the rows")
    limit_threads(context.config.cpus_per_worker)
    join_deepspeed(context.use_gpu)
    disable_progress_bar()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(context.base_dir, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def arguments(context: TrainContext, rows: int) -> dict[str, Any]:
    """Arguments of any HF trainer for a run on so many training rows.

    They are made into an object before the model is loaded: it holds the DeepSpeed config, which ZeRO-3 needs alive by then.
    """
    config = context.config
    return {
        "output_dir": str(context.output_dir / "checkpoints"),
        "deepspeed": deepspeed_config(config.zero_stage),
        # Without use_cpu accelerate miscounts the processes on a machine without GPUs.
        "use_cpu": not context.use_gpu,
        "ddp_backend": "nccl" if context.use_gpu else "gloo",
        "bf16": dtype(context) is torch.bfloat16,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[config.scheduler],
        "warmup_steps": _warmup_steps(config, rows, context.world_size),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        "gradient_checkpointing": False,
        "logging_strategy": "steps",
        "logging_first_step": True,
        "logging_steps": max(1, total_steps(config, rows, context.world_size) // LOGGED_POINTS),
        # A filter would replace a loss that is not a number by the mean of the others, and hide it.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.checkpoint_every and context.run_uri else "no",
        "save_steps": config.checkpoint_every or 500,
        "eval_strategy": "no",
        "dataloader_pin_memory": context.use_gpu,
        "disable_tqdm": True,
        "report_to": [],
        "log_level": "error",
    }


def split_file(context: TrainContext, split: str) -> Path:
    """The file of a split. Raises InvalidArgument that names those there are."""
    path = context.data_dir / f"{split}.parquet"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in context.data_dir.glob("*.parquet"))) or "none"
        raise InvalidArgument(
            f"the data set has no split {split!r}; it has {there}", "BAD_DATA", [Violation(split, "does not exist")]
        )
    return path


def has_split(context: TrainContext) -> bool:
    """Whether there are held-out rows; says so where there are none."""
    split = context.config.held_out_split
    there = (context.data_dir / f"{split}.parquet").exists()
    if not there and context.is_main:
        logger.warning("the data set has no split %r, so nothing is scored", split)
    return there


def train(context: TrainContext, trainer: Any, callback: RunCallback) -> float:
    """Train, from a checkpoint where there is one, and return the seconds it took. Every rank has to call it."""
    started = time.monotonic()
    if context.resume_from is not None and context.is_main:
        logger.info("going on from the checkpoint in %s", context.resume_from.name)
    trainer.train(resume_from_checkpoint=str(context.resume_from) if context.resume_from is not None else None)
    seconds = time.monotonic() - started
    if callback.engine is None:
        raise InvalidArgument.of(
            [Violation("hyperparameters.epochs", "comes to no optimiser step at all; raise it or set max_steps")]
        )
    return seconds


def save(context: TrainContext, trainer: Any, callback: RunCallback, tokenizer: Any) -> Path:
    """Write the trained model, unless the run was stopped, and return its folder. Collective."""
    context.watch.at_length(trainer.state.global_step, "writes the trained model", callback.state_bytes())
    folder = context.output_dir / "model"
    if callback.wish not in (Wish.END, Wish.PAUSE):
        context.phase("saving", "writing the trained model")
        save_model(trainer, tokenizer, folder, context.base_name, context.is_main)
    return folder


def train_figures(trainer: Any, callback: RunCallback, seconds: float) -> dict[str, float]:
    """The figures of any training."""
    return {
        "train_loss": _tail_mean(callback.losses),
        "train_steps": float(trainer.state.global_step),
        "train_tokens": float(callback.tokens),
        "train_seconds": seconds,
        "train_tokens_per_second": callback.tokens / max(seconds, 1e-9),
    }


def held_out_loss(trainer: Any, dataset: Any, use_gpu: bool) -> dict[str, float]:
    """Mean loss per target token over all rows. Collective, in the middle of training."""
    model = trainer.model_wrapped
    model.eval()
    loss = tokens = 0.0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(dataset):
            inputs = trainer._prepare_inputs(batch)
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            loss -= float(outputs.log_probs.double().sum())
            tokens += float(outputs.label_mask.sum())
    model.train()
    loss, tokens = sums([loss, tokens], use_gpu)
    mean = loss / max(tokens, 1.0)
    return {"eval_loss": mean, "perplexity": math.exp(min(mean, 700.0))}


def total_steps(config: TrainConfig, rows: int, world_size: int) -> int:
    """Optimiser steps that a run comes to."""
    if config.max_steps > 0:
        return config.max_steps
    micro = math.ceil(rows / (config.batch_size * world_size))
    return max(1, math.ceil(config.epochs * max(1, math.ceil(micro / config.gradient_accumulation))))


def dtype(context: TrainContext) -> torch.dtype:
    """The number format of the weights."""
    precision = context.config.precision
    if precision == "auto":
        precision = "bf16" if context.use_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def longest(context: TrainContext) -> int:
    """Tokens a row may have: what was asked for, and no more than the base model takes."""
    base = AutoConfig.from_pretrained(context.base_dir, trust_remote_code=False, local_files_only=True).get_text_config()
    limit = getattr(base, "max_position_embeddings", None)
    asked = context.config.max_length
    if isinstance(limit, int) and asked > limit and context.is_main:
        logger.warning("the base model takes at most %d tokens, so rows are cut there instead of at max_length=%d", limit, asked)
    return min(asked, limit) if isinstance(limit, int) else asked


def score_targets_only() -> None:
    """Project only the learned positions to the vocabulary on CPUs too, where TRL scores every position."""
    if hasattr(trl_utils, "_use_triton"):
        trl_utils._use_triton = lambda _: True


def _warmup_steps(config: TrainConfig, rows: int, world_size: int) -> int:
    return math.ceil(config.warmup_ratio * total_steps(config, rows, world_size))


def _tail_mean(losses: list[float]) -> float:
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
