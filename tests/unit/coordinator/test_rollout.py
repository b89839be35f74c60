"""When a canary goes on and when it goes back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from coordinator.endpoints.rollout import BUCKETS, Counts, check, decide, weights
from luthier.v1 import endpoint_pb2
from serving.gateway import traffic


def rollout(**more: Any) -> endpoint_pb2.Rollout:
    made = endpoint_pb2.Rollout(min_duration=Duration(seconds=30), **more)
    assert check(made) == []
    return made


def counts(requests: int, errors: int = 0, seconds: float = 0.2, feedback: tuple[int, float] = (0, 0.0)) -> Counts:
    told = traffic.RouteCounts()
    for number in range(requests):
        told.requests += 1
        told.errors += number < errors
        told.add(seconds)
    return Counts.of({**vars(told), "feedback": feedback[0], "feedback_sum": feedback[0] * feedback[1]})


def test_both_sides_count_in_the_same_buckets() -> None:
    assert BUCKETS == traffic.BUCKETS


@pytest.mark.parametrize(
    ("canary", "stable", "seconds", "what", "why"),
    [
        (counts(50), counts(950), 30.0, "next", "50 answers"),
        (counts(49), counts(950), 300.0, "wait", "waits for 50 answers of the canary, has 49"),
        (counts(50), counts(950), 29.0, "wait", "1 s to go"),
        (counts(0), counts(0), 1e6, "wait", "has 0"),
        # Bad at once, a matter of chance, and no worse than before.
        (counts(4, 3), counts(100), 1.0, "back", "3 of 4 answers failed"),
        (counts(40, 1), counts(100), 1.0, "wait", "waits for 50"),
        (counts(60, 4), counts(100), 60.0, "wait", "may be chance"),
        (counts(600, 60), counts(900), 60.0, "back", "10.0%"),
        (counts(60, 6), counts(100, 12), 60.0, "next", "10.0% failed"),
        # Slower.
        (counts(50, seconds=2.0), counts(100), 60.0, "back", "95th percentile"),
        (counts(50, seconds=0.24), counts(100), 60.0, "next", ""),
        (counts(50, seconds=9.0), counts(5), 60.0, "next", ""),
    ],
)  # fmt: skip
def test_what_follows(canary: Counts, stable: Counts, seconds: float, what: str, why: str) -> None:
    verdict = decide(rollout(), canary, stable, seconds)
    assert (verdict.what, why in verdict.why) == (what, True), verdict


def test_feedback_counts_where_it_is_asked_for() -> None:
    bad = counts(30, feedback=(10, 0.3))
    assert decide(rollout(), bad, counts(100), 60.0).what == "wait"
    verdict = decide(rollout(min_feedback_score=0.5), bad, counts(100), 60.0)
    assert (verdict.what, "0.30 over 10 scores" in verdict.why) == ("back", True)
    assert decide(rollout(min_feedback_score=0.5), counts(30, feedback=(9, 0.0)), counts(100), 60.0).what == "wait"


def test_latency_may_be_left_out() -> None:
    assert decide(rollout(max_latency_ratio=0), counts(50, seconds=60), counts(100), 60.0).what == "next"


def test_good_canaries_are_seldom_sent_back_and_bad_ones_soon() -> None:
    """2% against 30% of failures; judged after each answer, as it comes."""

    def ended(rate: float, seed: int) -> tuple[str, int]:
        chance = random.Random(seed)
        canary = Counts()
        for number in range(1, 2000):
            canary += counts(1, int(chance.random() < rate))
            verdict = decide(rollout(min_requests=100), canary, counts(1000, 10), 60.0)
            if verdict.what != "wait":
                return verdict.what, number
        return "never", 0

    good = [ended(0.02, seed)[0] for seed in range(60)]
    bad = [ended(0.3, seed) for seed in range(60)]
    assert good.count("back") <= 6
    assert {what for what, _ in bad} == {"back"}
    assert sorted(number for _, number in bad)[30] <= 25


@pytest.mark.parametrize("percent", [1, 5, 50, 100])
def test_weights_split_as_asked_and_keep_their_proportions(percent: int) -> None:
    old, new = weights([3, 1], [1, 1, 2], percent)
    assert sum(new) * 100 == percent * (sum(old) + sum(new))
    assert (old[0] == 3 * old[1], new[2] == 2 * new[0]) == (True, True)


def test_percentiles_are_interpolated() -> None:
    assert counts(100, seconds=0.2).p95 == pytest.approx(0.1 + 0.15 * 0.95)
    assert counts(3, seconds=1e9).p95 == BUCKETS[-1]
    assert Counts().p95 == 0.0


def test_counts_add_up() -> None:
    total = counts(10, 2) + counts(5, 1, 3.0, (2, 0.5))
    assert (total.requests, total.errors, total.feedback, total.score) == (15, 3, 2, 0.5)
    assert total - counts(5, 1, 3.0, (2, 0.5)) == counts(10, 2)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"steps": [50, 25, 100]}, "steps"),
        ({"steps": [5, 50]}, "steps"),
        ({"steps": [0, 100]}, "steps"),
        ({"min_requests": 0}, "min_requests"),
        ({"max_error_rate": 1.5}, "max_error_rate"),
        ({"max_error_rate": float("nan")}, "max_error_rate"),
        ({"max_latency_ratio": -1.0}, "max_latency_ratio"),
        ({"min_feedback_score": 2.0}, "min_feedback_score"),
        ({"min_duration": Duration(seconds=-1)}, "min_duration"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], field: str) -> None:
    assert [bad.field for bad in check(endpoint_pb2.Rollout(**wrong))] == [f"endpoint.rollout.{field}"]
