"""Which failed runs are tried again, when, and with what changed: decided by the cause, never by guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coordinator.jobs.states import EndReason

DEFAULT_RETRIES = 2
"""Retries of a job that names no number."""

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
"""Seconds before the first retry, and the most that doubling them comes to."""

FAULTS = frozenset({EndReason.NODE_LOST, EndReason.AGENT_LOST, EndReason.LAUNCH_FAILED, EndReason.HANG})
"""Causes that lie with the machines: the same run may well succeed elsewhere or later."""

DEFAULT_BATCH, DEFAULT_ACCUMULATION = 8, 1
"""What a fine-tune runs with where it names nothing (see Hyperparameters in training.proto)."""


@dataclass(frozen=True)
class Retry:
    """Another try: after a pause in seconds, with some hyperparameters changed."""

    pause: float
    hyperparameters: dict[str, int] = field(default_factory=dict)

    @property
    def change(self) -> str:
        """What is different, for people; empty where nothing is."""
        return ", ".join(f"{name} {value}" for name, value in sorted(self.hyperparameters.items()))


def most_retries(policy: dict[str, Any]) -> int:
    """Retries that a policy (RetryPolicy as JSON) allows."""
    return int(policy.get("max_retries", DEFAULT_RETRIES))


def next_try(reason: EndReason, attempt: int, policy: dict[str, Any], spec: dict[str, Any]) -> Retry | None:
    """What to try after a failure, or None where trying again makes no sense or was done often enough.

    `attempt` counts the retries so far, `spec` is a fine-tune's spec as JSON (empty for other kinds). Memory that ran out is
    tried again only with a smaller micro-batch: the same settings would run out again.
    """
    if attempt >= most_retries(policy):
        return None
    pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
    if reason in FAULTS:
        return Retry(pause)
    if reason is EndReason.OUT_OF_MEMORY and policy.get("smaller_micro_batch", True) and spec:
        smaller = smaller_micro_batch(spec.get("hyperparameters", {}))
        return Retry(pause, smaller) if smaller else None
    return None


def smaller_micro_batch(hyperparameters: dict[str, Any]) -> dict[str, int]:
    """The same number of rows per optimiser step in smaller portions; empty where a portion is one row already."""
    batch = int(hyperparameters.get("batch_size", DEFAULT_BATCH))
    accumulation = int(hyperparameters.get("gradient_accumulation", DEFAULT_ACCUMULATION))
    divisor = next((number for number in range(2, batch + 1) if batch % number == 0), None)
    if divisor is None:
        return {}
    return {"batch_size": batch // divisor, "gradient_accumulation": accumulation * divisor}
