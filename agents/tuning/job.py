"""The runner of jobs of kind sweep: many fine-tunes of one base on one data set, and the best of them as the result."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pyarrow.parquet as pq
import ray

from agents import concealed
from agents.cluster import connect
from agents.evaluation.evaluate import headline
from agents.evaluation.remote import split_file
from agents.failures import RunFailed, check_wish
from agents.link import Link
from agents.models.resolve import Base, materialise
from agents.training.config import TrainConfig
from agents.tuning.board import Board
from agents.tuning.search import make_tuner, release
from agents.tuning.space import Search, check_values
from agents.tuning.trial import TrialPlan, score, trainable, trial_folder
from common import manifest, storage
from common.errors import Internal, InvalidArgument, LuthierError, Violation
from common.placement import selector_of
from luthier.agent.v1 import agent_pb2

logger = logging.getLogger(__name__)


def run(link: Link, claim: agent_pb2.ClaimRunResponse) -> agent_pb2.OutcomeReport:
    """Carry the claimed run out and return how it ended. What goes wrong is raised.

    A trial that fails does not end the sweep; where all of them fail, the first one's root cause is raised.
    """
    spec = claim.job.sweep
    search = Search.of(spec)
    TrainConfig.of(spec.finetune)
    check_values(spec.finetune, search)
    dataset = claim.inputs["dataset"]
    link.phase("loading", f"Fetching {spec.finetune.base} and {dataset.name}")
    data_dir = manifest.fetch(dataset.uri, dataset.content_hash)
    split_file(data_dir, spec.finetune.evaluation.split or "test")
    train_rows = pq.read_metadata(split_file(data_dir, "train")).num_rows
    base = _base(claim)
    check_wish(link)
    connect()
    before = None
    if spec.finetune.evaluation.before:
        link.phase("evaluating_before", f"Scoring {base.name} on {dataset.name}")
        before = score(claim, spec.finetune, base, None, name=base.name, phase="evaluating_before", link=link)
        check_wish(link)

    link.phase("searching", f"{search.trials} trials by {search.algorithm} search, {search.concurrent} at a time")
    board = Board(link, search, link.wished, release)
    plan = TrialPlan(
        link=link.config,
        claim=claim.SerializeToString(),
        base=base,
        metric=search.metric,
        train_rows=train_rows,
        judged_every=search.grace if search.algorithm == "asha" else 0.0,
        secrets=ray.put(concealed.held()) if concealed.held() else None,
    )
    make_tuner(search, trainable(plan), board, claim.run_uri, selector_of(claim.job.placement)).fit()
    check_wish(link)

    best = board.best()
    if best is None:
        failure = board.first_failure()
        if failure is not None:
            raise RunFailed.of(failure)
        raise Internal(f"none of the {search.trials} trials has a finite {search.metric}; lower the learning rates", "NO_RESULT")
    name, outcome = best
    outcome.result.trials.extend(board.ranking())
    if before is not None:
        outcome.result.before.CopyFrom(before)
        outcome.result.metrics.update(headline(before, "before_"))
    logger.info("%s is the best with %s %g", name, search.metric, outcome.result.metrics[search.metric])
    _tidy(claim.run_uri, [trial.id for trial in board.ranking() if trial.id != name])
    return outcome


def _base(claim: agent_pb2.ClaimRunResponse) -> Base:
    artifact = claim.inputs["base"]
    if artifact.model_kind == "adapter":
        raise InvalidArgument.of([Violation("job.sweep.finetune.base", f"{artifact.name} is an adapter; name a whole model")])
    return materialise(artifact, claim.storage_uri)


def _tidy(run_uri: str, losers: Iterable[str]) -> None:
    """Remove what the sweep needs no more: models that were not chosen, and Ray Tune's own notes."""
    for uri in [storage.join(run_uri, "tune"), *(trial_folder(run_uri, name) for name in losers)]:
        try:
            storage.delete_tree(uri)
        except LuthierError as error:
            logger.warning("%s stays behind: %s", uri, error.message)
