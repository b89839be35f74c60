"""What a job's references stand for: looked up once, when the job is created, and kept with it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import Message

from common import methods
from common.errors import FailedPrecondition, InvalidArgument, LuthierError, NotFound, PermissionDenied, Unavailable, Violation
from common.model_files import check_model_folder
from common.names import HUB_ID, parse_version_ref
from coordinator.messages import parse
from coordinator.registry import find_dataset, find_model
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import dataset_pb2, job_pb2, model_pb2

BUILTINS = ("builtin:tiny",)
KINDS: dict[int, str] = {model_pb2.MODEL_KIND_ADAPTER: "adapter", model_pb2.MODEL_KIND_REWARD: "reward"}
HUB_SECONDS = 10.0
"""How long the hub may take to answer while somebody waits for CreateJob."""


@dataclass
class Resolved:
    """What a job reads, by role, and the labels of its data."""

    inputs: dict[str, agent_pb2.Artifact] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)


async def resolve(store: Store, project: str, job: job_pb2.Job, paths_allowed: bool, hub_token: str = "") -> Resolved:
    """Look up the data set and the model of a job and write the versions they stand for into the job.

    `hub_token` is what the hub is asked with, where that is not to be the coordinator's own.

    Raises NotFound, InvalidArgument, PermissionDenied or Unavailable, each naming the field.
    """
    resolved = Resolved()
    kind = job.WhichOneof("spec")
    if kind in ("finetune", "sweep"):
        spec = job.finetune if kind == "finetune" else job.sweep.finetune
        path = "job.finetune" if kind == "finetune" else "job.sweep.finetune"
        dataset = await _dataset(store, project, spec, f"{path}.dataset", resolved)
        _need_split(dataset, "train", f"{path}.dataset", "train on")
        methods.check_rows(spec.method, dataset.schema.shape, dataset.schema.labels, f"{path}.dataset")
        if kind == "sweep" or not spec.evaluation.disabled:
            spec.evaluation.split = spec.evaluation.split or "test"
            _need_split(dataset, spec.evaluation.split, f"{path}.evaluation.split", "evaluate on")
        elif spec.checkpoints.metric == "eval_loss":
            _need_split(dataset, spec.evaluation.split or "test", f"{path}.evaluation.split", "judge checkpoints by")
        spec.output_model = spec.output_model or dataset.name.split("/")[3]
        resolved.inputs["base"] = base = await model(store, project, spec.base, f"{path}.base", paths_allowed, hub_token)
        if base.model_kind == "adapter":
            why = f"{spec.base} is an adapter and cannot be trained on; name the model it adapts"
            raise InvalidArgument.of([Violation(f"{path}.base", why)])
        no_reward_model(base, f"{path}.base", "trained on")
        spec.base = base.name
        for number, reward in enumerate(spec.reinforcement.rewards):
            if reward.WhichOneof("kind") == "reward_model":
                where = f"{path}.reinforcement.rewards[{number}].reward_model.model"
                resolved.inputs[f"reward:{methods.reward_name(reward)}"] = found = await _reward_model(
                    store, project, reward.reward_model.model, where
                )
                reward.reward_model.model = found.name
    elif kind == "evaluate":
        dataset = await _dataset(store, project, job.evaluate, "job.evaluate.dataset", resolved)
        job.evaluate.split = job.evaluate.split or "test"
        _need_split(dataset, job.evaluate.split, "job.evaluate.split", "evaluate on")
        resolved.inputs["model"] = await model(store, project, job.evaluate.model, "job.evaluate.model", paths_allowed, hub_token)
        no_reward_model(resolved.inputs["model"], "job.evaluate.model", "evaluated on answers")
        job.evaluate.model = resolved.inputs["model"].name
    else:
        source = job.import_model.source
        resolved.inputs["base"] = await model(store, project, source, "job.import_model.source", paths_allowed, hub_token)
    return resolved


async def model(
    store: Store, project: str, text: str, where: str, paths_allowed: bool, hub_token: str = ""
) -> agent_pb2.Artifact:
    """What the name of a model stands for; see `base` in training.proto for the forms it may have."""
    with _field(where):
        if text.startswith("builtin:"):
            if text not in BUILTINS:
                raise NotFound(f"{text!r} is not built in; known are {', '.join(BUILTINS)}", "BASE_NOT_FOUND")
            return agent_pb2.Artifact(name=text, kind="builtin", model_kind="full")
        if text.startswith(("/", "~", ".")):
            return await asyncio.to_thread(_path, text, paths_allowed)
        hub_id = text.removeprefix("hf:")
        if text.startswith("hf:") or ("/" in text and not text.startswith("projects/")):
            if not HUB_ID.fullmatch(hub_id) or ".." in hub_id:
                raise InvalidArgument(f"{hub_id[:120]!r} is not an id of a model on a hub (org/name)")
            return await asyncio.to_thread(_hub, hub_id, hub_token)
        ref = parse_version_ref(text, where, "models", project)
        return await store.read(lambda session: registered(find_model(session, project, ref)))


def registered(row: tables.ModelVersion) -> agent_pb2.Artifact:
    """A registered version as something a run can read, with its base if it is an adapter."""
    version = parse(row.document, model_pb2.ModelVersion())
    artifact = agent_pb2.Artifact(
        name=f"{row.model_id}@{row.version}",
        kind="registry",
        uri=row.uri,
        content_hash=row.content_hash,
        model_kind=KINDS.get(version.kind, "full"),
        chat_template_sha256=version.chat_template_sha256,
    )
    if artifact.model_kind == "adapter":
        artifact.base.MergeFrom(
            agent_pb2.Artifact(
                name=version.base,
                kind="registry",
                uri=version.base_artifact_uri,
                content_hash=version.base_content_hash,
                model_kind="full",
            )
        )
    return artifact


async def _reward_model(store: Store, project: str, text: str, where: str) -> agent_pb2.Artifact:
    with _field(where):
        ref = parse_version_ref(text, where, "models", project)
        found = await store.read(lambda session: registered(find_model(session, project, ref)))
    if found.model_kind != "reward":
        raise InvalidArgument.of([Violation(where, f"{text} is no reward model; the method reward trains one")])
    return found


def no_reward_model(artifact: agent_pb2.Artifact, where: str, what: str) -> None:
    """Raise InvalidArgument naming a field where a reward model stands for one that writes text."""
    if artifact.model_kind == "reward":
        why = f"{artifact.name} gives scores and no text, and cannot be {what}; it rewards in the methods grpo and rloo"
        raise InvalidArgument.of([Violation(where, why)])


async def _dataset(store: Store, project: str, spec: Message, where: str, resolved: Resolved) -> dataset_pb2.DatasetVersion:
    with _field(where):
        ref = parse_version_ref(spec.dataset, where, "datasets", project)  # type: ignore[attr-defined]
        row = await store.read(lambda session: find_dataset(session, project, ref))
    spec.dataset = f"{row.dataset_id}@{row.version}"  # type: ignore[attr-defined]
    resolved.inputs["dataset"] = agent_pb2.Artifact(
        name=f"{row.dataset_id}@{row.version}", kind="dataset", uri=row.uri, content_hash=row.manifest_sha256
    )
    version = parse(row.document, dataset_pb2.DatasetVersion())
    resolved.labels = list(version.schema.labels)
    return version


def _need_split(dataset: dataset_pb2.DatasetVersion, split: str, where: str, what: str) -> None:
    there = {part.name for part in dataset.splits if part.row_count}
    if split not in there:
        why = f"the data set has no rows in split {split!r} to {what}; it has {', '.join(sorted(there))}"
        raise InvalidArgument.of([Violation(where, why)], "SPLIT_NOT_FOUND")


def _path(text: str, allowed: bool) -> agent_pb2.Artifact:
    if not allowed:
        raise PermissionDenied("a base by path needs an admin key and `local_bases`; use `luthier model import` instead")
    if not text.startswith("/") or "\0" in text:
        raise InvalidArgument(
            f"{text[:120]!r} is not an absolute path on the cluster; `luthier model import` takes local folders"
        )
    folder = Path(os.path.realpath(text))
    if not folder.is_dir():
        raise NotFound(f"there is no folder {text[:200]!r} on the coordinator's machine", "BASE_NOT_FOUND")
    return agent_pb2.Artifact(name=str(folder), kind="path", model_kind=check_model_folder(folder).kind)


def _hub(hub_id: str, token: str = "") -> agent_pb2.Artifact:
    # Slow to import, and needed only where somebody names a hub's model.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        info = HfApi(token=token or None).model_info(hub_id, timeout=HUB_SECONDS)
    except GatedRepoError as error:
        raise FailedPrecondition(
            f"the hub wants its terms accepted for {hub_id!r} first, and the token of an account that did (secret HF_TOKEN)",
            "BASE_GATED",
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no model {hub_id!r} on the hub, or it is private and needs a token (secret HF_TOKEN)", "BASE_NOT_FOUND"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        why = f"the hub does not answer for {hub_id!r} ({type(error).__name__}); set HF_ENDPOINT, or import a local folder"
        raise Unavailable(why, "HUB_UNAVAILABLE") from error
    if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
        raise InvalidArgument(f"{hub_id!r} has no safetensors weights, and nothing else is loaded", "NO_SAFETENSORS")
    return agent_pb2.Artifact(name=f"hf:{hub_id}", kind="hub", revision=info.sha or "", model_kind="full")


class _field:
    """Names the field in errors that were raised without one."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, LuthierError) and not error.violations:
            error.violations = (Violation(self.where, error.message),)
            error.message = f"{self.where}: {error.message}"
            error.args = (error.message,)
