"""Reward `regex`: 1 where a pattern is found. RE2 takes time linear in the text, whatever the pattern: none hangs a run."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import re2

from agents.training.rewards.base import Answer, Plain
from luthier.v1 import training_pb2

REFERENCE = "{answer}"


def regex(settings: training_pb2.RegexReward) -> Plain:
    """Make the reward. `{answer}` in the pattern is the row's answer, letter by letter."""
    pattern = settings.pattern

    @lru_cache(maxsize=1024)
    def compiled(reference: str) -> Any:
        return re2.compile(pattern.replace(REFERENCE, re2.escape(reference)))

    def judge(answer: Answer) -> float:
        return float(compiled(answer.reference if REFERENCE in pattern else "").search(answer.text) is not None)

    return Plain(judge, needs_reference=REFERENCE in pattern)
