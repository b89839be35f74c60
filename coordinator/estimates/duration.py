"""How long a fine-tune may take, by what the project's own runs of the same kind took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session, col, select

from coordinator.jobs.states import State
from coordinator.store.tables import Job

MOST_RUNS = 20
"""The latest runs that are looked at."""

ALIKE = (
    *("base", "method", "workers"),
    *("worker_resources", "sharding", "precision", "packing"),
)
"""Fields of the spec in which an earlier run has to be the same."""

ALIKE_HYPERPARAMETERS = ("batch_size", "gradient_accumulation", "max_length")

ALIKE_REINFORCEMENT = ("num_generations", "max_completion_length", "beta", "rewards")


@dataclass(frozen=True)
class Past:
    """An earlier run: seconds of a step, and all other seconds from its start to its end."""

    step: float
    around: float


def steps(rows: int, epochs: float, max_steps: int, batch_size: int, accumulation: int, workers: int) -> int:
    """Optimiser steps of a fine-tune on so many rows."""
    if max_steps > 0:
        return max_steps
    micro = math.ceil(rows / (batch_size * workers))
    return max(1, math.ceil(epochs * max(1, math.ceil(micro / accumulation))))


def alike(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a spec (FinetuneSpec as JSON) decides how long a step takes."""
    hyper = spec.get("hyperparameters", {})
    return {
        **{name: spec.get(name) for name in ALIKE},
        **{name: hyper.get(name) for name in ALIKE_HYPERPARAMETERS},
        "rank": spec.get("lora", {}).get("rank"),
        "adapter": "lora" in spec,
        **{name: spec.get("reinforcement", {}).get(name) for name in ALIKE_REINFORCEMENT},
    }


def past_runs(session: Session, project: str, spec: dict[str, Any]) -> list[Past]:
    """The project's latest fine-tunes of the same kind that succeeded in one run."""
    query = select(Job.spec, Job.result, Job.start_time, Job.end_time).where(
        Job.project_id == project,
        Job.kind == "finetune",
        Job.state == State.SUCCEEDED.value,
        Job.run == 1,
        col(Job.delete_time).is_(None),
    )
    found, wanted = [], alike(spec)
    for other, result, start, end in session.exec(query.order_by(col(Job.end_time).desc()).limit(500)).all():
        metrics = result.get("metrics", {})
        trained, count = float(metrics.get("train_seconds", 0)), float(metrics.get("train_steps", 0))
        if start is None or end is None or not trained or not count or alike(other) != wanted:
            continue
        found.append(Past(trained / count, max(0.0, (end - start).total_seconds() - trained)))
        if len(found) == MOST_RUNS:
            break
    return found


def seconds(past: Sequence[Past], count: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of what so many steps would have taken each of the earlier runs."""
    whole = [run.around + run.step * count for run in past]
    if len(whole) == 1:
        return whole[0], whole[0], whole[0]
    lower, middle, upper = statistics.quantiles(whole, n=4, method="inclusive")
    return lower, middle, upper
