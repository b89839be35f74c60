"""Reward `numeric`: 1 where the last number of the answer is that of the row's, within a tolerance."""

from __future__ import annotations

import math

import re2

from agents.training.rewards.base import Answer, Plain
from common.errors import InvalidArgument, Violation
from luthier.v1 import training_pb2

# Commas may part thousands.
_NUMBER = re2.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|[-+]?\.\d+")


def numeric(settings: training_pb2.NumericReward) -> Plain:
    """Make the reward."""

    def judge(answer: Answer) -> float:
        expected = last_number(answer.reference)
        if expected is None:
            raise InvalidArgument(
                f"the answer of the row at line {answer.line} holds no number, which the reward numeric compares with",
                "BAD_DATA",
                [Violation(f"line {answer.line}", "its answer holds no number")],
            )
        found = last_number(answer.text)
        if found is None:
            return 0.0
        return float(abs(found - expected) <= settings.absolute_tolerance + settings.relative_tolerance * abs(expected))

    return Plain(judge)


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none that a float can hold."""
    found = _NUMBER.findall(text)
    number = float(found[-1].replace(",", "")) if found else math.nan
    return number if math.isfinite(number) else None
