"""Method `reward`: a model that gives a chosen answer a higher score than a rejected one (Bradley and Terry, 1952)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer

from agents.training.answers import Answers, open_pairs
from agents.training.callbacks import RunCallback
from agents.training.context import TrainContext, TrainedModel
from agents.training.distributed import sums
from agents.training.kernels import fuse_layers
from agents.training.methods.preference import hold_out
from agents.training.methods.trainer import (
    WatchedTrainer,
    arguments,
    begin,
    dtype,
    has_split,
    longest,
    save,
    split_file,
    train,
    train_figures,
)
from agents.training.packing import StepOrder

logger = logging.getLogger(__name__)


class _Trainer(WatchedTrainer, RewardTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class RewardMethod:
    """A reward model of all weights: the base, with a head that gives one score."""

    name = "reward"
    model_kind = "reward"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        config = context.config
        tokenizer = begin(context)
        pairs = _pairs(context, tokenizer, "train", 0)
        # The arguments come before the model: they hold the DeepSpeed config, which ZeRO-3 needs alive while weights are loaded.
        args = RewardConfig(**arguments(context, len(pairs.dataset)), max_length=None, disable_dropout=True)
        # The head is new, and has to be the same on every rank.
        set_seed(config.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            context.base_dir,
            num_labels=1,
            dtype=dtype(context),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        fused = fuse_layers(model, context.use_gpu)
        callback = RunCallback(context)
        trainer = _Trainer(model=model, args=args, train_dataset=pairs.dataset, processing_class=tokenizer, callbacks=[callback])
        callback.trainer, trainer.watch = trainer, context.watch
        trainer.order = StepOrder(
            pairs.lengths, config.batch_size, config.gradient_accumulation, context.world_size, seed=config.seed, packed=False
        )
        trainer.remove_callback(PrinterCallback)
        held_out = hold_out(
            context,
            trainer,
            callback,
            lambda: _held_out_rows(context, tokenizer),
            lambda *given: _measure(*given, context.use_gpu),
        )
        rows = f"{len(pairs.dataset)} pairs"
        context.phase("training", f"training a reward model on {rows} with {context.world_size} workers, {fused}")
        seconds = train(context, trainer, callback)
        folder = save(context, trainer, callback, tokenizer)
        figures = train_figures(trainer, callback, seconds) | {
            "train_rows_left_out": float(pairs.report.left_out),
            "train_rows_cut": float(pairs.report.cut.count),
        }
        figures |= held_out.figures if held_out is not None else {}
        return TrainedModel(self.model_kind, folder, trainer.state.global_step, figures, callback.engine, callback.wish)


def _pairs(context: TrainContext, tokenizer: Any, split: str, max_rows: int) -> Answers:
    """Pairs with both answers after their prompt, each cut at the end."""
    length = longest(context)
    found = open_pairs(split_file(context, split), tokenizer, length, max_rows)
    if context.is_main:
        for text in found.report.warnings():
            logger.warning("%s", text)

    def whole(row: dict[str, Any]) -> dict[str, Any]:
        return {name: (row["prompt_ids"] + row[name])[:length] for name in ("chosen_ids", "rejected_ids")}

    return Answers(found.dataset.map(whole, remove_columns=["prompt_ids"]), found.lengths, found.report)


def _held_out_rows(context: TrainContext, tokenizer: Any) -> Any | None:
    if not has_split(context):
        return None
    return _pairs(context, tokenizer, context.config.held_out_split, context.config.held_out_rows).dataset


def _measure(trainer: Any, rows: Any, use_gpu: bool) -> dict[str, float]:
    """How often the chosen answer gets the higher score, and by how much. Collective."""
    model = trainer.model_wrapped
    model.eval()
    total = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(rows):
            scores = model(**trainer._prepare_inputs(batch), use_cache=False).logits[:, 0].double()
            chosen, rejected = scores.chunk(2)
            apart = chosen - rejected
            count = torch.tensor(len(apart), device=apart.device)
            total += torch.stack([(apart > 0).sum(), apart.sum(), -logsigmoid(apart).sum(), count]).cpu()
    model.train()
    right, apart, loss, count = sums(total.tolist(), use_gpu)
    return {"reward_accuracy": right / count, "reward_margin": apart / count, "eval_loss": loss / count}
