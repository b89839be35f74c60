"""One trial of a sweep: an ordinary fine-tune with the drawn values, scored on held-out rows. Runs in a process of Ray Tune."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from agents import concealed
from agents.evaluation.remote import evaluate_remotely
from agents.failures import RunCancelled, RunFailed, job_error_of
from agents.link import Link, LinkConfig, install_logging
from agents.models.resolve import Base
from agents.training.config import TrainConfig
from agents.training.job import final_metrics, produced_model
from agents.training.ray_entry import resources, run_training
from agents.training.worker import TrainPayload, TrainResult
from agents.tuning.board import FAILURE, FIGURES, OUTCOME, PLACE, trial_name
from agents.tuning.space import Value, settle, with_values
from common import storage
from common.errors import InvalidArgument
from common.placement import selector_of
from luthier.agent.v1 import agent_pb2
from luthier.v1 import evaluation_pb2, job_pb2, training_pb2

TRIAL_CPUS = 0.25
POLL_SECONDS = 0.5
# Enough to tell a good trial from a bad one on the way; the end is scored on all rows.
JUDGED_ROWS = 512


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep have in common; it travels to the processes of the trials."""

    link: LinkConfig
    claim: bytes
    base: Base
    metric: str
    train_rows: int
    # The part of its steps after which a trial is judged, over and over; 0 where trials are left alone.
    judged_every: float
    # Reference to the values of the secrets in Ray's memory: Ray Tune writes its plans down.
    secrets: Any = None

    @property
    def claimed(self) -> agent_pb2.ClaimRunResponse:
        """The claim of the sweep."""
        return agent_pb2.ClaimRunResponse.FromString(self.claim)


def trainable(plan: TrialPlan) -> Callable[[dict[str, Value]], None]:
    """Return the function that Ray Tune calls for each trial."""

    def trial(config: dict[str, Value]) -> None:
        run_trial(plan, config)

    return trial


def run_trial(plan: TrialPlan, drawn: dict[str, Value]) -> None:
    """Train and score with the drawn values, and report to Ray Tune what came out: figures and outcome, or the root cause.

    A failure is reported, not raised: Ray Tune would keep no more of it than its text.
    """
    import ray
    from ray import tune

    if plan.secrets is not None:
        concealed.take(ray.get(plan.secrets))
    name = trial_name(tune.get_context().get_trial_id())
    source = f"{name}/driver"
    with Link(plan.link, source) as link:
        install_logging(link)
        try:
            figures, outcome = _train_and_score(plan, name, settle(drawn), link, tune.report)
        except RunCancelled:
            raise
        except BaseException as error:
            cause = job_error_of(error, source, "TRIAL_ERROR")
            if not isinstance(error, RunFailed):  # ranks have reported theirs
                link.failure(cause)
            tune.report({FAILURE: cause.SerializeToString().hex()})
            return
    tune.report({**figures, FIGURES: figures, OUTCOME: outcome.SerializeToString().hex()})


def trial_folder(run_uri: str, name: str) -> str:
    """Return the folder of a trial in storage."""
    return storage.join(run_uri, "trials", name)


def total_steps(config: TrainConfig, rows: int) -> int:
    """Return the optimiser steps that a fine-tune on `rows` comes to."""
    if config.max_steps > 0:
        return config.max_steps
    micro = math.ceil(rows / (config.batch_size * config.workers))
    return max(1, math.ceil(config.epochs * max(1, math.ceil(micro / config.gradient_accumulation))))


def score(
    claim: agent_pb2.ClaimRunResponse,
    spec: training_pb2.FinetuneSpec,
    base: Base,
    trained: TrainResult | None,
    *,
    name: str,
    phase: str,
    link: Any,
) -> evaluation_pb2.Evaluation:
    """Score the base, or what was trained on it, as the fine-tune asks for it."""
    config = TrainConfig.of(spec)
    _, use_gpu = resources(config)
    dataset = claim.inputs["dataset"]
    adapter = trained is not None and trained.model_kind == "adapter"
    return evaluate_remotely(
        trained.uri if trained else base.uri,
        trained.content_hash if trained else base.content_hash,
        base.uri if adapter else "",
        base.content_hash if adapter else "",
        dataset.uri,
        dataset.content_hash,
        split=spec.evaluation.split,
        max_rows=spec.evaluation.max_rows,
        labels=claim.labels,
        label_key=spec.evaluation.label_key,
        generate=spec.evaluation.generate,
        cpus=config.cpus_per_worker,  # one worker's place is free on some node, all workers' may not be
        gpus=1.0 if use_gpu else 0.0,
        selector=selector_of(claim.job.placement),
        name=name,
        dataset_name=dataset.name,
        link=link,
        phase=phase,
    )


class _Quiet:
    """A link without progress: that of the sweep is what the job shows."""

    def __init__(self, link: Link) -> None:
        self.wished = link.wished
        self._link = link

    @property
    def wish_reason(self) -> job_pb2.EndReason:
        """Why the run is to stop."""
        return self._link.wish_reason

    def progress(self, progress: job_pb2.Progress) -> None:
        """Say nothing."""


def _train_and_score(
    plan: TrialPlan, name: str, drawn: dict[str, Value], link: Link, report: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, float], agent_pb2.OutcomeReport]:
    claim = plan.claimed
    spec = with_values(claim.job.sweep.finetune, drawn)
    # From here on this is a fine-tune like any other.
    claim.job.finetune.CopyFrom(spec)
    config = TrainConfig.of(spec)
    _, use_gpu = resources(config)
    every = max(1, int(total_steps(config, plan.train_rows) * plan.judged_every)) if plan.judged_every else 0
    payload = TrainPayload(
        spec=spec.SerializeToString(),
        link=plan.link,
        base_uri=plan.base.uri,
        base_hash=plan.base.content_hash,
        base_name=plan.base.name,
        dataset_uri=claim.inputs["dataset"].uri,
        dataset_hash=claim.inputs["dataset"].content_hash,
        run_uri=trial_folder(claim.run_uri, name),
        use_gpu=use_gpu,
        trial=name,
        trial_every=every,
        trial_split=spec.evaluation.split or "test",
        trial_max_rows=min(spec.evaluation.max_rows or JUDGED_ROWS, JUDGED_ROWS),
        hang_seconds=claim.job.hang_timeout.ToMilliseconds() / 1000,
        selector=selector_of(claim.job.placement),
        secrets=concealed.held(),
    )
    trained = _train(payload, report)
    if trained.stopped:
        raise RunCancelled(link.wish_reason)
    after = score(claim, spec, plan.base, trained, name=name, phase="searching", link=_Quiet(link))
    metrics = final_metrics(trained, None, after)
    if plan.metric not in metrics:
        raise InvalidArgument(
            f"the sweep compares by {plan.metric}, but the rows carry no labels that could be scored; use metric eval_loss, "
            "or name the label's key in finetune.evaluation.label_key",
            "BAD_DATA",
        )
    result = job_pb2.JobResult(metrics=metrics, engine=trained.engine_report, after=after)
    model = produced_model(claim, config, plan.base, trained, metrics)
    model.trial = name
    outcome = agent_pb2.OutcomeReport(
        state=job_pb2.JOB_STATE_SUCCEEDED, end_reason=job_pb2.END_REASON_COMPLETED, result=result, model=model
    )
    return metrics, outcome


def _train(payload: TrainPayload, report: Callable[[dict[str, Any]], None]) -> TrainResult:
    """Train, and hand what the ranks report on the way to Ray Tune.

    Not by Tune's own callback: its reports and the trial's last one reach Tune by two ways into a queue of one, and the thread
    that should empty the queue is one of those that fill it.
    """
    if not payload.trial_every:
        return run_training(payload)
    from ray.util.queue import Empty, Queue

    reports = Queue(actor_options={"num_cpus": 0})
    ended: list[TrainResult | BaseException] = []

    def train() -> None:
        try:
            ended.append(run_training(payload, callbacks=_callbacks(reports)))
        except BaseException as error:  # raised again below, in the trial's own thread
            ended.append(error)

    thread = threading.Thread(target=train, name="train", daemon=True)
    thread.start()
    place = ""
    try:
        for item in _received(reports, thread, Empty):
            if isinstance(item, str):
                place = item
            else:
                report({**item, FIGURES: item, PLACE: place})
    finally:
        reports.shutdown(force=True)
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


def _received(reports: Any, thread: threading.Thread, empty: type[Exception]) -> Iterator[dict[str, float] | str]:
    """Yield what arrives until the training has ended and nothing is left."""
    while True:
        alive = thread.is_alive()
        try:
            yield reports.get(timeout=POLL_SECONDS)
        except empty:
            if not alive:
                return


def _callbacks(reports: Any) -> list[Any]:
    """Return what runs in Ray Train's controller: it passes on rank 0's figures, and the place that the ranks hold."""
    from ray.train import UserCallback
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Figures(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            reports.put({name: float(value) for name, value in metrics[0].items()})

    class Place(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            reports.put(worker_group.get_worker_group_state().placement_group_handle.placement_group.id.hex())

    return [Figures(), Place()]
