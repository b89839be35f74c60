"""Which checkpoints of a run are kept: one rule, by which the ranks delete and the records forget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import Violation

LATEST = 2
"""Latest checkpoints that are kept where a policy names no number."""

LOWER_IS_BETTER = {"loss": True, "eval_loss": True, "token_accuracy": False}
"""Figures that the best checkpoint can be chosen by, and whether less of them is better."""

DEFAULT_METRIC = "loss"


@dataclass(frozen=True)
class Keep:
    """A policy: how many of the latest and of the best to keep, and each multiple of `every` steps. 0 of anything is none."""

    latest: int = LATEST
    best: int = 0
    every: int = 0
    metric: str = DEFAULT_METRIC

    @classmethod
    def of(cls, policy: Mapping[str, Any]) -> Keep:
        """Read a CheckpointPolicy as JSON with the contract's field names."""
        return cls(
            int(policy.get("keep", LATEST)),
            int(policy.get("keep_best", 0)),
            int(policy.get("keep_every", 0)),
            policy.get("metric") or DEFAULT_METRIC,
        )

    def violations(self, given: Mapping[str, bool], path: str) -> list[Violation]:
        """What is wrong with it, by field below `path`; `given` says which of the contract's fields were given."""
        known, least = ", ".join(LOWER_IS_BETTER), "is not at least 1; leave it out for none"
        checks = [
            (self.latest >= 1, "keep", f"{self.latest} is not at least 1"),
            (self.best >= 1 or not given.get("keep_best"), "keep_best", f"{self.best} {least}"),
            (self.every >= 1 or not given.get("keep_every"), "keep_every", f"{self.every} {least}"),
            (self.metric in LOWER_IS_BETTER, "metric", f"{self.metric[:40]!r} is none of {known}"),
            (not given.get("metric") or bool(given.get("keep_best")), "metric", "given without keep_best, which it is for"),
        ]
        return [Violation(f"{path}.{name}", text) for good, name, text in checks if not good]


def kept(keep: Keep, checkpoints: Mapping[int, Mapping[str, float]]) -> frozenset[int]:
    """The steps of one run's checkpoints that stay, of those given with the figures of each.

    Of checkpoints that are equally good the later is better; one without the figure, or where it is no number, is never best.
    Keeping is stable: what this drops now it would drop later too, so that ranks and records may ask at different moments.
    """
    steps = sorted(checkpoints)
    staying = set(steps[-keep.latest :]) if keep.latest else set()
    if keep.every:
        staying |= {step for step in steps if step % keep.every == 0}
    if keep.best:
        sign = 1.0 if LOWER_IS_BETTER[keep.metric] else -1.0
        judged = [(sign * value, -step) for step in steps if math.isfinite(value := checkpoints[step].get(keep.metric, math.nan))]
        staying |= {-negative for _, negative in sorted(judged)[: keep.best]}
    return frozenset(staying)
