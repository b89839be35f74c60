"""Evaluating as a Ray task of its own, wherever there is room. The driver stays light and tells how far it is."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.failures import RunCancelled
from agents.link import Link
from common import manifest
from common.errors import Internal, InvalidArgument, Violation
from common.rows import read_split
from luthier.v1 import evaluation_pb2, job_pb2

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class EvaluationRequest:
    """Everything a task on another node needs: artifacts by URI and hash, and how to score."""

    model_uri: str
    model_hash: str
    base_uri: str
    base_hash: str
    dataset_uri: str
    dataset_hash: str
    split: str
    max_rows: int
    labels: tuple[str, ...]
    label_key: str
    generate: bool
    threads: int


def evaluate_remotely(
    model_uri: str,
    model_hash: str,
    base_uri: str,
    base_hash: str,
    dataset_uri: str,
    dataset_hash: str,
    *,
    split: str,
    max_rows: int,
    labels: Sequence[str],
    label_key: str,
    generate: bool,
    cpus: float,
    gpus: float,
    selector: Mapping[str, str],
    name: str,
    dataset_name: str,
    link: Link,
    phase: str,
    progress: job_pb2.Progress | None = None,
) -> evaluation_pb2.Evaluation:
    """Score a model that lies in storage, in a Ray task that holds `cpus` and `gpus` on a node that `selector` matches.

    An adapter names its base by `base_uri`; for a whole model that is empty. `name` and `dataset_name` are how the scores call
    them. The progress sent to `link` counts rows, unless `progress` is given: then its steps are kept, and only phase and
    remaining time change. Raises RunCancelled where the run is asked to stop, and whatever the task raised.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    request = EvaluationRequest(
        model_uri=model_uri,
        model_hash=model_hash,
        base_uri=base_uri,
        base_hash=base_hash,
        dataset_uri=dataset_uri,
        dataset_hash=dataset_hash,
        split=split or "test",
        max_rows=max_rows,
        labels=tuple(labels),
        label_key=label_key,
        generate=generate,
        threads=max(1, round(cpus)),
    )
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        label_selector=dict(selector) or None,
        num_returns="streaming",
        # On a GPU the process holds the model's memory, so it ends with the task; else the next one saves the imports.
        max_calls=1 if gpus else 0,
        max_retries=0,
        # The driver of a sweep's trial lives in a placement group that has no room for this.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
    )(_run_task)
    stream = task.options(name=f"evaluate:{name}").remote(request)
    result: evaluation_pb2.Evaluation | None = None
    began = time.monotonic()
    while result is None:
        ready, _ = ray.wait([stream], timeout=POLL_SECONDS, fetch_local=False)
        if link.wished.is_set():
            ray.cancel(stream, force=True)
            raise RunCancelled(link.wish_reason)
        if ready:
            result = _receive(ray, stream, link, phase, progress, began)
    result.model, result.dataset, result.split = name, dataset_name, request.split
    return result


def _receive(
    ray: Any, stream: Any, link: Link, phase: str, progress: job_pb2.Progress | None, began: float
) -> evaluation_pb2.Evaluation | None:
    """Take the next item of the task: the scores, or a word on how far it is."""
    try:
        item = ray.get(next(stream))
    except StopIteration:
        raise Internal("the evaluation ended without scores") from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    if isinstance(item, bytes):
        return evaluation_pb2.Evaluation.FromString(item)
    done, total, warning = item
    if warning:
        logger.warning("%s", warning)
    word = job_pb2.Progress(step=done, total_steps=total)
    if progress is not None:
        word.CopyFrom(progress)
    word.phase = phase
    word.remaining.FromMilliseconds(round((time.monotonic() - began) * 1000 * (total - done) / max(done, 1)))
    link.progress(word)
    return None


def _run_task(request: EvaluationRequest) -> Iterator[tuple[int, int, str] | bytes]:
    """Fetch model and rows onto this node and score; yields how far it is and, last, the scores."""
    data_dir = manifest.fetch(request.dataset_uri, request.dataset_hash)
    rows = read_split(split_file(data_dir, request.split))
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import torch

    from agents.evaluation.evaluate import sample, score_rows
    from serving.engines import load_engine

    torch.set_num_threads(request.threads)
    base_dir = manifest.fetch(request.base_uri, request.base_hash) if request.base_uri else None
    engine = load_engine(manifest.fetch(request.model_uri, request.model_hash), base_dir)
    steps = score_rows(
        engine, sample(rows, request.max_rows), request.labels, label_key=request.label_key, generate=request.generate
    )
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            yield end.value.SerializeToString()
            return
        yield step.done, step.total, step.warning


def split_file(data_dir: Path, split: str) -> Path:
    """Return the file of a split. Raises InvalidArgument that names the splits there are."""
    files = {path.stem: path for path in sorted(data_dir.glob("*.parquet"))}
    if split not in files:
        there = ", ".join(files) or "none"
        raise InvalidArgument.of([Violation("split", f"the data set has no split {split!r}; it has: {there}")], "BAD_DATA")
    return files[split]
