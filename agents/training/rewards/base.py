"""What a reward is, and how one is made from a job's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.errors import InvalidArgument, Violation
from common.methods import reward_name
from luthier.v1 import training_pb2


@dataclass(frozen=True)
class Answer:
    """An answer to be judged. `messages` are the prompt as a chat; `reference` is what the row has as its answer, or empty."""

    prompt: str
    text: str
    reference: str = ""
    line: int = 0
    messages: tuple[Mapping[str, str], ...] = ()


class Reward(Protocol):
    """A way to judge answers."""

    # Whether it compares with the row's answer, so that every row needs one.
    needs_reference: bool

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """What each answer is worth. Raises InvalidArgument that names the row where one cannot be judged."""

    def close(self) -> None:
        """Let go of what it holds."""


class Plain:
    """A reward that judges answers one by one, and holds nothing."""

    needs_reference = True

    def __init__(self, judge: Callable[[Answer], float], needs_reference: bool = True) -> None:
        self._judge = judge
        self.needs_reference = needs_reference

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """What each answer is worth."""
        return [self._judge(answer) for answer in answers]

    def close(self) -> None:
        """Nothing to let go of."""


@dataclass(frozen=True)
class Named:
    """A reward with its name and weight."""

    name: str
    weight: float
    reward: Reward


def make_rewards(settings: Sequence[training_pb2.Reward], models: Mapping[str, Path], device: str) -> list[Named]:
    """Make the rewards of a job. `models` are the folders of reward models by name of the reward."""
    return [
        Named(reward_name(each), each.weight if each.HasField("weight") else 1.0, _make(each, models, device))
        for each in settings
    ]


def check_references(rewards: Sequence[Named], rows: Sequence[tuple[int, str]], split: str) -> None:
    """Raise InvalidArgument (BAD_DATA) naming the rows (line, answer) without an answer, where a reward compares with it."""
    needy = [each.name for each in rewards if each.reward.needs_reference]
    missing = [line for line, reference in rows if not reference]
    if needy and missing:
        lines = ", ".join(map(str, missing[:20]))
        raise InvalidArgument(
            f"{len(missing)} of {len(rows)} rows of the split {split!r} have no answer, which the reward {needy[0]!r} compares "
            f"with: line {lines}; add a column completion, or leave these rows out",
            "BAD_DATA",
            [Violation(f"{split} line {line}", "has no answer to compare with") for line in missing[:20]],
        )


def _make(settings: training_pb2.Reward, models: Mapping[str, Path], device: str) -> Reward:
    kind: Any = settings.WhichOneof("kind")
    # Imported where needed: some are slow to import.
    if kind == "exact_match":
        from agents.training.rewards.exact_match import exact_match

        return exact_match(settings.exact_match)
    if kind == "regex":
        from agents.training.rewards.regex import regex

        return regex(settings.regex)
    if kind == "json_schema":
        from agents.training.rewards.json_schema import json_schema

        return json_schema(settings.json_schema)
    if kind == "numeric":
        from agents.training.rewards.numeric import numeric

        return numeric(settings.numeric)
    if kind == "similarity":
        from agents.training.rewards.similarity import similarity

        return similarity()
    if kind == "reward_model":
        from agents.training.rewards.reward_model import RewardModel

        return RewardModel(models[reward_name(settings)], device)
    from agents.training.rewards.function import Function

    return Function(settings.function, reward_name(settings))
