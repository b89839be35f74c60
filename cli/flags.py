"""Job files written as flags: from options to the specs of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cli.failures import USAGE, Failure
from cli.jobfile import fill
from cli.values import duration, pairs
from luthier.v1 import sweep_pb2, training_pb2
from luthier.v1.job_pb2 import Job, Placement
from luthier.v1.sweep_pb2 import SearchDimension
from luthier.v1.training_pb2 import FinetuneSpec, Hyperparameters, LoraConfig


class PrecisionName(StrEnum):
    """Number formats."""

    fp32 = "fp32"
    bf16 = "bf16"


class LossOnName(StrEnum):
    """What is learned."""

    completion = "completion"
    all = "all"


class AlgorithmName(StrEnum):
    """How a sweep searches."""

    grid = "grid"
    random = "random"
    asha = "asha"


SecretOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Environment variable of the job's processes and the secret that fills it, HF_TOKEN=hub; may be repeated.",
        metavar="VARIABLE=SECRET",
    ),
]


@dataclass
class JobFlags:
    """What every job can be given."""

    name: Annotated[str, typer.Option(help="A person's name for the job.")] = ""
    label: Annotated[list[str] | None, typer.Option(help="Free pair key=value; may be repeated.", metavar="KEY=VALUE")] = None
    priority: Annotated[int, typer.Option(help="-100 to 100; more starts sooner.")] = 0
    time_limit: Annotated[str, typer.Option(help="Stop and fail it after this long: 90s, 30m, 2h.")] = ""
    after: Annotated[list[str] | None, typer.Option(help="Job that has to succeed first; may be repeated.", metavar="JOB")] = None
    secret: SecretOption = None
    gpu_type: Annotated[
        list[str] | None, typer.Option(help="Type of accelerator that will do, H100; may be repeated.", metavar="TYPE")
    ] = None
    node_label: Annotated[
        list[str] | None,
        typer.Option(help="Label of a node, and its value: zone=a, zone=!a, zone=in(a,b); may be repeated.", metavar="KEY=VALUE"),
    ] = None
    max_retries: Annotated[int | None, typer.Option(help="Retries after faults of the machines; 2 where absent.")] = None
    budget_cpu_hours: Annotated[float | None, typer.Option(help="CPU-hours that it may spend; a fine-tune then finishes.")] = None
    budget_gpu_hours: Annotated[float | None, typer.Option(help="GPU-hours that it may spend; a fine-tune then finishes.")] = None
    request_id: Annotated[str, typer.Option(help="Makes the command safe to repeat: the same id gives the same job.")] = ""
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything and start nothing.")] = False
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job and print it as it ended.")] = False
    set: Annotated[
        list[str] | None,
        typer.Option(help="Any field of the job by its path, for example hyperparameters.seed=7.", metavar="PATH=VALUE"),
    ] = None


@dataclass
class FinetuneFlags:
    """A FinetuneSpec as options."""

    base: Annotated[
        str,
        typer.Option(help="builtin:tiny, a registered version (name@3), a hub id, or a local folder, which is uploaded first."),
    ]
    dataset: Annotated[str, typer.Option(help="Data set version, name@2, or name for the latest.")]
    method: Annotated[str, typer.Option(help="full, lora, rslora, dora, qlora, pretrain, dpo, kto, reward, grpo or rloo.")] = (
        "full"
    )
    output_model: Annotated[str, typer.Option(help="Model to register the result under; the data set's name where absent.")] = ""
    workers: Annotated[int, typer.Option(help="Number of workers (ranks).")] = 1
    cpus_per_worker: Annotated[float | None, typer.Option(help="Logical CPUs that each worker holds.")] = None
    gpus_per_worker: Annotated[float | None, typer.Option(help="GPUs that each worker holds.")] = None
    zero: Annotated[int | None, typer.Option(help="DeepSpeed ZeRO stage, 0 to 3.")] = None
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None
    min_workers: Annotated[int | None, typer.Option(help="Fewest workers to start with where there is room for no more.")] = None
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; wins over --epochs.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Rows per worker and micro-step.")] = None
    gradient_accumulation: Annotated[int | None, typer.Option(help="Micro-steps per optimiser step.")] = None
    max_length: Annotated[int | None, typer.Option(help="Tokens per row.")] = None
    warmup_ratio: Annotated[float | None, typer.Option(help="Part of all steps over which the learning rate rises.")] = None
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled weight decay.")] = None
    max_grad_norm: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None
    scheduler: Annotated[str | None, typer.Option(help="linear, cosine or constant.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and dropout.")] = None
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Train an adapter with its defaults (pretrain, dpo, kto, grpo, rloo).")
    ] = False
    beta: Annotated[
        float | None, typer.Option(help="How much is held to the model that training starts from (dpo, kto, grpo, rloo).")
    ] = None
    preference_loss: Annotated[str, typer.Option(help="Loss of dpo or kto; sigmoid and kto where absent.")] = ""
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="What an answer is worth (grpo, rloo): exact_match, similarity, numeric, numeric=TOLERANCE, regex=PATTERN, "
            "json_schema=FILE, reward_model=VERSION or function=FILE.py. Several add up.",
            metavar="KIND[=VALUE]",
        ),
    ] = None
    num_generations: Annotated[int | None, typer.Option(help="Answers to each prompt (grpo, rloo).")] = None
    max_completion_length: Annotated[int | None, typer.Option(help="Tokens of an answer (grpo, rloo).")] = None
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter (lora).")] = None
    alpha: Annotated[float | None, typer.Option(help="Scale of the adapter (lora).")] = None
    dropout: Annotated[float | None, typer.Option(help="Dropout on the adapter's input (lora).")] = None
    target_modules: Annotated[str, typer.Option(help="Modules to adapt, joined by commas (lora).")] = ""
    precision: Annotated[PrecisionName | None, typer.Option(help="Number format of the weights.")] = None
    loss_on: Annotated[LossOnName | None, typer.Option(help="Part of a row that is learned.")] = None
    checkpoint_every: Annotated[int, typer.Option(help="Optimiser steps between checkpoints; 0 writes none.")] = 0
    keep_checkpoints: Annotated[int | None, typer.Option(help="Latest checkpoints to keep.")] = None
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not score the result.")] = False
    eval_before: Annotated[bool, typer.Option("--eval-before", help="Score the base too.")] = False
    eval_split: Annotated[str, typer.Option(help="Split to score on; test where absent.")] = ""
    eval_rows: Annotated[int, typer.Option(help="Most rows to score; 0 for all.")] = 0
    label_key: Annotated[str, typer.Option(help="Key of the JSON answer that holds the label.")] = ""
    generate: Annotated[bool, typer.Option("--generate", help="Score by greedy generation too.")] = False


@dataclass
class SweepFlags:
    """What a sweep adds to a fine-tune."""

    space: Annotated[
        list[str],
        typer.Option(
            help="What varies: learning_rate=log_uniform:1e-5:1e-3, batch_size=choice:4,8, lora.rank=integer:4:32, "
            "warmup_ratio=uniform:0:0.1. May be repeated.",
            metavar="FIELD=KIND:VALUES",
        ),
    ]
    algorithm: Annotated[AlgorithmName, typer.Option(help="How to search.")] = AlgorithmName.random
    trials: Annotated[int, typer.Option(help="Number of trials; the size of the grid where absent.")] = 0
    max_concurrent: Annotated[int, typer.Option(help="Trials at a time.")] = 1
    metric: Annotated[str, typer.Option(help="Figure to compare by; eval_loss where absent.")] = ""
    maximize: Annotated[bool | None, typer.Option("--maximize/--minimize", help="Whether more is better.")] = None
    search_seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None
    grace: Annotated[float | None, typer.Option(help="With asha: part of its steps before a trial is first judged.")] = None


# Options that were not given stay unset, so that the coordinator's defaults apply.
HYPERPARAMETERS = {
    "lr": "learning_rate",
    **{
        name: name
        for name in (
            *("epochs", "max_steps", "batch_size", "gradient_accumulation", "max_length", "warmup_ratio", "weight_decay"),
            *("max_grad_norm", "scheduler", "seed"),
        )
    },
}


# Kind of reward -> the field that its value goes to, and whether it needs one.
REWARD_VALUES = {
    "exact_match": ("", False),
    "similarity": ("", False),
    "numeric": ("absolute_tolerance", False),
    "regex": ("pattern", True),
    "json_schema": ("schema", True),
    "reward_model": ("model", True),
    "function": ("source", True),
}


def _set(message: Any, **values: Any) -> None:
    for name, value in values.items():
        if value is None:
            continue
        try:
            setattr(message, name, value)
        except ValueError as error:
            raise Failure(f"{name}: {value} does not fit ({error})", USAGE) from error


def finetune_spec(flags: FinetuneFlags) -> FinetuneSpec:
    """The spec that the options stand for."""
    spec = FinetuneSpec(base=flags.base, dataset=flags.dataset, method=flags.method, output_model=flags.output_model)
    _set(spec, workers=flags.workers, min_workers=flags.min_workers)
    _set(spec.hyperparameters, **{field: getattr(flags, option) for option, field in HYPERPARAMETERS.items()})
    _set(spec.worker_resources, cpus=flags.cpus_per_worker, gpus=flags.gpus_per_worker)
    _set(spec.sharding, zero_stage=flags.zero)
    _set(spec.lora, rank=flags.rank, alpha=flags.alpha, dropout=flags.dropout)
    if flags.adapter:
        spec.lora.SetInParent()
    reinforced = flags.method in ("grpo", "rloo")
    _set(spec.preference, beta=None if reinforced else flags.beta, loss=flags.preference_loss or None)
    _set(
        spec.reinforcement,
        beta=flags.beta if reinforced else None,
        num_generations=flags.num_generations,
        max_completion_length=flags.max_completion_length,
    )
    if flags.reward:
        spec.reinforcement.rewards.extend(map(reward, flags.reward))
    if modules := [name.strip() for name in flags.target_modules.split(",") if name.strip()]:
        spec.lora.target_modules.extend(modules)
    _set(spec.checkpoints, every_steps=flags.checkpoint_every or None, keep=flags.keep_checkpoints)
    _set(
        spec.evaluation,
        disabled=flags.no_eval or None,
        before=flags.eval_before or None,
        split=flags.eval_split or None,
        max_rows=flags.eval_rows or None,
        label_key=flags.label_key or None,
        generate=flags.generate or None,
    )
    if flags.precision:
        spec.precision = training_pb2.Precision.Value(f"PRECISION_{flags.precision.value.upper()}")
    if flags.loss_on:
        spec.loss_on = training_pb2.LossOn.Value(f"LOSS_ON_{flags.loss_on.value.upper()}")
    return spec


def reward(text: str) -> training_pb2.Reward:
    """`regex=PATTERN` and the like as a reward. Raises Failure naming what cannot be read."""
    kind, _, value = text.partition("=")
    found = training_pb2.Reward()
    if kind not in REWARD_VALUES:
        raise Failure(f"--reward {text[:80]}: there is no reward {kind[:40]!r}; use {', '.join(REWARD_VALUES)}", USAGE)
    field, needed = REWARD_VALUES[kind]
    if (needed and not value) or (value and not field):
        raise Failure(
            f"--reward {text[:80]}: {kind} {f'needs a value, {kind}={field.upper()}' if needed else 'takes no value'}", USAGE
        )
    settings = getattr(found, kind)
    settings.SetInParent()
    try:
        if field in ("schema", "source"):
            value = Path(value).read_text(encoding="utf-8")
        if value:
            setattr(settings, field, float(value) if field == "absolute_tolerance" else value)
    except (OSError, ValueError) as error:
        raise Failure(f"--reward {text[:80]}: {error}", USAGE) from error
    return found


def sweep_spec(finetune: FinetuneSpec, flags: SweepFlags) -> sweep_pb2.SweepSpec:
    """The sweep over `finetune` that the options stand for."""
    spec = sweep_pb2.SweepSpec(
        finetune=finetune,
        algorithm=sweep_pb2.SweepAlgorithm.Value(f"SWEEP_ALGORITHM_{flags.algorithm.value.upper()}"),
        metric=flags.metric,
    )
    _set(spec, trials=flags.trials, max_concurrent_trials=flags.max_concurrent)
    _set(spec, maximize=flags.maximize, seed=flags.search_seed, grace=flags.grace)
    for field, text in pairs(flags.space, "--space", separator="").items():
        spec.space[space_path(field)].CopyFrom(dimension(field, text))
    return spec


def space_path(field: str) -> str:
    """`learning_rate` as the path hyperparameters.learning_rate; a path stays what it is."""
    if "." in field:
        return field
    if field in HYPERPARAMETERS:
        field = HYPERPARAMETERS[field]
    if field in Hyperparameters.DESCRIPTOR.fields_by_name:
        return f"hyperparameters.{field}"
    if field in LoraConfig.DESCRIPTOR.fields_by_name:
        return f"lora.{field}"
    return field


def dimension(field: str, text: str) -> SearchDimension:
    """`log_uniform:1e-5:1e-3` and the like as a dimension."""
    kind, _, rest = text.partition(":")
    try:
        match kind, rest.split(":"):
            case "choice", _ if rest:
                return SearchDimension(choice=sweep_pb2.Choice(values=[value.strip() for value in rest.split(",")]))
            case "uniform", [low, high]:
                return SearchDimension(uniform=sweep_pb2.UniformRange(min=float(low), max=float(high)))
            case "log_uniform", [low, high]:
                return SearchDimension(log_uniform=sweep_pb2.LogUniformRange(min=float(low), max=float(high)))
            case "integer", [low, high]:
                return SearchDimension(integer=sweep_pb2.IntegerRange(min=int(low), max=int(high)))
    except ValueError as error:
        raise Failure(f"--space {field}: {rest!r} holds something that is not a number", USAGE) from error
    raise Failure(
        f"--space {field}: {text!r} is none of choice:A,B,C, uniform:MIN:MAX, log_uniform:MIN:MAX, integer:MIN:MAX", USAGE
    )


def dress(job: Job, flags: JobFlags) -> Job:
    """Put what every job can be given on a job, `--set` last."""
    job.display_name = flags.name
    _set(job, priority=flags.priority)
    job.after.extend(flags.after or ())
    for key, value in pairs(flags.label or (), "--label", separator="").items():
        job.labels[key] = value
    for variable, name in pairs(flags.secret or (), "--secret", separator="").items():
        job.secrets[variable] = name
    job.placement.gpu_types.extend(flags.gpu_type or ())
    for label, condition in pairs(flags.node_label or (), "--node-label", separator="").items():
        job.placement.node_labels[label] = condition
    if job.placement == Placement():
        job.ClearField("placement")
    _set(job.retry, max_retries=flags.max_retries)
    _set(job.budget, cpu_seconds=_seconds(flags.budget_cpu_hours), gpu_seconds=_seconds(flags.budget_gpu_hours))
    if flags.time_limit:
        job.time_limit.FromMicroseconds(round(duration(flags.time_limit, "--time-limit") * 1e6))
    for path, value in pairs(flags.set or (), "--set", separator="").items():
        set_path(job, path, value)
    return job


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else hours * 3600


def set_path(job: Job, path: str, value: str) -> None:
    """Set a field by its path, from the job or from its spec, to a value written as in a job file."""
    try:
        content: Any = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise Failure(f"--set {path}: {value!r} is not a value", USAGE) from error
    names = path.split(".")
    spec = job.WhichOneof("spec")
    if spec and names[0] not in Job.DESCRIPTOR.fields_by_name:
        names = [spec, *names]
        # A sweep is mostly a fine-tune.
        if spec == "sweep" and names[1] not in sweep_pb2.SweepSpec.DESCRIPTOR.fields_by_name:
            names.insert(1, "finetune")
    for name in reversed(names):
        content = {name: content}
    fill(job, content, "job", "--set", {})
