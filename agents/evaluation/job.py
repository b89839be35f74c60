"""The runner of jobs of kind evaluate: score a model on a split and report it."""

from __future__ import annotations

from agents.cluster import connect
from agents.evaluation.evaluate import headline
from agents.evaluation.remote import evaluate_remotely
from agents.link import Link
from agents.models.resolve import materialise
from common.placement import selector_of
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2

__all__ = ["evaluate_remotely", "run"]

TASK_CPUS = 1.0


def run(link: Link, claim: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
    """Carry the claimed run out and return how it ended. What goes wrong is raised."""
    import ray

    spec, model, dataset = claim.job.evaluate, claim.inputs["model"], claim.inputs["dataset"]
    link.phase("loading", f"Fetching {model.name}")
    ours = materialise(model, claim.storage_uri)
    base = materialise(model.base, claim.storage_uri) if model.model_kind == "adapter" else None
    connect()
    link.phase("evaluating", f"Scoring {model.name} on {spec.split or 'test'} of {dataset.name}")
    evaluation = evaluate_remotely(
        ours.uri,
        ours.content_hash,
        base.uri if base else "",
        base.content_hash if base else "",
        dataset.uri,
        dataset.content_hash,
        split=spec.split,
        max_rows=spec.max_rows,
        labels=claim.labels,
        label_key=spec.label_key,
        generate=not spec.skip_generation,
        cpus=TASK_CPUS,
        gpus=1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0,
        selector=selector_of(claim.job.placement),
        name=model.name,
        dataset_name=dataset.name,
        link=link,
        phase="evaluating",
    )
    result = job_pb2.JobResult(after=evaluation, metrics=headline(evaluation))
    return agent_pb2.OutcomeReport(state=job_pb2.JOB_STATE_SUCCEEDED, end_reason=job_pb2.END_REASON_COMPLETED, result=result)
