"""When a canary goes on, and when it goes back: a pure function of what the gateway counted. No store, no clock, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common.errors import Violation
from luthier.v1 import endpoint_pb2

STEPS = (5, 25, 50, 100)
MIN_REQUESTS = 50
MIN_SECONDS = 60.0
MAX_ERROR_RATE = 0.05
MAX_LATENCY_RATIO = 2.0
FEEDBACK_NEEDED = 10

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the gateway's latency buckets, in seconds; as in serving/gateway/traffic.py, which a test compares."""

CONFIDENCE = 1.96
"""Standard deviations: a rate counts as too high when it would be so with 97.5% confidence."""


@dataclass
class Counts:
    """What was counted of some routes together. Latencies in seconds."""

    requests: int = 0
    errors: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    feedback: int = 0
    feedback_sum: float = 0.0

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Counts:
        """Read the gateway's counts of a route, or counts that were kept."""
        return cls(**{name: told[name] for name in ("requests", "errors", "buckets", "feedback", "feedback_sum") if name in told})

    def __add__(self, other: Counts) -> Counts:
        return self._combined(other, 1)

    def __sub__(self, other: Counts) -> Counts:
        return self._combined(other, -1)

    def _combined(self, other: Counts, sign: int) -> Counts:
        return Counts(
            self.requests + sign * other.requests,
            self.errors + sign * other.errors,
            [mine + sign * theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True)],
            self.feedback + sign * other.feedback,
            self.feedback_sum + sign * other.feedback_sum,
        )

    @property
    def error_rate(self) -> float:
        """Part of the answers that failed."""
        return self.errors / self.requests if self.requests else 0.0

    @property
    def p95(self) -> float:
        """95th percentile of the latency, interpolated within its bucket; the last bucket has no end and counts as its begin."""
        wanted, before = 0.95 * sum(self.buckets), 0.0
        for number, count in enumerate(self.buckets):
            if count and before + count >= wanted:
                low = BUCKETS[number - 1] if number else 0.0
                high = BUCKETS[number] if number < len(BUCKETS) else low
                return low + (high - low) * (wanted - before) / count
            before += count
        return 0.0

    @property
    def score(self) -> float:
        """Mean of the feedback."""
        return self.feedback_sum / self.feedback if self.feedback else 0.0

    def message(self) -> endpoint_pb2.RouteFigures:
        """The figures as users see them."""
        return endpoint_pb2.RouteFigures(
            requests=self.requests,
            errors=self.errors,
            p95_seconds=self.p95,
            feedback=self.feedback,
            feedback_score=self.score,
        )


@dataclass(frozen=True)
class Verdict:
    """What is to follow, and why, for people."""

    what: Literal["wait", "next", "back"]
    why: str


def decide(rollout: endpoint_pb2.Rollout, canary: Counts, stable: Counts, seconds: float) -> Verdict:
    """What follows from the counts since the step began, `seconds` ago.

    Errors are judged as soon as they can be: by the lower end of Wilson's interval (Wilson, 1927), so that three failures of four
    answers go back at once and one of forty does not. All else needs the answers that a step needs.
    """
    most = max(rollout.max_error_rate, stable.error_rate)
    if _least_rate(canary.errors, canary.requests) > most:
        told = f"{canary.errors} of {canary.requests} answers failed ({canary.error_rate:.1%}), more than {most:.1%}"
        return Verdict("back", told)
    if (
        rollout.HasField("min_feedback_score")
        and canary.feedback >= FEEDBACK_NEEDED
        and canary.score < rollout.min_feedback_score
    ):
        told = f"its feedback is {canary.score:.2f} over {canary.feedback} scores, less than {rollout.min_feedback_score:.2f}"
        return Verdict("back", told)
    if canary.requests < rollout.min_requests:
        return Verdict("wait", f"waits for {rollout.min_requests} answers of the canary, has {canary.requests}")
    # Of fewer answers of the old routes the percentile would be a matter of chance.
    if rollout.max_latency_ratio and stable.requests >= FEEDBACK_NEEDED and stable.p95 > 0:
        ratio = canary.p95 / stable.p95
        if ratio > rollout.max_latency_ratio:
            told = f"its 95th percentile is {canary.p95:.2f} s, {ratio:.1f} times the old routes' {stable.p95:.2f} s"
            return Verdict("back", f"{told}, more than {rollout.max_latency_ratio:g} times")
    if canary.error_rate > most:
        return Verdict("wait", f"{canary.error_rate:.1%} of its answers failed, which may be chance: waits for more answers")
    least = rollout.min_duration.ToTimedelta().total_seconds()
    if seconds < least:
        return Verdict("wait", f"waits until {least:g} s are over, {least - seconds:.0f} s to go")
    return Verdict("next", f"{canary.requests} answers, {canary.error_rate:.1%} failed, 95th percentile {canary.p95:.2f} s")


def _least_rate(errors: int, requests: int) -> float:
    """Lower end of Wilson's score interval."""
    if not requests:
        return 0.0
    rate, z = errors / requests, CONFIDENCE
    centre = rate + z * z / (2 * requests)
    spread = z * math.sqrt(rate * (1 - rate) / requests + z * z / (4 * requests * requests))
    return (centre - spread) / (1 + z * z / requests)


def weights(old: Sequence[int], new: Sequence[int], percent: int) -> tuple[list[int], list[int]]:
    """Weights by which the new routes together get `percent` of the traffic, each side keeping its own proportions."""
    total_old, total_new = sum(old) or 1, sum(new) or 1
    return [weight * (100 - percent) * total_new for weight in old], [weight * percent * total_old for weight in new]


def check(rollout: endpoint_pb2.Rollout) -> list[Violation]:
    """Fill in what is absent, and name what is wrong."""
    bad: list[Violation] = []
    if not rollout.steps:
        rollout.steps.extend(STEPS)
    steps = list(rollout.steps)
    if steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] != 100:
        bad.append(Violation("endpoint.rollout.steps", f"{steps} do not rise from 1 or more to 100"))
    for name, default, least, most in (
        ("min_requests", MIN_REQUESTS, 1, 1_000_000),
        ("max_error_rate", MAX_ERROR_RATE, 0, 1),
        ("max_latency_ratio", MAX_LATENCY_RATIO, 0, 1000),
    ):
        if not rollout.HasField(name):  # type: ignore[arg-type]
            setattr(rollout, name, default)
        if not least <= getattr(rollout, name) <= most:
            bad.append(Violation(f"endpoint.rollout.{name}", f"{getattr(rollout, name)} is not between {least} and {most}"))
    if rollout.HasField("min_feedback_score") and not 0 <= rollout.min_feedback_score <= 1:
        bad.append(Violation("endpoint.rollout.min_feedback_score", f"{rollout.min_feedback_score} is not between 0 and 1"))
    if not rollout.HasField("min_duration"):
        rollout.min_duration.FromMilliseconds(int(MIN_SECONDS * 1000))
    if not 0 <= rollout.min_duration.ToTimedelta().total_seconds() <= 30 * 86400:
        bad.append(Violation("endpoint.rollout.min_duration", "is not between 0 and 30 days"))
    return bad
