"""Reward `exact_match`: 1 where the answer is the row's, but for white space around it."""

from __future__ import annotations

from agents.training.rewards.base import Answer, Plain
from luthier.v1 import training_pb2


def exact_match(settings: training_pb2.ExactMatchReward) -> Plain:
    """Make the reward."""

    def judge(answer: Answer) -> float:
        text, reference = answer.text.strip(), answer.reference.strip()
        if settings.ignore_case:
            text, reference = text.casefold(), reference.casefold()
        return float(text == reference)

    return Plain(judge)
