"""The runner of jobs of kind import_model: bring a base model into storage and register it."""

from __future__ import annotations

from agents.failures import check_wish
from agents.link import Link
from agents.models.resolve import materialise
from common import manifest
from common.chat import template_sha256
from common.errors import InvalidArgument
from common.model_files import check_model_folder, read_chat_template
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2


def run(link: Link, claim: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
    """Carry the claimed run out and return how it ended. What goes wrong is raised."""
    source = _source(claim)
    link.phase("loading", f"Fetching {source.name}")
    base = materialise(source, claim.storage_uri)
    check_wish(link)
    kind = check_model_folder(base.local_dir).kind
    template = read_chat_template(base.local_dir)
    resolved = agent_pb2.Artifact()
    resolved.CopyFrom(source)
    resolved.uri, resolved.content_hash, resolved.revision, resolved.model_kind = base.uri, base.content_hash, base.revision, kind
    model = agent_pb2.ProducedModel(
        uri=base.uri,
        content_hash=base.content_hash,
        model_kind=kind,
        size_bytes=manifest.verify(base.local_dir).size_bytes,
        chat_template_sha256=template_sha256(template) if template else "",
        base=resolved,
    )
    if not template:
        link.log("warning", f"{source.name} has no chat template; it can be completed but not chatted with")
    link.phase("saving", f"{source.name} lies in storage, {model.size_bytes:,} bytes")
    return agent_pb2.OutcomeReport(
        state=job_pb2.JOB_STATE_SUCCEEDED, end_reason=job_pb2.END_REASON_COMPLETED, model=model, result=job_pb2.JobResult()
    )


def _source(claim: agent_pb2.ClaimRunResponse) -> agent_pb2.Artifact:
    for role in ("base", "model"):
        if role in claim.inputs:
            return claim.inputs[role]
    raise InvalidArgument("the run was given no model to import", "NO_INPUT")
