"""What a sweep varies: fields of a FinetuneSpec by path, and the values each may take. Neither Ray nor torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from agents.training.config import TrainConfig
from common.errors import InvalidArgument, Violation
from luthier.v1 import sweep_pb2, training_pb2

Value = int | float | str | bool

MOST_TRIALS = 1000
METRICS = ("eval_loss", "accuracy", "macro_f1")
DEFAULT_SEED = 42
DEFAULT_GRACE = 0.25
# The same for all trials: what is compared, on what, and what the scheduler has set aside for each.
FIXED = ("base", "dataset", "output_model", "workers", "worker_resources", "checkpoints", "evaluation")
_INTEGERS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)


@dataclass(frozen=True)
class Dimension:
    """One field that varies: a list of values, or a range that is drawn from. Values are of the field's own type."""

    path: str
    kind: str
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Search:
    """A checked sweep: what varies and how it is searched."""

    dimensions: tuple[Dimension, ...]
    algorithm: str
    trials: int
    concurrent: int
    metric: str
    maximize: bool
    seed: int
    grace: float

    @classmethod
    def of(cls, spec: sweep_pb2.SweepSpec, where: str = "job.sweep") -> Search:
        """Check a sweep and fill in its defaults. Raises InvalidArgument that names every bad field below `where`."""
        bad: list[Violation] = []
        dimensions = []
        for path, dimension in sorted(spec.space.items()):
            try:
                dimensions.append(_dimension(path, dimension))
            except ValueError as error:
                bad.append(Violation(f"{where}.space.{path[:80]}", str(error)))
        if not spec.space:
            bad.append(
                Violation(f"{where}.space", "is empty; name at least one field, for example hyperparameters.learning_rate")
            )
        grid = spec.algorithm == sweep_pb2.SWEEP_ALGORITHM_GRID
        names = {
            sweep_pb2.SWEEP_ALGORITHM_UNSPECIFIED: "random",
            sweep_pb2.SWEEP_ALGORITHM_GRID: "grid",
            sweep_pb2.SWEEP_ALGORITHM_RANDOM: "random",
            sweep_pb2.SWEEP_ALGORITHM_ASHA: "asha",
        }
        if spec.algorithm not in names:
            bad.append(Violation(f"{where}.algorithm", f"{spec.algorithm} is not a known algorithm; use grid, random or asha"))
        if grid:
            bad += [
                Violation(f"{where}.space.{one.path}", "a grid needs a choice of values here; list them, or use random")
                for one in dimensions
                if one.kind != "choice"
            ]
        trials = spec.trials
        if grid and not bad:
            size = grid_size(dimensions)
            if trials not in (0, size):
                bad.append(Violation(f"{where}.trials", f"is {trials}, but the grid has {size} combinations; leave it away"))
            trials = size
        if not 1 <= trials <= MOST_TRIALS and not bad:
            bad.append(Violation(f"{where}.trials", f"{trials} is not between 1 and {MOST_TRIALS}"))
        metric = spec.metric or METRICS[0]
        if metric not in METRICS:
            bad.append(Violation(f"{where}.metric", f"{metric[:80]!r} is none of {', '.join(METRICS)}"))
        if spec.max_concurrent_trials < 0:
            bad.append(Violation(f"{where}.max_concurrent_trials", f"{spec.max_concurrent_trials} is not at least 1"))
        grace = spec.grace if spec.HasField("grace") else DEFAULT_GRACE
        if not 0 < grace <= 1:
            bad.append(Violation(f"{where}.grace", f"{grace} is not above 0 and at most 1"))
        seed = spec.seed if spec.HasField("seed") else DEFAULT_SEED
        if not 0 <= seed < 2**32:
            bad.append(Violation(f"{where}.seed", f"{seed} is not between 0 and {2**32 - 1}"))
        if spec.finetune.evaluation.disabled:
            bad.append(
                Violation(
                    f"{where}.finetune.evaluation.disabled", "a sweep compares its trials by held-out scores; leave it away"
                )
            )
        if bad:
            raise InvalidArgument.of(bad)
        maximize = spec.maximize if spec.HasField("maximize") else metric != "eval_loss"
        concurrent = min(spec.max_concurrent_trials or 1, trials)
        return cls(tuple(dimensions), names[spec.algorithm], trials, concurrent, metric, maximize, seed, grace)


def grid_size(dimensions: list[Dimension] | tuple[Dimension, ...]) -> int:
    """Return the number of combinations of the choices."""
    return math.prod(len(one.values) for one in dimensions)


def with_values(spec: training_pb2.FinetuneSpec, values: Mapping[str, Value]) -> training_pb2.FinetuneSpec:
    """Return a copy of a fine-tune with the drawn values in their fields, by path."""
    changed = training_pb2.FinetuneSpec()
    changed.CopyFrom(spec)
    for path, value in values.items():
        *groups, last = path.split(".")
        message: Any = changed
        for group in groups:
            message = getattr(message, group)
        kind = _field(path).enum_type
        setattr(message, last, kind.values_by_name[str(value)].number if kind is not None else value)
    return changed


def settle(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return drawn values with floats rounded to six digits, so that a trial runs with the very numbers that it shows."""
    return {path: float(f"{value:.6g}") if isinstance(value, float) else value for path, value in sorted(values.items())}


def check_values(spec: training_pb2.FinetuneSpec, search: Search, where: str = "job.sweep") -> None:
    """Try every choice and both ends of every range in the fine-tune. Raises InvalidArgument that names what cannot run."""
    bad: list[Violation] = []
    for one in search.dimensions:
        ends = (int(one.low), int(one.high)) if one.kind == "integer" else (one.low, one.high)
        for value in one.values if one.kind == "choice" else ends:
            field = f"{where}.space.{one.path}"
            try:
                TrainConfig.of(with_values(spec, {one.path: value}))
            except InvalidArgument as error:
                about = [violation for violation in error.violations if violation.field == one.path]
                bad += [Violation(field, f"{as_text(value)}: {violation.description}") for violation in about]
                if not about:  # the fine-tune is wrong whatever the value
                    raise
            except ValueError as error:
                bad.append(Violation(field, f"{as_text(value)}: {error}"))
    if bad:
        raise InvalidArgument.of(bad)


def as_text(value: Value) -> str:
    """Write a drawn value as it would stand in a job file."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _dimension(path: str, given: sweep_pb2.SearchDimension) -> Dimension:
    field = _field(path)
    kind = given.WhichOneof("kind")
    if kind is None:
        raise ValueError("says no values; use one of choice, uniform, log_uniform, integer")
    if kind == "choice":
        values = tuple(_value(field, text) for text in given.choice.values)
        if not values:
            raise ValueError("is an empty choice")
        if len(set(values)) < len(values):
            raise ValueError("lists a value twice")
        return Dimension(path, kind, values)
    low, high = getattr(given, kind).min, getattr(given, kind).max
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"min {low} is not below max {high}")
    if kind == "log_uniform" and low <= 0:
        raise ValueError(f"min {low} of a logarithmic range is not above 0")
    if field.cpp_type not in _INTEGERS + _FLOATS:
        raise ValueError("takes no numbers; use a choice")
    if field.cpp_type in _INTEGERS and kind != "integer":
        raise ValueError("takes whole numbers; use integer, or a choice")
    return Dimension(path, kind, low=low, high=high)


def _field(path: str) -> FieldDescriptor:
    """Return the field of FinetuneSpec at a path. Raises ValueError where a sweep cannot vary it."""
    if path.split(".")[0] in FIXED:
        raise ValueError("is the same for all trials; vary hyperparameters, lora, sharding, method, loss_on or precision")
    descriptor = training_pb2.FinetuneSpec.DESCRIPTOR
    *groups, last = path.split(".")
    for group in groups:
        found = descriptor.fields_by_name.get(group)
        if found is None or found.message_type is None:
            raise ValueError("is no field of FinetuneSpec; a path looks like hyperparameters.learning_rate")
        descriptor = found.message_type
    field = descriptor.fields_by_name.get(last)
    if field is None or field.message_type is not None or field.is_repeated:
        raise ValueError(f"is no single value of FinetuneSpec; here there are {', '.join(sorted(descriptor.fields_by_name))}")
    return field


def _value(field: FieldDescriptor, text: str) -> Value:
    """Read a value of a choice as the field's own type. Raises ValueError that says what would be right."""
    if field.enum_type is not None:
        kind: EnumDescriptor = field.enum_type
        if text not in kind.values_by_name or kind.values_by_name[text].number == 0:
            raise ValueError(f"{text[:80]!r} is none of {', '.join(value.name for value in kind.values if value.number)}")
        return text
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return text
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if text not in ("true", "false"):
            raise ValueError(f"{text[:80]!r} is neither true nor false")
        return text == "true"
    try:
        number = int(text) if field.cpp_type in _INTEGERS else float(text)
    except ValueError:
        wanted = "whole number" if field.cpp_type in _INTEGERS else "number"
        raise ValueError(f"{text[:80]!r} is not a {wanted}") from None
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a finite number")
    return number
