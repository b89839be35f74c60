"""What the methods that learn from rewards share: prompts, rewards, the order of rows, held-out figures, and the run itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl.trainer.utils import RepeatSampler

from agents.training.callbacks import RunCallback
from agents.training.context import TrainContext, TrainedModel
from agents.training.kernels import fuse_layers
from agents.training.methods.lora import adapter_shape
from agents.training.methods.preference import hold_out, load_model
from agents.training.methods.trainer import arguments, begin, has_split, longest, save, split_file, train, train_figures
from agents.training.rewards.base import Answer, Named, check_references, make_rewards
from common.errors import InvalidArgument, Violation
from common.rows import Row, iter_split

logger = logging.getLogger(__name__)

# Every held-out prompt is answered twice in a run, which costs as much as training on it.
HELD_OUT_ROWS = 256
_FIGURES = {
    "eval_reward": "reward",
    "eval_completions/mean_length": "completion_length",
    "eval_completions/clipped_ratio": "completions_clipped",
}


class PromptOrder(RepeatSampler):  # type: ignore[misc]
    """Order of the prompts, each as often as it is answered: a function of seed and epoch, so that a run goes on anywhere."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is iterated next, counted from 0."""
        self.generator.manual_seed(self.seed + epoch)


def run_reinforcement(context: TrainContext, trainer_class: Any, config_class: Any) -> TrainedModel:
    """Train on this rank and leave the model in the context's output folder. Every rank has to call it."""
    settings = context.config.reinforcement
    rewards = make_rewards(settings.rewards, context.models, "cuda" if context.use_gpu else "cpu")
    try:
        return _run(context, trainer_class, config_class, rewards)
    finally:
        for each in rewards:
            each.reward.close()


def _run(context: TrainContext, trainer_class: Any, config_class: Any, rewards: Sequence[Named]) -> TrainedModel:
    config, settings = context.config, context.config.reinforcement
    tokenizer = begin(context)
    rows, left_out = _prompts(context, tokenizer, "train", 0, rewards)
    answers = config.batch_size * config.gradient_accumulation * context.world_size
    prompts = answers // settings.num_generations
    if len(rows) < prompts:
        why = f"a step takes {prompts} prompts, {settings.num_generations} answers each, train has {len(rows)}; lower batch_size"
        raise InvalidArgument(why, "BAD_DATA", [Violation("hyperparameters.batch_size", why)])
    # The arguments come before the model: they hold the DeepSpeed config, which ZeRO-3 needs alive while weights are loaded.
    args = config_class(
        **arguments(context, len(rows) * settings.num_generations),
        num_generations=settings.num_generations,
        num_generations_eval=1,
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        beta=settings.beta,
        reward_weights=[each.weight for each in rewards],
        disable_dropout=True,
        use_vllm=False,
    )
    model = load_model(context)
    fused = fuse_layers(model, context.use_gpu)
    callback = RunCallback(context)
    trainer = trainer_class(
        model=model,
        reward_funcs=[_function(each) for each in rewards],
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter_shape(config) if config.adapter else None,
        callbacks=[callback],
    )
    callback.trainer, trainer.watch = trainer, context.watch
    trainer.order = PromptOrder(
        rows, settings.num_generations, prompts, config.gradient_accumulation, shuffle=True, seed=config.seed
    )
    trainer.remove_callback(PrinterCallback)
    held_out = hold_out(context, trainer, callback, lambda: _held_out_rows(context, tokenizer, rewards), _measure)
    worth = " + ".join(f"{each.weight:g} {each.name}" for each in rewards)
    words = f"{len(rows)} prompts, {settings.num_generations} answers each, worth {worth}"
    context.phase("training", f"training {config.method} on {words}, with {context.world_size} workers, {fused}")
    seconds = train(context, trainer, callback)
    folder = save(context, trainer, callback, tokenizer)
    figures = train_figures(trainer, callback, seconds) | {"train_rows_left_out": float(left_out)}
    figures |= held_out.figures if held_out is not None else {}
    kind = "adapter" if config.adapter else "full"
    return TrainedModel(kind, folder, trainer.state.global_step, figures, callback.engine, callback.wish)


def _prompts(context: TrainContext, tokenizer: Any, split: str, max_rows: int, rewards: Sequence[Named]) -> tuple[Dataset, int]:
    """The prompts of a split as the trainer takes them, and how many are left out because an answer would not fit."""
    room = longest(context) - context.config.reinforcement.max_completion_length
    kept: list[dict[str, Any]] = []
    long: list[int] = []
    seen = list(islice(iter_split(split_file(context, split)), max_rows or None))
    for row in seen:
        prompt = _prompt(row) if tokenizer.chat_template else "".join(message["content"] for message in _prompt(row))
        if len(_tokens(tokenizer, prompt)) > room:
            long.append(row.line)
        else:
            kept.append({"prompt": prompt, "answer": _reference(row), "line": row.line})
    check_references(rewards, [(row.line, _reference(row)) for row in seen], split)
    if not kept:
        why = f"none of the {len(seen)} prompts of {split!r} leaves room for an answer: they may have {room} tokens"
        advice = "raise hyperparameters.max_length or lower reinforcement.max_completion_length"
        raise InvalidArgument(f"{why}; {advice}", "BAD_DATA", [Violation(f"{split} line {line}", why) for line in long[:20]])
    if long and context.is_main:
        lines = ", ".join(map(str, long[:20])) + (", ..." if len(long) > 20 else "")
        logger.warning(
            "%d of %d prompts of %r are left out, as they have over %d tokens: %s", len(long), len(seen), split, room, lines
        )
    return Dataset.from_list(kept), len(long)


def _prompt(row: Row) -> list[dict[str, str]]:
    if row.messages is None:
        return [{"role": "user", "content": row.prompt}]
    return [{"role": message.role, "content": message.content} for message in row.messages[:-1]]


def _reference(row: Row) -> str:
    return row.completion if row.messages is None else row.messages[-1].content


def _tokens(tokenizer: Any, prompt: Any) -> Sequence[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]  # type: ignore[no-any-return]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


def _held_out_rows(context: TrainContext, tokenizer: Any, rewards: Sequence[Named]) -> Dataset | None:
    if not has_split(context):
        return None
    return _prompts(context, tokenizer, context.config.held_out_split, context.config.held_out_rows or HELD_OUT_ROWS, rewards)[0]


def _function(named: Named) -> Callable[..., list[float]]:
    """A reward as TRL calls it."""

    def judge(
        prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], line: Sequence[int], **_: Any
    ) -> list[float]:
        judged = [_answer(*each) for each in zip(prompts, completions, answer, line, strict=True)]
        return named.reward.score(judged)

    judge.__name__ = named.name
    return judge


def _answer(prompt: Any, completion: Any, reference: str, line: int) -> Answer:
    if isinstance(prompt, str):
        return Answer(prompt, completion, reference, line)
    messages: tuple[Mapping[str, str], ...] = tuple(prompt)
    return Answer(messages[-1]["content"], completion[-1]["content"], reference, line, messages)


def _measure(trainer: Any, rows: Dataset) -> dict[str, float]:
    """Mean reward, and that of each, of one answer to every held-out prompt, drawn as in training. Collective."""
    found = trainer.evaluate(rows)
    trainer.model.train()
    figures = {name: float(found[key]) for key, name in _FIGURES.items() if key in found}
    for name in trainer.reward_func_names:
        figures[f"reward_{name}"] = float(found[f"eval_rewards/{name}/mean"])
    return figures
