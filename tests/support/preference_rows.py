"""Pairs, judged answers, prompts and texts that the micro model can learn in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common.rows import Message, Row, write_split
from tests.support.micro_model import COLOURS, WORDS, colour_rows


def pair_rows(count: int, seed: int = 0) -> list[Row]:
    """The colour among a prompt's words is better than another one. Every other row is a chat."""
    rng = random.Random(seed)
    rows = []
    for row in colour_rows(count, seed):
        wrong = rng.choice([colour for colour in COLOURS if colour != row.completion])
        chat = (Message("user", row.prompt), Message("assistant", row.completion))
        rows.append(replace(row, label="", rejected=wrong, messages=chat if row.line % 2 else None))
    return [row if row.messages is None else replace(row, prompt="", completion="") for row in rows]


def judged_rows(count: int, seed: int = 0) -> list[Row]:
    """Answers, half of which are the colour among the prompt's words."""
    rng = random.Random(seed)
    rows = []
    for row in colour_rows(count, seed):
        good = rng.random() < 0.5
        wrong = rng.choice([colour for colour in COLOURS if colour != row.completion])
        rows.append(replace(row, completion=row.completion if good else wrong, label="true" if good else "false"))
    return rows


def prompt_rows(count: int, seed: int = 0) -> list[Row]:
    """Prompts whose answer is always the same word, so that a random model can come upon it."""
    return [replace(row, completion="red", label="") for row in colour_rows(count, seed)]


def text_rows(count: int, seed: int = 0) -> list[Row]:
    """Texts that go round the words in order, so that each word tells the next, and how often each occurs tells nothing."""
    rng = random.Random(seed)
    rows = []
    for line in range(1, count + 1):
        start, length = rng.randrange(len(WORDS)), rng.randrange(10, 60)
        rows.append(Row(completion=" ".join(WORDS[(start + n) % len(WORDS)] for n in range(length)), line=line))
    return rows


def write_rows(folder: Path, make: Callable[[int, int], list[Row]], train: int, test: int) -> Path:
    """Write a data set, as a version holds it."""
    folder.mkdir(parents=True)
    write_split(make(train, 0), folder / "train.parquet")
    write_split(make(test, 1), folder / "test.parquet")
    return folder
