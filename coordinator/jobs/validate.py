"""What can be said of a job's fields without looking anything up."""

from __future__ import annotations

import math
import re

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from common import methods as known_methods
from common import placement
from common.errors import InvalidArgument, Violation
from common.keeping import Keep
from common.names import ID, ID_RULE
from coordinator.jobs import secrets as job_secrets
from luthier.v1 import evaluation_pb2, job_pb2, sweep_pb2, training_pb2

KINDS = ("finetune", "sweep", "evaluate", "import_model")
METHOD = re.compile(r"[a-z][a-z0-9_-]{0,62}")
SCHEDULERS = ("linear", "cosine", "constant")
MAX_WORKERS = 4096
MAX_TRIALS = 1000
MAX_AFTER = 100
METRICS = ("eval_loss", "accuracy", "macro_f1")


class Violations(list[Violation]):
    """Collects what is wrong, field by field."""

    def check(self, good: bool, field: str, description: str) -> None:
        """Note a violation of `field` unless `good`."""
        if not good:
            self.append(Violation(field, description))

    def number(
        self,
        message: Message,
        name: str,
        path: str,
        *,
        above: float = -math.inf,
        least: float = -math.inf,
        most: float = math.inf,
    ) -> None:
        """Check an optional number of `message`, where present: finite, > above, >= least, <= most."""
        if message.HasField(name):
            value = getattr(message, name)
            rule = "a finite number"
            rule += f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
            rule += f" and at most {most:g}" if most < math.inf else ""
            self.check(
                math.isfinite(value) and above < value and least <= value <= most, f"{path}.{name}", f"{value} is not {rule}"
            )


def validate(job: job_pb2.Job, methods: frozenset[str] | None = None) -> None:
    """Raise InvalidArgument naming every bad field of a job as it was sent.

    `methods` are the fine-tuning methods known; None leaves the name to the agent (a user's own method is found there).
    """
    bad = Violations()
    kind = job.WhichOneof("spec")
    if kind is None:
        raise InvalidArgument.of([Violation("job", f"say what to do: exactly one of {', '.join(KINDS)}")])
    bad.check(job.kind in ("", kind), "job.kind", f"{job.kind!r} but the spec given is {kind!r}")
    terms(bad, job)
    bad.check(len(job.after) <= MAX_AFTER, "job.after", f"more than {MAX_AFTER} jobs")
    bad.extend(job_secrets.violations(job.secrets))
    bad.extend(placement.violations(job.placement, "job.placement"))
    if kind == "finetune":
        finetune(bad, job.finetune, "job.finetune", methods)
    elif kind == "sweep":
        sweep(bad, job.sweep, "job.sweep", methods)
    elif kind == "evaluate":
        evaluate(bad, job.evaluate, "job.evaluate")
    else:
        bad.check(bool(job.import_model.source), "job.import_model.source", "missing")
        model_id(bad, job.import_model.output_model, "job.import_model.output_model", required=True)
    if bad:
        raise InvalidArgument.of(bad)


def terms(bad: Violations, job: job_pb2.Job) -> None:
    """Check what may be changed later too: priority, names, time limit, retry policy and budget."""
    bad.check(-100 <= job.priority <= 100, "job.priority", f"{job.priority} is not between -100 and 100")
    bad.check(len(job.display_name) <= 200, "job.display_name", "longer than 200 characters")
    bad.check(len(job.labels) <= 64, "job.labels", "more than 64 labels")
    for label, value in job.labels.items():
        bad.check(
            bool(re.fullmatch(r"[\w./-]{1,63}", label)) and len(value) <= 255,
            f"job.labels.{label[:63]}",
            "a label's key is 1 to 63 letters, digits, '.', '/', '_' or '-'; its value at most 255 characters",
        )
    if job.HasField("time_limit"):
        bad.check(_seconds(job.time_limit) > 0, "job.time_limit", "not above zero")
    if job.HasField("hang_timeout"):
        bad.check(_seconds(job.hang_timeout) >= 1, "job.hang_timeout", "less than a second")
    bad.number(job.retry, "max_retries", "job.retry", least=0, most=100)
    bad.number(job.budget, "cpu_seconds", "job.budget", above=0)
    bad.number(job.budget, "gpu_seconds", "job.budget", above=0)


def own_terms(job: job_pb2.Job) -> None:
    """Raise InvalidArgument naming every bad field of those that may be changed later."""
    bad = Violations()
    terms(bad, job)
    if bad:
        raise InvalidArgument.of(bad)


def finetune(bad: Violations, spec: training_pb2.FinetuneSpec, path: str, methods: frozenset[str] | None) -> None:
    """Check a fine-tune."""
    bad.check(bool(spec.base), f"{path}.base", "missing: builtin:tiny, a model version (name@3), a hub id (org/name) or a path")
    bad.check(bool(spec.dataset), f"{path}.dataset", "missing: a data set (name or name@2)")
    known = f"; known are {', '.join(sorted(methods))}" if methods else ""
    good = bool(METHOD.fullmatch(spec.method)) and (methods is None or spec.method in methods)
    bad.check(good, f"{path}.method", f"{spec.method[:80]!r} is not a method{known}" if spec.method else f"missing{known}")
    model_id(bad, spec.output_model, f"{path}.output_model")
    bad.check(0 <= spec.workers <= MAX_WORKERS, f"{path}.workers", f"{spec.workers} is not between 1 and {MAX_WORKERS}")
    bad.number(spec, "min_workers", path, least=1, most=max(spec.workers, 1))
    hyperparameters(bad, spec.hyperparameters, f"{path}.hyperparameters")
    bad.number(spec.lora, "rank", f"{path}.lora", least=1, most=1024)
    bad.number(spec.lora, "alpha", f"{path}.lora", above=0)
    bad.number(spec.lora, "dropout", f"{path}.lora", least=0, most=0.999)
    facts = known_methods.METHODS.get(spec.method)
    bad.check(
        facts is None or facts.adapter != "never" or not spec.HasField("lora"),
        f"{path}.lora",
        f"given, but method {spec.method!r} trains no adapter; use method 'lora'",
    )
    bad.extend(known_methods.violations(spec, f"{path}."))
    bad.number(spec.sharding, "zero_stage", f"{path}.sharding", least=0, most=3)
    bad.number(spec.worker_resources, "cpus", f"{path}.worker_resources", above=0, most=1024)
    bad.number(spec.worker_resources, "gpus", f"{path}.worker_resources", least=0, most=16)
    gpus = spec.worker_resources.gpus
    bad.check(
        gpus == int(gpus) if math.isfinite(gpus) else True, f"{path}.worker_resources.gpus", f"{gpus} is not a whole number"
    )
    bad.check(spec.checkpoints.every_steps >= 0, f"{path}.checkpoints.every_steps", "negative")
    given = {name: spec.checkpoints.HasField(name) for name in ("keep_best", "keep_every")}
    given["metric"] = bool(spec.checkpoints.metric)
    policy = json_format.MessageToDict(spec.checkpoints, preserving_proto_field_name=True)
    bad.extend(Keep.of(policy).violations(given, f"{path}.checkpoints"))
    bad.check(spec.evaluation.max_rows >= 0, f"{path}.evaluation.max_rows", "negative")
    for field in ("loss_on", "precision", "packing"):
        value = getattr(spec, field)
        enum = spec.DESCRIPTOR.fields_by_name[field].enum_type
        bad.check(enum is None or value in enum.values_by_number, f"{path}.{field}", f"{value} is not a value of the enum")


def hyperparameters(bad: Violations, spec: training_pb2.Hyperparameters, path: str) -> None:
    """Check the settings of an optimisation."""
    bad.number(spec, "learning_rate", path, above=0, most=100)
    bad.number(spec, "epochs", path, above=0, most=100_000)
    bad.number(spec, "max_steps", path, least=1)
    bad.number(spec, "batch_size", path, least=1, most=65_536)
    bad.number(spec, "gradient_accumulation", path, least=1, most=65_536)
    bad.number(spec, "max_length", path, least=8, most=1_048_576)
    bad.number(spec, "warmup_ratio", path, least=0, most=1)
    bad.number(spec, "weight_decay", path, least=0, most=10)
    bad.number(spec, "max_grad_norm", path, above=0)
    bad.number(spec, "seed", path, least=0, most=2**32 - 1)
    bad.check(
        not spec.HasField("scheduler") or spec.scheduler in SCHEDULERS,
        f"{path}.scheduler",
        f"{spec.scheduler[:40]!r} is none of {', '.join(SCHEDULERS)}",
    )


def sweep(bad: Violations, spec: sweep_pb2.SweepSpec, path: str, methods: frozenset[str] | None) -> None:
    """Check a sweep: its fine-tune and its search space."""
    finetune(bad, spec.finetune, f"{path}.finetune", methods)
    facts = known_methods.METHODS.get(spec.finetune.method)
    bad.check(
        facts is None or facts.scored_as_answers,
        f"{path}.finetune.method",
        f"a sweep cannot judge what {spec.finetune.method} trains; it takes methods that learn answers, such as full and lora",
    )
    bad.check(bool(spec.space), f"{path}.space", "empty: name at least one field to vary")
    grid = spec.algorithm == sweep_pb2.SWEEP_ALGORITHM_GRID
    for target, dimension in spec.space.items():
        where = f"{path}.space.{target[:80]}"
        field = _searchable(target)
        bad.check(field is not None, where, "no number or word of FinetuneSpec has this path; try hyperparameters.learning_rate")
        kind = dimension.WhichOneof("kind")
        bad.check(kind is not None, where, "say one of choice, uniform, log_uniform, integer")
        bad.check(not grid or kind in (None, "choice"), where, "a grid needs a choice of values here")
        if kind == "choice":
            bad.check(bool(dimension.choice.values), where, "an empty choice")
        elif kind is not None:
            low, high = getattr(dimension, kind).min, getattr(dimension, kind).max
            bad.check(math.isfinite(low) and math.isfinite(high) and low < high, where, f"min {low} is not below max {high}")
            bad.check(kind != "log_uniform" or low > 0, where, f"min {low} of a logarithmic range is not above zero")
    bad.check(0 <= spec.trials <= MAX_TRIALS, f"{path}.trials", f"{spec.trials} is not between 1 and {MAX_TRIALS}")
    bad.check(spec.trials > 0 or grid, f"{path}.trials", "missing")
    bad.check(spec.max_concurrent_trials >= 0, f"{path}.max_concurrent_trials", "negative")
    bad.check(spec.metric in ("", *METRICS), f"{path}.metric", f"{spec.metric[:40]!r} is none of {', '.join(METRICS)}")
    bad.number(spec, "grace", path, above=0, most=1)
    bad.number(spec, "seed", path, least=0, most=2**32 - 1)
    values = sweep_pb2.SweepAlgorithm.DESCRIPTOR.values_by_number
    bad.check(spec.algorithm in values, f"{path}.algorithm", f"{spec.algorithm} is not a value of the enum")


def evaluate(bad: Violations, spec: evaluation_pb2.EvaluateSpec, path: str) -> None:
    """Check an evaluation."""
    bad.check(bool(spec.model), f"{path}.model", "missing: builtin:tiny, a model version (name@3), a hub id (org/name) or a path")
    bad.check(bool(spec.dataset), f"{path}.dataset", "missing: a data set (name or name@2)")
    bad.check(spec.max_rows >= 0, f"{path}.max_rows", "negative")


def model_id(bad: Violations, value: str, field: str, required: bool = False) -> None:
    """Check the name of a model to register."""
    if value or required:
        bad.check(bool(ID.fullmatch(value)), field, f"{value[:80]!r} is not a valid name; use {ID_RULE}" if value else "missing")


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _searchable(path: str) -> str | None:
    """The path itself, if it names a single number or word of FinetuneSpec."""
    descriptor = training_pb2.FinetuneSpec.DESCRIPTOR
    *groups, last = path.split(".")
    for group in groups:
        field = descriptor.fields_by_name.get(group)
        if field is None or field.message_type is None:
            return None
        descriptor = field.message_type
    field = descriptor.fields_by_name.get(last)
    searchable = field is not None and field.message_type is None and not field.is_repeated
    return path if searchable and path not in ("base", "dataset", "output_model", "workers") else None
