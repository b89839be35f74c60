"""Method `dpo`: of two answers to a prompt, the chosen one becomes likelier than the rejected one (Rafailov et al., 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from agents.training.answers import open_pairs
from agents.training.context import TrainContext, TrainedModel
from agents.training.distributed import sums
from agents.training.methods.preference import answer_logprobs, run_preference
from agents.training.methods.trainer import WatchedTrainer, arguments, longest


class _Trainer(WatchedTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class DpoMethod:
    """Direct preference optimisation of all weights, or of an adapter."""

    name = "dpo"
    model_kind = "full"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        return run_preference(
            context, _Trainer, open_pairs, lambda rows: _arguments(context, rows), lambda *given: held_out(*given, context)
        )


def held_out(trainer: Any, rows: Any, context: TrainContext) -> dict[str, float]:
    """How often the chosen answer is the likelier one, and what sets it apart from the reference. Collective."""
    model, beta = trainer.model_wrapped, context.config.preference.beta
    model.eval()
    total = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(rows):
            inputs = trainer._prepare_inputs(batch)
            chosen, rejected = answer_logprobs(model, inputs).double().chunk(2)
            reference = [part.double() for part in trainer.compute_ref_log_probs(trainer.ref_model or model, inputs)]
            margin = beta * ((chosen - rejected) - (reference[0] - reference[1]))
            total += torch.stack(
                [
                    (chosen > rejected).sum(),
                    (margin > 0).sum(),
                    margin.sum(),
                    -logsigmoid(margin).sum(),
                    torch.tensor(len(chosen), device=margin.device),
                ]
            ).cpu()
    model.train()
    likelier, right, margin, loss, count = sums(total.tolist(), context.use_gpu)
    return {
        "preference_accuracy": likelier / count,
        "reward_accuracy": right / count,
        "reward_margin": margin / count,
        "eval_loss": loss / count,
    }


def _arguments(context: TrainContext, rows: int) -> DPOConfig:
    settings = context.config.preference
    return DPOConfig(
        **arguments(context, rows),
        beta=settings.beta,
        loss_type=[settings.loss],
        label_smoothing=settings.label_smoothing,
        max_length=longest(context),
        disable_dropout=True,
    )
