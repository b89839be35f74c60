"""Supervised fine-tuning: TRL's trainer on a DeepSpeed engine, fed with examples that are masked and checked already."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from agents.training.callbacks import HELD_OUT, RunCallback
from agents.training.config import TrainConfig
from agents.training.context import TrainContext, TrainedModel, Wish
from agents.training.deepspeed_config import deepspeed_config
from agents.training.distributed import sums
from agents.training.environment import join_deepspeed, limit_threads
from agents.training.kernels import fuse_layers
from agents.training.packing import RowCollator, StepOrder, decide
from agents.training.saving import save_model
from agents.training.speed import GpuFigures, attended_length, flops_per_token
from agents.training.tokens.cache import Tokens, TokenSpec, open_tokens
from agents.training.watch import Watch
from common.errors import InvalidArgument, Violation

logger = logging.getLogger(__name__)

LOGGED_POINTS = 1000
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class _Trainer(SFTTrainer):
    """TRL's trainer, with our order of rows and telling the watch whenever it got some.

    It writes no model card, which would name local paths.
    """

    watch: Watch
    order: StepOrder

    def _get_train_sampler(self, *_: Any) -> StepOrder:
        return self.order

    def _run_epoch(self, model: Any, epoch: int, *arguments: Any, **more: Any) -> Any:
        # A run that goes on in the middle of an epoch wraps the sampler deeper than accelerate looks for it.
        self.order.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *arguments, **more)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any) -> Any:
        """Fetch the rows of a step, of which the ranks then agree on the number."""
        return super().get_batch_samples(self._told(epoch_iterator), *arguments)

    def _told(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            step = self.state.global_step
            self.watch.at(step, f"has rows for step {step + 1} and goes on with the others")
            yield batch

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none."""

    def _send_telemetry(self) -> None:
        """Send none."""


def run_sft(context: TrainContext, model_kind: str, peft_config: PeftConfig | None = None) -> TrainedModel:
    """Fine-tune on this rank and leave the model in the context's output folder. Every rank has to call it."""
    config, watch = context.config, context.watch
    watch.at_length(0, "loads the model and the rows")
    limit_threads(config.cpus_per_worker)
    join_deepspeed(context.use_gpu)
    disable_progress_bar()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(context.base_dir, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = _tokens(context, tokenizer, "train", 0)
    # The arguments come before the model: they hold the DeepSpeed config, which ZeRO-3 needs alive while weights are loaded.
    args = _arguments(context, len(tokens.dataset))
    model = AutoModelForCausalLM.from_pretrained(
        context.base_dir, dtype=_dtype(context), use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    packing = decide(config.packing, model, tokens.lengths, config.batch_size, config.seed)
    fused = fuse_layers(model, context.use_gpu)
    _score_targets_only()
    callback = RunCallback(context)
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=tokens.examples,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[callback],
    )
    callback.trainer, trainer.watch = trainer, watch
    trainer.order = _order(context, tokens.lengths, packing.on)
    if packing.on:
        trainer.data_collator = RowCollator(tokenizer.pad_token_id)
    trainer.remove_callback(PrinterCallback)
    if (held_out_rows := _held_out_rows(context)) is not None:
        held_out = _tokens(context, tokenizer, *held_out_rows).examples
        callback.hold_out(lambda: held_out_loss(trainer, held_out, context.use_gpu))
    if context.use_gpu:
        # Against the peak of bf16, other formats would tell nothing.
        flops = flops_per_token(trainer.model, attended_length(tokens.lengths)) if args.bf16 else 0.0
        callback.gpu = GpuFigures(flops, context.world_size)
    layout = f"packed without padding: {packing.why}" if packing.on else f"not packed: {packing.why}"
    left_out = f" ({tokens.report.left_out} more have nothing to learn)" if tokens.report.left_out else ""
    rows = f"{len(tokens.dataset)} rows{left_out}"
    context.phase("training", f"training {config.method} on {rows} with {context.world_size} workers, {layout}, {fused}")
    started = time.monotonic()
    if context.resume_from is not None and context.is_main:
        logger.info("going on from the checkpoint in %s", context.resume_from.name)
    trainer.train(resume_from_checkpoint=str(context.resume_from) if context.resume_from is not None else None)
    seconds = time.monotonic() - started
    if callback.engine is None:
        raise InvalidArgument.of(
            [Violation("hyperparameters.epochs", "comes to no optimiser step at all; raise it or set max_steps")]
        )
    watch.at_length(trainer.state.global_step, "writes the trained model", callback.state_bytes())
    folder = context.output_dir / "model"
    if callback.wish not in (Wish.END, Wish.PAUSE):
        context.phase("saving", "writing the trained model")
        save_model(trainer, tokenizer, folder, context.base_name, context.is_main)
    metrics = {
        "train_loss": _tail_mean(callback.losses),
        "train_steps": float(trainer.state.global_step),
        "train_tokens": float(callback.tokens),
        "train_seconds": seconds,
        "train_tokens_per_second": callback.tokens / max(seconds, 1e-9),
        "train_rows_left_out": float(tokens.report.left_out),
        "train_rows_cut": float(tokens.report.cut.count),
    }
    if callback.gpu is not None:
        metrics |= callback.gpu.at(metrics["train_tokens_per_second"])
    return TrainedModel(model_kind, folder, trainer.state.global_step, metrics, callback.engine, callback.wish)


def held_out_loss(trainer: Any, dataset: Dataset, use_gpu: bool) -> dict[str, float]:
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


def _held_out_rows(context: TrainContext) -> tuple[str, int] | None:
    """Split and most rows (0 for all) to measure the held-out loss on during training; None where nobody wants it."""
    if context.trial_reports is not None:
        return context.trial_reports.split, context.trial_reports.max_rows
    config = context.config
    wanted = config.keep.best and config.keep.metric == HELD_OUT and config.checkpoint_every
    return (config.held_out_split, config.held_out_rows) if wanted else None


def _tokens(context: TrainContext, tokenizer: Any, split: str, max_rows: int) -> Tokens:
    path = context.data_dir / f"{split}.parquet"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in context.data_dir.glob("*.parquet"))) or "none"
        raise InvalidArgument(
            f"the data set has no split {split!r}; it has {there}", "BAD_DATA", [Violation(split, "does not exist")]
        )
    # One rank of the node works while the others wait, so it may use all their processors.
    processes = int(context.config.cpus_per_worker * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    spec = TokenSpec(path, context.base_dir, _longest(context), context.config.loss_on_all, max_rows, processes)
    tokens = open_tokens(spec, tokenizer)
    if context.is_main:
        for text in tokens.report.warnings():
            logger.warning("%s", text)
    return tokens


def _order(context: TrainContext, lengths: np.ndarray, packed: bool) -> StepOrder:
    config = context.config
    accumulation = config.gradient_accumulation
    return StepOrder(lengths, config.batch_size, accumulation, context.world_size, seed=config.seed, packed=packed)


def _arguments(context: TrainContext, rows: int) -> SFTConfig:
    config = context.config
    return SFTConfig(
        output_dir=str(context.output_dir / "checkpoints"),
        deepspeed=deepspeed_config(config.zero_stage),
        # Without use_cpu accelerate miscounts the processes on a machine without GPUs.
        use_cpu=not context.use_gpu,
        ddp_backend="nccl" if context.use_gpu else "gloo",
        bf16=_dtype(context) is torch.bfloat16,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULERS[config.scheduler],
        warmup_steps=_warmup_steps(config, rows, context.world_size),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        logging_strategy="steps",
        logging_first_step=True,
        logging_steps=max(1, total_steps(config, rows, context.world_size) // LOGGED_POINTS),
        # A filter would replace a loss that is not a number by the mean of the others, and hide it.
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.checkpoint_every and context.run_uri else "no",
        save_steps=config.checkpoint_every or 500,
        eval_strategy="no",
        dataloader_pin_memory=context.use_gpu,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )


def total_steps(config: TrainConfig, rows: int, world_size: int) -> int:
    """Optimiser steps that a run comes to."""
    if config.max_steps > 0:
        return config.max_steps
    micro = math.ceil(rows / (config.batch_size * world_size))
    return max(1, math.ceil(config.epochs * max(1, math.ceil(micro / config.gradient_accumulation))))


def _warmup_steps(config: TrainConfig, rows: int, world_size: int) -> int:
    return math.ceil(config.warmup_ratio * total_steps(config, rows, world_size))


def _dtype(context: TrainContext) -> torch.dtype:
    precision = context.config.precision
    if precision == "auto":
        precision = "bf16" if context.use_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _longest(context: TrainContext) -> int:
    """Tokens a row may have: what was asked for, and no more than the base model takes."""
    base = AutoConfig.from_pretrained(context.base_dir, trust_remote_code=False, local_files_only=True).get_text_config()
    limit = getattr(base, "max_position_embeddings", None)
    asked = context.config.max_length
    if isinstance(limit, int) and asked > limit and context.is_main:
        logger.warning("the base model takes at most %d tokens, so rows are cut there instead of at max_length=%d", limit, asked)
    return min(asked, limit) if isinstance(limit, int) else asked


def _score_targets_only() -> None:
    """Project only the learned positions to the vocabulary on CPUs too, where TRL scores every position."""
    if hasattr(trl_utils, "_use_triton"):
        trl_utils._use_triton = lambda _: True


def _tail_mean(losses: list[float]) -> float:
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
