"""Jobs as tables: one a line, and everything about one at a glance."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.follow import figures_text, steps_text
from cli.render.evaluation import WAYS, confusion_table, side_by_side
from cli.render.text import ago, duration, enum_text, facts, number, plain_table, size, span, state_text, when
from luthier.client import short_name
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.job_pb2 import Budget, EndReason, Job, JobError, JobRun, JobState, Usage
from luthier.v1.sweep_pb2 import SearchDimension, Trial, TrialState
from luthier.v1.training_pb2 import EngineReport

TRIALS_SHOWN = 30


def jobs_table(jobs: Iterable[Job]) -> Table:
    """Jobs, one a line."""
    table = plain_table("job", "kind", "state", "prio", "progress", "made", "took", "result, or what it waits for")
    for job in jobs:
        steps = steps_text(job.progress)
        table.add_row(
            short_name(job.name) + (f"  {job.display_name}" if job.display_name else ""),
            job.kind,
            state_text(JobState.Name(job.state)),
            str(job.priority) if job.priority else "",
            f"{job.progress.phase.replace('_', ' ')} {steps}".strip() if not job.HasField("end_time") else "",
            ago(job.create_time),
            _took(job),
            job.result.model_version or job.error.code or _waits(job),
        )
    return table


def job_view(job: Job, confusion: bool = False, traceback: bool = False) -> Group:
    """Everything about a job."""
    parts: list[RenderableType] = [_head(job)]
    spec_kind = job.WhichOneof("spec")
    if spec_kind:
        parts += _section(spec_kind.replace("_", " "), _spec_facts(getattr(job, spec_kind)))
    if job.HasField("error"):
        parts += _section("what went wrong", _error_facts(job.error, traceback))
    if len(job.runs) > 1 or any(run.HasField("error") for run in job.runs):
        parts += _section("runs", runs_table(job.runs))
    result = job.result
    scores = {name: getattr(result, name) for name in ("before", "after") if result.HasField(name)}
    if scores:
        parts += _section("scores on held-out rows", side_by_side(scores))
        if confusion:
            for name, evaluation in scores.items():
                parts += _confusions(name, evaluation)
    elif result.metrics:
        parts += _section("figures", facts([(name, number(value)) for name, value in sorted(result.metrics.items())]))
    if result.trials:
        parts += _section(f"trials ({len(result.trials)})", trials_table(result.trials))
    if result.HasField("engine"):
        parts += _section("what really ran", _engine(result.engine))
    return Group(*parts)


def _placement(job: Job) -> str:
    """On which nodes it may run, in words; empty where on any."""
    said = [f"{label} {condition}" for label, condition in sorted(job.placement.node_labels.items())]
    if job.placement.gpu_types:
        said.insert(0, " or ".join(job.placement.gpu_types))
    return f"nodes with {', '.join(said)}" if said else ""


def _section(title: str, content: RenderableType) -> list[RenderableType]:
    return [Text(), Text(title, "bold underline"), content]


def _head(job: Job) -> Table:
    state = state_text(JobState.Name(job.state))
    if job.end_reason not in (EndReason.END_REASON_UNSPECIFIED, EndReason.END_REASON_COMPLETED):
        state.append(f"  ({enum_text(EndReason.Name(job.end_reason), 'END_REASON_')})", "dim")
    if job.cancel_requested:
        state.append("  (cancellation asked for)", "yellow")
    elif job.pause_requested:
        state.append("  (pause asked for)", "yellow")
    running = not job.HasField("end_time")
    progress = "  ".join(
        text for text in (job.progress.phase.replace("_", " "), steps_text(job.progress), figures_text(job.progress)) if text
    )
    return facts(
        [
            ("job", short_name(job.name) if job.name else "(not recorded)"),
            ("name", job.display_name),
            ("kind", job.kind),
            ("state", state),
            ("waits", _waits(job)),
            ("progress", progress if running else ""),
            ("result", job.result.model_version),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))),
            ("runs on", _placement(job)),
            ("secrets", ", ".join(f"{variable}={name}" for variable, name in sorted(job.secrets.items()))),
            ("after", ", ".join(short_name(name) for name in job.after)),
            ("priority", job.priority or ""),
            ("time limit", duration(job.time_limit) if job.HasField("time_limit") else ""),
            ("budget", _amounts(job.budget) if job.HasField("budget") else ""),
            ("spent", _amounts(job.usage)),
            ("trained", f"{job.usage.trained_tokens:,} tokens" if job.usage.trained_tokens else ""),
            ("run", f"{job.run}, retries {job.attempt}" if job.run else ""),
            ("made", f"{when(job.create_time)} by {job.creator}" if job.creator else when(job.create_time)),
            ("started", when(job.start_time)),
            ("ended", f"{when(job.end_time)}, after {_took(job)}" if job.HasField("end_time") else ""),
        ]
    )


def _amounts(spent: Budget | Usage) -> str:
    """CPU- and GPU-seconds as hours, what is zero left out."""
    both = ((spent.cpu_seconds, "CPU"), (spent.gpu_seconds, "GPU"))
    return ", ".join(f"{seconds / 3600:.3g} {what}-hours" for seconds, what in both if seconds)


def runs_table(runs: Iterable[JobRun]) -> Table:
    """The launches of a job, oldest first."""
    table = plain_table("run", "workers", "from step", "began", "took", "ended because")
    for run in runs:
        reason = "" if run.end_reason == EndReason.END_REASON_UNSPECIFIED else EndReason.Name(run.end_reason)
        took = span(max(0, run.end_time.seconds - run.create_time.seconds)) if run.HasField("end_time") else ""
        because = ": ".join(text for text in (enum_text(reason, "END_REASON_"), run.error.message) if text)
        table.add_row(
            str(run.run),
            str(run.workers or ""),
            str(run.resumed_step or ""),
            when(run.create_time)[11:],
            took,
            because or ("" if run.HasField("end_time") else "goes on"),
        )
    return table


def _took(job: Job) -> str:
    if not job.start_time.seconds:
        return ""
    end = job.end_time if job.HasField("end_time") else job.update_time
    return span(max(0, end.seconds - job.start_time.seconds))


def _waits(job: Job) -> str:
    if not job.queue.waiting_for and not job.queue.position:
        return ""
    position = f"#{job.queue.position}" if job.queue.position else ""
    start = f"(from about {when(job.queue.estimated_start)[11:]})" if job.queue.HasField("estimated_start") else ""
    words = f"waits for {job.queue.waiting_for}" if job.queue.waiting_for else ""
    return " ".join(text for text in (position, words, start) if text)


def _spec_facts(spec: Message) -> Table:
    return facts(list(_flat(spec, "")))


def _flat(message: Message, prefix: str) -> Iterable[tuple[str, object]]:
    """The fields that were set, by path."""
    for field, value in message.ListFields():
        name = f"{prefix}{field.name}"
        if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key in sorted(value):
                yield f"{name}[{key}]", _dimension(value[key]) if isinstance(value[key], SearchDimension) else value[key]
        elif field.is_repeated:
            yield name, ", ".join(str(item) for item in value)
        elif field.message_type is not None:
            yield from _flat(value, f"{name}.")
        elif field.enum_type is not None:
            yield name, field.enum_type.values_by_number[value].name
        else:
            yield name, number(value) if isinstance(value, float) else value


def _dimension(dimension: SearchDimension) -> str:
    kind = dimension.WhichOneof("kind")
    if kind is None:
        return ""
    values = getattr(dimension, kind)
    return f"choice of {', '.join(values.values)}" if kind == "choice" else f"{kind} from {values.min:g} to {values.max:g}"


def _error_facts(error: JobError, traceback: bool) -> Table:
    return facts(
        [
            ("code", error.code),
            ("message", Text(error.message, "red")),
            *((violation.field, violation.description) for violation in error.field_violations),
            ("failed first", error.source),
            ("exception", error.exception),
            ("traceback", error.traceback if traceback else "shown with --traceback" if error.traceback else ""),
        ]
    )


def _confusions(name: str, evaluation: Evaluation) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for way, _ in WAYS:
        if evaluation.HasField(way):
            parts += _section(f"confusion, {name}, by {way}", confusion_table(getattr(evaluation, way)))
    return parts


def trials_table(trials: Iterable[Trial]) -> Table:
    """Trials of a sweep, best first."""
    trials = list(trials)
    metrics = sorted({name for trial in trials for name in trial.metrics})
    table = plain_table("trial", "state", "parameters", *metrics, "took", "error")
    for trial in trials[:TRIALS_SHOWN]:
        table.add_row(
            trial.id,
            state_text(TrialState.Name(trial.state)),
            ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in sorted(trial.parameters.items())),
            *(number(trial.metrics[name]) if name in trial.metrics else "" for name in metrics),
            span(trial.seconds),
            trial.error,
        )
    if len(trials) > TRIALS_SHOWN:
        table.add_row(f"... {len(trials) - TRIALS_SHOWN} more with --output json")
    return table


def _engine(engine: EngineReport) -> Group:
    ranks = plain_table("rank", "node", "device", "parameters", "optimiser state")
    for rank in engine.ranks:
        ranks.add_row(str(rank.rank), rank.node, rank.device, size(rank.parameter_bytes), size(rank.optimizer_bytes))
    return Group(
        facts(
            [
                ("engine", engine.engine_class),
                ("optimiser", engine.optimizer_class),
                ("ZeRO stage", str(engine.zero_stage)),
                ("ranks", f"{engine.world_size} over {engine.backend}"),
                ("parameters", f"{engine.parameters:,}, {engine.trainable_parameters:,} of them trained"),
            ]
        ),
        ranks,
    )
