"""What each rank of a fine-tune does: fetch its inputs from storage, run the method, publish the result. No Ray here."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agents import concealed
from agents.failures import RunCancelled, RunFailed, is_peer_loss, job_error_of
from agents.link import Link, LinkConfig, install_logging
from agents.trail import Trail
from agents.training import environment
from agents.training.config import TrainConfig
from agents.training.context import TrainContext, TrainedModel, TrialReports, Wish
from agents.training.scratch import scratch_folder
from agents.training.watch import Watch, watched
from common import manifest, storage, tracing
from common.errors import LuthierError
from luthier.agent.v1 import agent_pb2
from luthier.v1 import training_pb2

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0
# How long a rank that is done holds its place until a coordinator that is away has taken its figures.
OUTAGE_SECONDS = 600.0
QUIET_SECONDS = 15.0
TRAINING_ERROR = "TRAINING_ERROR"
_WISHES = {agent_pb2.WISH_CANCEL: Wish.END, agent_pb2.WISH_PAUSE: Wish.PAUSE, agent_pb2.WISH_FINISH: Wish.FINISH}


@dataclass(frozen=True)
class TrainPayload:
    """Everything that a rank needs to know; plain values, so that it travels to any node.

    `trial` is the id of a sweep's trial and prefixes the sources of its ranks; `trial_every` makes it report its held-out loss.
    """

    spec: bytes
    link: LinkConfig
    base_uri: str
    base_hash: str
    base_name: str
    dataset_uri: str
    dataset_hash: str
    run_uri: str
    use_gpu: bool = False
    trial: str = ""
    trial_every: int = 0
    trial_split: str = "test"
    trial_max_rows: int = 0
    # Checkpoints to go on from, best first: URI, SHA-256 of the manifest, step.
    resume_from: tuple[tuple[str, str, int], ...] = ()
    # Other models that the method reads, by role: URI and hash.
    models: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    # How long a rank may stand still within a step; 0 for what its own steps suggest.
    hang_seconds: float = 0.0
    # Conditions on the labels of the nodes that it may run on.
    selector: Mapping[str, str] = field(default_factory=dict)
    # Values of the job's secrets by environment variable. Ray Train's record of a run has what its payload looks like.
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> TrainConfig:
        """The settings, checked."""
        return TrainConfig.of(training_pb2.FinetuneSpec.FromString(self.spec))

    def source(self, rank: int) -> str:
        """Who rank `rank` is in reports."""
        return f"{self.trial}/rank-{rank}" if self.trial else f"rank-{rank}"


@dataclass(frozen=True)
class TrainResult:
    """What came out of a fine-tune, from rank 0. `uri` and what belongs to it are empty where the run was stopped."""

    steps: int
    metrics: dict[str, float]
    engine: bytes
    wish: Wish = Wish.NONE
    uri: str = ""
    content_hash: str = ""
    size_bytes: int = 0
    model_kind: str = ""
    chat_template_sha256: str = ""

    @property
    def stopped(self) -> bool:
        """Whether there is no model, because the run was stopped."""
        return self.wish in (Wish.END, Wish.PAUSE)

    @property
    def engine_report(self) -> training_pb2.EngineReport:
        """What really ran."""
        return training_pb2.EngineReport.FromString(self.engine)

    def produced_model(self) -> agent_pb2.ProducedModel:
        """The model as the coordinator registers it; base, parameters and metrics are the caller's to add."""
        return agent_pb2.ProducedModel(
            uri=self.uri,
            content_hash=self.content_hash,
            model_kind=self.model_kind,
            size_bytes=self.size_bytes,
            chat_template_sha256=self.chat_template_sha256,
        )


def train_worker(
    payload: TrainPayload, *, node: str = "", report: Callable[[dict[str, float]], None] | None = None
) -> TrainResult | None:
    """Run one rank, with torch.distributed initialised. Returns the result on rank 0, and nothing on the others.

    Every exception is reported with this rank as its source before it leaves, so that the first failure is known as the root
    cause, whatever the other ranks raise when this one is gone.
    """
    concealed.take(payload.secrets)
    environment.prepare(payload.use_gpu)
    import torch.distributed as dist

    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Only rank 0 has to hear of a wish soon.
    link = Link(payload.link, payload.source(rank), heartbeat=1.0 if rank == 0 else QUIET_SECONDS)
    install_logging(link)
    source, failure = payload.source(rank), ""
    who = {"luthier.job.uid": payload.link.job_uid, "luthier.run": payload.link.run}
    link.trail = Trail("luthier-rank", source, payload.link.trace_parent, **who)
    watch, unwatch = watched(link, payload.hang_seconds)
    try:
        result = _train(payload, link, watch, rank, world_size, node or socket.gethostname(), report)
        if not link.flush(OUTAGE_SECONDS):
            logger.warning("the coordinator was away for too long: the last reports of %s are lost", source)
        return result
    except RunCancelled:
        failure = "CANCELLED"
        raise
    except BaseException as error:
        cause = job_error_of(error, source, TRAINING_ERROR)
        failure = cause.code
        logger.error("%s failed: %s", source, cause.message)
        if not is_peer_loss(cause):
            # That another rank went away is no cause. The rank that went tells it, or the driver where it could not.
            link.failure(cause)
        link.flush(FLUSH_SECONDS)
        # Ray writes down what it is raised from, and there are secrets in that for all we know.
        raise RunFailed.of(cause) from (None if payload.secrets else error)
    finally:
        unwatch()
        link.trail.end(failure)
        link.close()
        tracing.flush()


def _train(
    payload: TrainPayload,
    link: Link,
    watch: Watch,
    rank: int,
    world_size: int,
    node: str,
    report: Callable[[dict[str, float]], None] | None,
) -> TrainResult | None:
    from agents.training.methods.base import find_method

    config = payload.config
    method = find_method(config.method)
    if rank == 0:
        link.phase("loading", "fetching base model and data set to the nodes")
    base_dir = manifest.fetch(payload.base_uri, payload.base_hash)
    data_dir = manifest.fetch(payload.dataset_uri, payload.dataset_hash)
    models = {role: manifest.fetch(uri, sha256) for role, (uri, sha256) in payload.models.items()}
    resume_from = usable_checkpoint(payload.resume_from)
    reports = None
    if payload.trial_every and report is not None:
        reports = TrialReports(report, payload.trial_every, payload.trial_split, payload.trial_max_rows)
    name = f"{payload.link.job_uid}-r{payload.link.run}" + (f"-{payload.trial}" if payload.trial else "")
    with scratch_folder(name) as folder:
        context = TrainContext(
            config=config,
            base_dir=base_dir,
            base_name=payload.base_hash or payload.base_name,
            data_dir=data_dir,
            output_dir=folder,
            rank=rank,
            world_size=world_size,
            reporter=link,
            use_gpu=payload.use_gpu,
            run=payload.link.run,
            run_uri=payload.run_uri,
            trial=payload.trial,
            node=node,
            trial_reports=reports,
            models=models,
            resume_from=resume_from,
            wish=lambda: _wish(link),
            watch=watch,
        )
        try:
            trained = method.run(context)
        finally:
            watch.rest()
            if resume_from is not None:
                manifest.discard(resume_from)
        return _publish(payload, trained) if rank == 0 else None


def _wish(link: Link) -> Wish:
    return _WISHES.get(link.wish, Wish.NONE)


def usable_checkpoint(points: Sequence[tuple[str, str, int]]) -> Path | None:
    """The first checkpoint (URI, manifest's SHA-256, step) that every rank can fetch whole, in a local folder. Collective.

    A damaged or missing one is passed over with a warning; None where none is left, so that the run starts from the beginning.
    """
    from agents.training.distributed import gather

    for uri, sha256, step in points:
        folder, trouble = None, ""
        try:
            folder = manifest.fetch(uri, sha256)
        except LuthierError as error:
            trouble = error.message
        troubles = [text for text in gather(trouble) if text]
        if not troubles:
            return folder
        logger.warning("the checkpoint at step %d cannot be used: %s", step, troubles[0])
    if points:
        logger.warning("no checkpoint can be used; training starts from the beginning")
    return None


def _publish(payload: TrainPayload, trained: TrainedModel) -> TrainResult:
    from transformers import AutoTokenizer

    from agents.training.saving import chat_template_sha256

    engine = trained.engine.SerializeToString()
    if trained.stopped:
        return TrainResult(trained.steps, trained.metrics, engine, trained.wish)
    artifact = manifest.publish(trained.local_dir, storage.join(payload.run_uri, "model"))
    tokenizer = AutoTokenizer.from_pretrained(trained.local_dir, trust_remote_code=False, local_files_only=True)
    return TrainResult(
        steps=trained.steps,
        metrics=trained.metrics,
        engine=engine,
        wish=trained.wish,
        uri=storage.join(payload.run_uri, "model"),
        content_hash=artifact.sha256,
        size_bytes=artifact.size_bytes,
        model_kind=trained.kind,
        chat_template_sha256=chat_template_sha256(tokenizer),
    )
