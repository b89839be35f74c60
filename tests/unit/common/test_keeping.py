"""Which checkpoints stay: the latest, the best, and each so many steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.keeping import Keep, kept

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5, 50: 4.0}


def of(losses: dict[int, float], metric: str = "loss") -> dict[int, dict[str, float]]:
    return {step: {metric: value} for step, value in losses.items()}


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        (Keep(), {40, 50}),
        (Keep(latest=1), {50}),
        (Keep(latest=9), set(LOSSES)),
        (Keep(latest=1, best=1), {20, 50}),
        (Keep(latest=1, best=2), {20, 40, 50}),
        (Keep(latest=1, every=20), {20, 40, 50}),
        (Keep(latest=1, best=1, every=30), {20, 30, 50}),
        (Keep(latest=2, best=1, metric="eval_loss"), {40, 50}),
    ],
)
def test_what_any_rule_keeps_stays(keep: Keep, stays: set[int]) -> None:
    assert kept(keep, of(LOSSES)) == stays


def test_more_is_better_where_the_figure_says_so() -> None:
    points = of({1: 0.2, 2: 0.9, 3: 0.5}, "token_accuracy")
    assert kept(Keep(latest=1, best=1, metric="token_accuracy"), points) == {2, 3}


def test_of_equals_the_later_is_best_and_what_is_no_number_never() -> None:
    assert kept(Keep(latest=1, best=1), of({1: 1.0, 2: 1.0, 3: 2.0})) == {2, 3}
    assert kept(Keep(latest=1, best=2), of({1: math.nan, 2: -math.inf, 3: 5.0, 4: 6.0})) == {3, 4}


@given(
    st.lists(st.floats(allow_nan=True), max_size=12), st.integers(1, 3), st.integers(0, 3), st.integers(0, 4), st.integers(1, 12)
)
def test_forgetting_one_by_one_is_forgetting_at_once(losses: list[float], latest: int, best: int, every: int, chunk: int) -> None:
    # The ranks ask after every checkpoint, the records after whatever arrived together.
    keep = Keep(latest, best, every)
    points = of(dict(enumerate(losses, start=1)))
    there: dict[int, dict[str, float]] = {}
    for number, (step, figures) in enumerate(points.items(), start=1):
        there[step] = figures
        if number % chunk == 0:
            there = {left: there[left] for left in kept(keep, there)}
    assert kept(keep, there) == kept(keep, points)
    assert not points or max(points) in kept(keep, points)


def test_a_policy_is_read_as_the_store_keeps_it() -> None:
    assert Keep.of({}) == Keep(2, 0, 0, "loss")
    policy = {"every_steps": 5, "keep": 1, "keep_best": 3, "keep_every": 100, "metric": "eval_loss"}
    assert Keep.of(policy) == Keep(1, 3, 100, "eval_loss")


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"keep": 0}, "keep"),
        ({"keep_best": 0}, "keep_best"),
        ({"keep_every": -5}, "keep_every"),
        ({"keep_best": 1, "metric": "accuracy"}, "metric"),
        ({"metric": "eval_loss"}, "metric"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_by_field(policy: dict[str, object], field: str) -> None:
    found = Keep.of(policy).violations(dict.fromkeys(policy, True), "checkpoints")
    assert [violation.field for violation in found] == [f"checkpoints.{field}"]
