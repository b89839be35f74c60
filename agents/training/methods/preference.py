"""What the methods that learn from preferences share: policy and reference, held-out figures, and the run from begin to end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import PrinterCallback

from agents.training.answers import Answers
from agents.training.callbacks import RunCallback
from agents.training.context import TrainContext, TrainedModel
from agents.training.kernels import fuse_layers
from agents.training.methods.held_out import HeldOut
from agents.training.methods.lora import adapter_shape
from agents.training.methods.trainer import (
    begin,
    dtype,
    has_split,
    longest,
    save,
    score_targets_only,
    split_file,
    train,
    train_figures,
)
from agents.training.packing import StepOrder

logger = logging.getLogger(__name__)

Open = Callable[..., Answers]
Measure = Callable[[Any, Any], dict[str, float]]


def load_model(context: TrainContext) -> Any:
    """The base model, as it is trained."""
    return AutoModelForCausalLM.from_pretrained(
        context.base_dir, dtype=dtype(context), use_safetensors=True, trust_remote_code=False, local_files_only=True
    )


def run_preference(
    context: TrainContext,
    trainer_class: Any,
    open_rows: Open,
    arguments: Callable[[int], Any],
    measure: Measure,
) -> TrainedModel:
    """Train on this rank and leave the model in the context's output folder. Every rank has to call it.

    `open_rows` reads a split, `arguments` makes the arguments of the trainer, `measure` scores held-out rows. Where an
    adapter is trained, the reference is the base without it; else a second, frozen copy of the base is held.
    """
    config = context.config
    tokenizer = begin(context)
    answers = _rows(context, open_rows, tokenizer, "train", 0)
    # The arguments come before the model: they hold the DeepSpeed config, which ZeRO-3 needs alive while weights are loaded.
    args = arguments(len(answers.dataset))
    model = load_model(context)
    fused = fuse_layers(model, context.use_gpu)
    score_targets_only()
    callback = RunCallback(context)
    trainer = trainer_class(
        model=model,
        ref_model=None if config.adapter else load_model(context),
        args=args,
        train_dataset=answers.dataset,
        processing_class=tokenizer,
        peft_config=adapter_shape(config) if config.adapter else None,
        callbacks=[callback],
    )
    callback.trainer, trainer.watch = trainer, context.watch
    trainer.order = StepOrder(
        answers.lengths, config.batch_size, config.gradient_accumulation, context.world_size, seed=config.seed, packed=False
    )
    trainer.remove_callback(PrinterCallback)
    held_out = hold_out(context, trainer, callback, lambda: _held_out_rows(context, open_rows, tokenizer), measure)
    reference = "the base without the adapter" if config.adapter else "a second copy of the base"
    rows = f"{len(answers.dataset)} rows"
    context.phase(
        "training", f"training {config.method} on {rows} with {context.world_size} workers against {reference}, {fused}"
    )
    seconds = train(context, trainer, callback)
    folder = save(context, trainer, callback, tokenizer)
    figures = train_figures(trainer, callback, seconds) | {
        "train_rows_left_out": float(answers.report.left_out),
        "train_rows_cut": float(answers.report.cut.count),
    }
    figures |= held_out.figures if held_out is not None else {}
    kind = "adapter" if config.adapter else "full"
    return TrainedModel(kind, folder, trainer.state.global_step, figures, callback.engine, callback.wish)


def hold_out(
    context: TrainContext, trainer: Any, callback: RunCallback, open_rows: Callable[[], Any | None], measure: Measure
) -> HeldOut | None:
    """Have held-out rows scored before training and after it, where scoring is not switched off and there are such rows."""
    rows = open_rows() if context.config.score else None
    if rows is None:
        return None
    callback.hold_out(lambda: measure(trainer, rows))
    held_out = HeldOut(context, callback, lambda: measure(trainer, rows))
    trainer.add_callback(held_out)
    return held_out


def answer_logprobs(model: Any, inputs: dict[str, Any], prefix: str = "") -> torch.Tensor:
    """Log-probability of each answer of a padded batch under a model with TRL's fused head."""
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
    return outputs.log_probs.sum(dim=1)


def _rows(context: TrainContext, open_rows: Open, tokenizer: Any, split: str, max_rows: int) -> Answers:
    answers = open_rows(split_file(context, split), tokenizer, longest(context), max_rows)
    if context.is_main:
        for text in answers.report.warnings():
            logger.warning("%s", text)
    return answers


def _held_out_rows(context: TrainContext, open_rows: Open, tokenizer: Any) -> Any | None:
    if not has_split(context):
        return None
    return _rows(context, open_rows, tokenizer, context.config.held_out_split, context.config.held_out_rows).dataset
