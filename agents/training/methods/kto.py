"""Method `kto`: desired answers become likelier and others less so, without pairs (KTO, Ethayarajh et al., 2024)."""

from __future__ import annotations

from typing import Any

import torch
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from agents.training.answers import open_judged
from agents.training.context import TrainContext, TrainedModel
from agents.training.distributed import gather
from agents.training.methods.preference import answer_logprobs, run_preference
from agents.training.methods.trainer import WatchedTrainer, arguments, longest


class _Collator(DataCollatorForUnpairedPreference):  # type: ignore[misc]
    """TRL's, which also gives each prompt the answer of the row before it: by these the divergence is estimated.

    TRL makes them when it prepares the rows, which ties them to an order that never changes; here they follow the micro-batch.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of the examples."""
        answers = [example["completion_ids"] for example in examples]
        others = [answers[-1], *answers[:-1]]
        mismatched = [{**example, "KL_completion_ids": other} for example, other in zip(examples, others, strict=True)]
        batch: dict[str, Any] = super().torch_call(mismatched)
        return batch


class _Trainer(WatchedTrainer, KTOTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are tokenised already."""

    def __init__(self, *given: Any, **named: Any) -> None:
        tokenizer, args = named["processing_class"], named["args"]
        super().__init__(*given, data_collator=_Collator(tokenizer.pad_token_id, args.max_length), **named)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class KtoMethod:
    """Kahneman-Tversky optimisation of all weights, or of an adapter."""

    name = "kto"
    model_kind = "full"

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank."""
        return run_preference(context, _Trainer, open_judged, lambda rows: _arguments(context, rows), _measure)


def _measure(trainer: Any, rows: Any) -> dict[str, float]:
    """How often a desired answer has gained more on the reference than one that is not, over all pairs of the two. Collective."""
    model = trainer.model_wrapped
    model.eval()
    gained: list[tuple[float, bool]] = []
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(rows):
            inputs = trainer._prepare_inputs(batch)
            reference, _ = trainer.compute_ref_log_probs(trainer.ref_model or model, inputs)
            rewards = trainer.beta * (answer_logprobs(model, inputs).double() - reference.double())
            gained += zip(rewards.tolist(), inputs["label"].bool().tolist(), strict=True)
    model.train()
    everything = [each for part in gather(gained) for each in part]
    good = torch.tensor([reward for reward, desired in everything if desired], dtype=torch.float64)
    bad = torch.tensor([reward for reward, desired in everything if not desired], dtype=torch.float64)
    if not len(good) or not len(bad):
        return {}
    apart = good[:, None] - bad[None, :]
    # Equal ones count half: at the start all are.
    right = (apart > 0).double().mean() + 0.5 * (apart == 0).double().mean()
    return {"reward_accuracy": float(right), "reward_margin": float(good.mean() - bad.mean())}


def _arguments(context: TrainContext, rows: int) -> KTOConfig:
    settings = context.config.preference
    return KTOConfig(
        **arguments(context, rows),
        beta=settings.beta,
        loss_type=settings.loss,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        max_length=longest(context),
        disable_dropout=True,
    )
