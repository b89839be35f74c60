"""The runner of jobs of kind finetune: score the base, train, score the result, and say what came out."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Any

from ray._private.state import available_resources_per_node

from agents import concealed
from agents.cluster import connect
from agents.evaluation.evaluate import headline
from agents.evaluation.remote import evaluate_remotely
from agents.failures import RunCancelled, RunPaused, check_wish
from agents.link import Link
from agents.models.resolve import Base, materialise
from agents.training.config import TrainConfig
from agents.training.context import Wish
from agents.training.ray_entry import resources, run_training
from agents.training.worker import TrainPayload, TrainResult
from common import storage
from common.errors import InvalidArgument, Violation
from common.methods import METHODS
from common.placement import selector_of
from luthier.agent.v1 import agent_pb2
from luthier.v1 import evaluation_pb2, job_pb2, training_pb2

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "test"
RELEASE_SECONDS = 3.0
REWARD = "reward:"
"""What the roles of reward models begin with, before the name of the reward (coordinator/jobs/resolve.py)."""


def run(link: Link, claim: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
    """Carry the claimed run out and return how it ended. What goes wrong is raised."""
    spec = claim.job.finetune
    config = TrainConfig.of(spec)
    link.phase("loading", f"bringing {spec.base} into storage")
    base = full_base(claim)
    check_wish(link)
    connect()
    _, use_gpu = resources(config)
    scoring = _Scoring(link, claim, config, use_gpu)
    before = _before(link, claim, scoring, base)
    check_wish(link)
    payload = TrainPayload(
        spec=spec.SerializeToString(),
        link=replace(link.config),
        base_uri=base.uri,
        base_hash=base.content_hash,
        base_name=base.name,
        dataset_uri=claim.inputs["dataset"].uri,
        dataset_hash=claim.inputs["dataset"].content_hash,
        run_uri=claim.run_uri,
        use_gpu=use_gpu,
        resume_from=tuple((point.uri, point.manifest_sha256, point.step) for point in claim.resume_from),
        models={
            role.removeprefix(REWARD): (each.uri, each.content_hash)
            for role, each in claim.inputs.items()
            if role.startswith(REWARD)
        },
        hang_seconds=claim.job.hang_timeout.ToMilliseconds() / 1000,
        selector=selector_of(claim.job.placement),
        secrets=concealed.held(),
    )
    going_on = f", to go on from step {claim.resume_from[0].step}" if claim.resume_from else ""
    link.phase("starting", f"starting {config.workers} workers{going_on}")
    trained = run_training(payload)
    if trained.wish is Wish.PAUSE:
        raise RunPaused
    # From here on a pause would cost more than it brings: what is left is to score and to register.
    if trained.stopped or link.wished.is_set():
        raise RunCancelled(link.wish_reason)
    after = scoring.score("evaluating_after", scoring.output_name, base, trained)
    outcome = _outcome(claim, config, base, trained, before, after)
    if trained.wish is Wish.FINISH:
        outcome.end_reason = link.wish_reason
    return outcome


def _before(link: Link, claim: agent_pb2.ClaimRunResponse, scoring: _Scoring, base: Base) -> evaluation_pb2.Evaluation | None:
    """The base's scores where they are asked for: found now, or by an earlier run."""
    if not claim.job.finetune.evaluation.before:
        return None
    if claim.job.result.HasField("before"):
        return claim.job.result.before
    before = scoring.score("evaluating_before", base.name, base)
    if before is not None:
        link.partial(job_pb2.JobResult(before=before))
    return before


def full_base(claim: agent_pb2.ClaimRunResponse) -> Base:
    """Materialise the base of a claim. Raises InvalidArgument where it is an adapter."""
    artifact = claim.inputs["base"]
    if artifact.model_kind == "adapter":
        under = artifact.base.name or "its base"
        raise InvalidArgument.of(
            [Violation("base", f"{artifact.name} is an adapter; fine-tune {under}, or a whole model, instead")]
        )
    return materialise(artifact, claim.storage_uri)


def produced_model(
    claim: agent_pb2.ClaimRunResponse, config: TrainConfig, base: Base, trained: TrainResult, metrics: dict[str, float]
) -> agent_pb2.ProducedModel:
    """The model to register, with its base, settings and figures."""
    artifact = agent_pb2.Artifact()
    artifact.CopyFrom(claim.inputs["base"])
    artifact.name, artifact.uri = base.name, base.uri
    artifact.content_hash, artifact.revision = base.content_hash, base.revision
    artifact.model_kind = artifact.model_kind or "full"
    model = trained.produced_model()
    model.base.CopyFrom(artifact)
    model.parameters.update(config.parameters())
    model.metrics.update(metrics)
    return model


def final_metrics(
    trained: TrainResult, before: evaluation_pb2.Evaluation | None, after: evaluation_pb2.Evaluation | None
) -> dict[str, float]:
    """The figures of a fine-tune by name: those of the result, of the base with `before_`, and of the training with `train_`."""
    metrics = dict(trained.metrics)
    metrics |= headline(after) if after is not None else {}
    metrics |= {f"before_{name}": value for name, value in (headline(before) if before is not None else {}).items()}
    return metrics


class _Scoring:
    """Held-out scoring as the spec asks for it."""

    def __init__(self, link: Link, claim: agent_pb2.ClaimRunResponse, config: TrainConfig, use_gpu: bool) -> None:
        self._link = link
        self._claim = claim
        self._spec: training_pb2.FinetuneEvaluation = claim.job.finetune.evaluation
        self._cpus = config.cpus_per_worker * config.workers
        self._config = config
        self._gpus = 1.0 if use_gpu else 0.0
        self._split = self._spec.split or DEFAULT_SPLIT
        self.output_name = claim.job.finetune.output_model or claim.inputs["dataset"].name.partition("@")[0]
        facts = METHODS.get(config.method)
        # What learns from other rows than answers is scored by its own method.
        self._enabled = not self._spec.disabled and (facts is None or facts.scored_as_answers) and self._has_split()

    def score(self, phase: str, name: str, base: Base, trained: TrainResult | None = None) -> evaluation_pb2.Evaluation | None:
        """Score the base, or what was trained on it; None where scoring is off."""
        if not self._enabled:
            return None
        dataset = self._claim.inputs["dataset"]
        self._link.phase(phase, f"scoring {name} on {self._split} of {dataset.name}")
        adapter = trained is not None and trained.model_kind == "adapter"
        return evaluate_remotely(
            trained.uri if trained else base.uri,
            trained.content_hash if trained else base.content_hash,
            base.uri if adapter else "",
            base.content_hash if adapter else "",
            dataset.uri,
            dataset.content_hash,
            split=self._split,
            max_rows=self._spec.max_rows,
            labels=self._claim.labels,
            label_key=self._spec.label_key,
            generate=self._spec.generate,
            cpus=self._task_cpus(),
            gpus=self._gpus,
            selector=selector_of(self._claim.job.placement),
            name=name,
            dataset_name=dataset.name,
            link=self._link,
            phase=phase,
            progress=self._progress(trained),
        )

    def _task_cpus(self) -> float:
        """As many CPUs as the workers hold, where one node has them free; one worker's place is free in any case."""
        one, all_of_them = self._config.cpus_per_worker, self._cpus
        deadline = time.monotonic() + RELEASE_SECONDS
        # What the workers held comes back a moment after they have ended.
        while (free := _most_free_cpus()) < all_of_them and time.monotonic() < deadline:
            time.sleep(0.2)
        return all_of_them if free >= all_of_them else max(one, min(all_of_them, math.floor(free)))

    def _progress(self, trained: TrainResult | None) -> job_pb2.Progress | None:
        """Keeps the training's last word while the result is scored."""
        if trained is None:
            return None
        return job_pb2.Progress(
            step=trained.steps,
            total_steps=trained.steps,
            loss=trained.metrics["train_loss"],
            tokens_per_second=trained.metrics["train_tokens_per_second"],
        )

    def _has_split(self) -> bool:
        uri = storage.join(self._claim.inputs["dataset"].uri, f"{self._split}.parquet")
        if storage.exists(uri):
            return True
        if self._spec.split:
            raise InvalidArgument(
                f"the data set has no split {self._split!r} to evaluate on",
                "BAD_DATA",
                [Violation("evaluation.split", "is not a split of the data set")],
            )
        logger.warning("the data set has no split %r, so nothing is scored", self._split)
        return False


def _most_free_cpus() -> float:
    """CPUs that are free on the node with the most of them."""
    return max((node.get("CPU", 0.0) for node in available_resources_per_node().values()), default=0.0)


def _outcome(
    claim: agent_pb2.ClaimRunResponse,
    config: TrainConfig,
    base: Base,
    trained: TrainResult,
    before: evaluation_pb2.Evaluation | None,
    after: evaluation_pb2.Evaluation | None,
) -> agent_pb2.OutcomeReport:
    metrics = final_metrics(trained, before, after)
    result = job_pb2.JobResult(metrics=metrics, engine=trained.engine_report)
    if before is not None:
        result.before.CopyFrom(before)
    if after is not None:
        result.after.CopyFrom(after)
    return agent_pb2.OutcomeReport(
        state=job_pb2.JOB_STATE_SUCCEEDED,
        end_reason=job_pb2.END_REASON_COMPLETED,
        result=result,
        model=produced_model(claim, config, base, trained, metrics),
    )


__all__: list[Any] = ["final_metrics", "full_base", "produced_model", "run"]
