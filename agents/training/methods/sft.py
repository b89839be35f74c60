"""Supervised fine-tuning: TRL's trainer on a DeepSpeed engine, fed with examples that are masked and checked already."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
from peft import PeftConfig
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from agents.training.callbacks import HELD_OUT, RunCallback
from agents.training.context import TrainContext, TrainedModel
from agents.training.kernels import fuse_layers
from agents.training.methods.held_out import HeldOut
from agents.training.methods.trainer import (
    WatchedTrainer,
    arguments,
    begin,
    dtype,
    has_split,
    held_out_loss,
    longest,
    save,
    score_targets_only,
    split_file,
    train,
    train_figures,
)
from agents.training.packing import RowCollator, StepOrder, decide
from agents.training.speed import GpuFigures, attended_length, flops_per_token
from agents.training.tokens.cache import Tokens, TokenSpec, open_tokens

logger = logging.getLogger(__name__)


class _Trainer(WatchedTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, with our order of rows."""

    order: StepOrder


def run_sft(
    context: TrainContext,
    model_kind: str,
    peft_config: PeftConfig | None = None,
    *,
    quantization: Any = None,
    raw: bool = False,
) -> TrainedModel:
    """Fine-tune on this rank and leave the model in the context's output folder. Every rank has to call it.

    With `quantization`, how transformers quantises weights, the base is loaded in it. `raw` rows are texts without prompts,
    learned as they stand; the engine that serves does not score these, so that it is done here, before and after.
    """
    config, watch = context.config, context.watch
    tokenizer = begin(context)
    tokens = _tokens(context, tokenizer, "train", 0, raw)
    # The arguments come before the model: they hold the DeepSpeed config, which ZeRO-3 needs alive while weights are loaded.
    args = _arguments(context, len(tokens.dataset))
    model = AutoModelForCausalLM.from_pretrained(
        context.base_dir,
        dtype=dtype(context),
        quantization_config=quantization,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    packing = decide(config.packing, model, tokens.lengths, config.batch_size, config.seed)
    fused = fuse_layers(model, context.use_gpu)
    score_targets_only()
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
        held_out = _tokens(context, tokenizer, *held_out_rows, raw).examples
        callback.hold_out(lambda: held_out_loss(trainer, held_out, context.use_gpu))
    perplexity = None
    if raw and config.score and has_split(context):
        texts = _tokens(context, tokenizer, config.held_out_split, config.held_out_rows, raw).examples
        perplexity = HeldOut(context, callback, lambda: held_out_loss(trainer, texts, context.use_gpu))
        trainer.add_callback(perplexity)
    if context.use_gpu:
        # Against the peak of bf16, other formats would tell nothing.
        flops = flops_per_token(trainer.model, attended_length(tokens.lengths)) if args.bf16 else 0.0
        callback.gpu = GpuFigures(flops, context.world_size)
    layout = f"packed without padding: {packing.why}" if packing.on else f"not packed: {packing.why}"
    left_out = f" ({tokens.report.left_out} more have nothing to learn)" if tokens.report.left_out else ""
    rows = f"{len(tokens.dataset)} rows{left_out}"
    context.phase("training", f"training {config.method} on {rows} with {context.world_size} workers, {layout}, {fused}")
    seconds = train(context, trainer, callback)
    folder = save(context, trainer, callback, tokenizer)
    metrics = train_figures(trainer, callback, seconds) | {
        "train_rows_left_out": float(tokens.report.left_out),
        "train_rows_cut": float(tokens.report.cut.count),
    }
    metrics |= perplexity.figures if perplexity is not None else {}
    if callback.gpu is not None:
        metrics |= callback.gpu.at(metrics["train_tokens_per_second"])
    return TrainedModel(model_kind, folder, trainer.state.global_step, metrics, callback.engine, callback.wish)


def _held_out_rows(context: TrainContext) -> tuple[str, int] | None:
    """Split and most rows (0 for all) to measure the held-out loss on during training; None where nobody wants it."""
    if context.trial_reports is not None:
        return context.trial_reports.split, context.trial_reports.max_rows
    config = context.config
    wanted = config.keep.best and config.keep.metric == HELD_OUT and config.checkpoint_every
    return (config.held_out_split, config.held_out_rows) if wanted else None


def _tokens(context: TrainContext, tokenizer: Any, split: str, max_rows: int, raw: bool) -> Tokens:
    path = split_file(context, split)
    # One rank of the node works while the others wait, so it may use all their processors.
    processes = int(context.config.cpus_per_worker * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    spec = TokenSpec(path, context.base_dir, longest(context), context.config.loss_on_all, max_rows, processes, raw)
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
    return SFTConfig(**arguments(context, rows), max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
