"""The settings of one fine-tune: a FinetuneSpec with every default filled in and every number checked. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from google.protobuf.json_format import MessageToDict

from common import methods
from common.errors import InvalidArgument, Violation
from common.keeping import Keep
from luthier.v1 import training_pb2

SCHEDULERS = ("linear", "cosine", "constant")
TINY = "builtin:tiny"
PrecisionName = Literal["auto", "fp32", "bf16"]
PackingName = Literal["auto", "off", "on"]
_PRECISIONS: dict[int, PrecisionName] = {
    training_pb2.PRECISION_UNSPECIFIED: "auto",
    training_pb2.PRECISION_FP32: "fp32",
    training_pb2.PRECISION_BF16: "bf16",
}
_PACKINGS: dict[int, PackingName] = {
    training_pb2.PACKING_UNSPECIFIED: "auto",
    training_pb2.PACKING_AUTO: "auto",
    training_pb2.PACKING_OFF: "off",
    training_pb2.PACKING_ON: "on",
}


@dataclass(frozen=True)
class LoraSettings:
    """Shape of a low-rank adapter. No target modules: every linear layer but the head."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    rank_stabilized: bool = False
    decompose: bool = False


@dataclass(frozen=True)
class PreferenceSettings:
    """How preferences are learned."""

    beta: float = 0.1
    loss: str = ""
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class ReinforcementSettings:
    """How rewards are learned from. Each of `rewards` is a training_pb2.Reward."""

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    beta: float = 0.0
    rewards: tuple[training_pb2.Reward, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides how a fine-tune runs. Build it with `TrainConfig.of(spec)`, which checks it."""

    method: str
    learning_rate: float
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 512
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scheduler: str = "linear"
    seed: int = 42
    lora: LoraSettings = field(default_factory=LoraSettings)
    zero_stage: int = 2
    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    checkpoint_every: int = 0
    keep: Keep = field(default_factory=Keep)
    held_out_split: str = "test"
    held_out_rows: int = 0
    loss_on_all: bool = False
    precision: PrecisionName = "auto"
    packing: PackingName = "auto"
    adapter: bool = False
    score: bool = True
    preference: PreferenceSettings = field(default_factory=PreferenceSettings)
    reinforcement: ReinforcementSettings = field(default_factory=ReinforcementSettings)

    @classmethod
    def of(cls, spec: training_pb2.FinetuneSpec) -> TrainConfig:
        """Fill in the defaults of a spec and check it. Raises InvalidArgument with the paths of the fields to blame."""
        hyper, lora, resources = spec.hyperparameters, spec.lora, spec.worker_resources
        method = spec.method or "full"
        check_enums(spec)
        rank = _given(lora, "rank", 16)
        adapter = methods.trains_adapter(spec)
        config = cls(
            method=method,
            learning_rate=_given(hyper, "learning_rate", default_learning_rate(spec.base, method, adapter)),
            epochs=_given(hyper, "epochs", 3.0),
            max_steps=_given(hyper, "max_steps", -1),
            batch_size=_given(hyper, "batch_size", 8),
            gradient_accumulation=_given(hyper, "gradient_accumulation", 1),
            max_length=_given(hyper, "max_length", 512),
            warmup_ratio=_given(hyper, "warmup_ratio", 0.03),
            weight_decay=_given(hyper, "weight_decay", 0.0),
            max_grad_norm=_given(hyper, "max_grad_norm", 1.0),
            scheduler=_given(hyper, "scheduler", "linear"),
            seed=_given(hyper, "seed", 42),
            lora=LoraSettings(
                rank,
                _given(lora, "alpha", 2.0 * max(rank, 1)),
                _given(lora, "dropout", 0.0),
                tuple(lora.target_modules),
                lora.rank_stabilized or method == "rslora",
                lora.decompose or method == "dora",
            ),
            zero_stage=_given(spec.sharding, "zero_stage", 2),
            workers=spec.workers or 1,
            cpus_per_worker=_given(resources, "cpus", 1.0),
            gpus_per_worker=_given(resources, "gpus", None),
            checkpoint_every=spec.checkpoints.every_steps,
            keep=Keep.of(MessageToDict(spec.checkpoints, preserving_proto_field_name=True)),
            held_out_split=spec.evaluation.split or "test",
            held_out_rows=spec.evaluation.max_rows,
            loss_on_all=spec.loss_on == training_pb2.LOSS_ON_ALL,
            precision=_PRECISIONS[spec.precision],
            packing=_PACKINGS[spec.packing],
            adapter=adapter,
            score=not spec.evaluation.disabled,
            preference=_preference(spec),
            reinforcement=_reinforcement(spec),
        )
        given = {name: spec.checkpoints.HasField(name) for name in ("keep_best", "keep_every")}
        given["metric"] = bool(spec.checkpoints.metric)
        violations = config.violations(given=hyper) + config.keep.violations(given, "checkpoints")
        if violations := violations + methods.violations(spec, ""):
            raise InvalidArgument.of(violations)
        return config

    def violations(self, given: training_pb2.Hyperparameters | None = None) -> list[Violation]:
        """Everything that is wrong with the numbers, by field of the FinetuneSpec."""
        hyper, has = "hyperparameters", given.HasField if given is not None else (lambda _: False)
        checks: list[tuple[bool, str, str]] = [
            (_positive(self.learning_rate), f"{hyper}.learning_rate", "has to be a number above 0"),
            (_positive(self.epochs), f"{hyper}.epochs", "has to be a number above 0"),
            (self.max_steps > 0 or not has("max_steps"), f"{hyper}.max_steps", "has to be at least 1"),
            (self.batch_size > 0, f"{hyper}.batch_size", "has to be at least 1"),
            (self.gradient_accumulation > 0, f"{hyper}.gradient_accumulation", "has to be at least 1"),
            (self.max_length >= 2, f"{hyper}.max_length", "has to be at least 2"),
            (0 <= self.warmup_ratio <= 1, f"{hyper}.warmup_ratio", "has to be between 0 and 1"),
            (self.weight_decay >= 0 and math.isfinite(self.weight_decay), f"{hyper}.weight_decay", "has to be 0 or more"),
            (_positive(self.max_grad_norm), f"{hyper}.max_grad_norm", "has to be a number above 0"),
            (self.scheduler in SCHEDULERS, f"{hyper}.scheduler", f"has to be one of {', '.join(SCHEDULERS)}"),
            (0 <= self.seed < 2**32, f"{hyper}.seed", "has to be between 0 and 4294967295"),
            (1 <= self.lora.rank <= 1024, "lora.rank", "has to be between 1 and 1024"),
            (_positive(self.lora.alpha), "lora.alpha", "has to be a number above 0"),
            (0 <= self.lora.dropout < 1, "lora.dropout", "has to be 0 or more and below 1"),
            (self.zero_stage in (0, 1, 2, 3), "sharding.zero_stage", "has to be 0, 1, 2 or 3"),
            (1 <= self.workers <= 4096, "workers", "has to be between 1 and 4096"),
            (_positive(self.cpus_per_worker), "worker_resources.cpus", "has to be a number above 0"),
            (_whole(self.gpus_per_worker), "worker_resources.gpus", "has to be a whole number, 0 or more"),
            (self.checkpoint_every >= 0, "checkpoints.every_steps", "has to be 0 or more"),
        ]
        return [Violation(path, text) for good, path, text in checks if not good]

    def _method_parameters(self) -> dict[str, Any]:
        settings = methods.METHODS[self.method].settings if self.method in methods.METHODS else ""
        if settings == "preference":
            names: tuple[str, ...] = ("beta", "loss")
            names += ("label_smoothing",) if self.method == "dpo" else ("desirable_weight", "undesirable_weight")
            return {f"preference.{name}": getattr(self.preference, name) for name in names}
        if settings == "reinforcement":
            names = ("num_generations", "max_completion_length", "temperature", "top_p", "beta")
            used = {f"reinforcement.{name}": getattr(self.reinforcement, name) for name in names}
            worth = [f"{methods.reward_name(each)}*{_given(each, 'weight', 1.0):g}" for each in self.reinforcement.rewards]
            return used | {"reinforcement.rewards": ",".join(worth)}
        return {}

    def parameters(self) -> dict[str, str]:
        """The hyperparameters that were used, by their paths in a FinetuneSpec, for the lineage of the model."""
        hyper = {
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "gradient_accumulation": self.gradient_accumulation,
            "max_length": self.max_length,
            "warmup_ratio": self.warmup_ratio,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "scheduler": self.scheduler,
            "seed": self.seed,
        }
        hyper |= {"max_steps": self.max_steps} if self.max_steps > 0 else {"epochs": self.epochs}
        used: dict[str, Any] = {f"hyperparameters.{name}": value for name, value in hyper.items()}
        used |= {"sharding.zero_stage": self.zero_stage, "workers": self.workers}
        used["loss_on"] = "LOSS_ON_ALL" if self.loss_on_all else "LOSS_ON_COMPLETION"
        if self.adapter:
            used |= {"lora.rank": self.lora.rank, "lora.alpha": self.lora.alpha, "lora.dropout": self.lora.dropout}
            used["lora.target_modules"] = ",".join(self.lora.target_modules) or "all-linear"
            used |= {f"lora.{name}": "true" for name in ("rank_stabilized", "decompose") if getattr(self.lora, name)}
        used |= self._method_parameters()
        return {path: f"{value:g}" if isinstance(value, float) else str(value) for path, value in used.items()}


def default_learning_rate(base: str, method: str, adapter: bool = False) -> float:
    """The peak learning rate where none is given: smaller where what is there already is only to be shifted."""
    shifted = method in methods.METHODS and bool(methods.METHODS[method].settings)
    if base == TINY:
        return 1e-4 if shifted else 1e-3
    if shifted:
        return 1e-5 if adapter else 1e-6
    return 2e-4 if adapter else 5e-5


def _preference(spec: training_pb2.FinetuneSpec) -> PreferenceSettings:
    given = spec.preference
    return PreferenceSettings(
        beta=_given(given, "beta", 0.1),
        loss=given.loss or ("kto" if spec.method == "kto" else "sigmoid"),
        label_smoothing=_given(given, "label_smoothing", 0.0),
        desirable_weight=_given(given, "desirable_weight", 1.0),
        undesirable_weight=_given(given, "undesirable_weight", 1.0),
    )


def _reinforcement(spec: training_pb2.FinetuneSpec) -> ReinforcementSettings:
    given = spec.reinforcement
    return ReinforcementSettings(
        num_generations=_given(given, "num_generations", 8),
        max_completion_length=_given(given, "max_completion_length", 256),
        temperature=_given(given, "temperature", 1.0),
        top_p=_given(given, "top_p", 1.0),
        beta=methods.divergence_weight(spec),
        rewards=tuple(given.rewards),
    )


def check_enums(spec: training_pb2.FinetuneSpec) -> None:
    """Raise InvalidArgument for enum numbers that this version does not know."""
    unknown = [
        Violation(name, f"{getattr(spec, name)} is not a known value; use one of {', '.join(kind.keys()[1:])}")
        for name, kind in _ENUMS.items()
        if getattr(spec, name) not in kind.values()
    ]
    if unknown:
        raise InvalidArgument.of(unknown)


_ENUMS: Mapping[str, Any] = {"precision": training_pb2.Precision, "loss_on": training_pb2.LossOn, "packing": training_pb2.Packing}


def _given(message: Any, name: str, default: Any) -> Any:
    return getattr(message, name) if message.HasField(name) else default


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _whole(value: float | None) -> bool:
    return value is None or (math.isfinite(value) and value >= 0 and value == int(value))
