"""Rows whose answers are compared or judged, as tokens: prompt and answers apart, rendered and cut as in supervised training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from agents.training.data import Example, Tokenizer, answered
from agents.training.tokens.report import SplitReport
from common.rows import Message, Row, iter_split


@dataclass(frozen=True)
class Answers:
    """The rows of a split. Those whose answers do not fit are not among them."""

    dataset: Dataset
    lengths: np.ndarray
    report: SplitReport


def open_pairs(path: Path, tokenizer: Tokenizer, max_length: int, max_rows: int = 0) -> Answers:
    """Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`. Raises InvalidArgument (BAD_DATA) where none is left."""

    def pair(row: Row) -> tuple[dict[str, Any], list[Example]]:
        chosen, rejected = answered(tokenizer, row), answered(tokenizer, _rejected(row))
        # Tokens may merge across the border, so the two may part before the answers do.
        start = min(chosen[1], rejected[1])
        ids = {"prompt_ids": chosen[0][:start], "chosen_ids": chosen[0][start:], "rejected_ids": rejected[0][start:]}
        return ids, [_example(whole, start, max_length) for whole, _ in (chosen, rejected)]

    return _open(path, pair, max_length, max_rows)


def open_judged(path: Path, tokenizer: Tokenizer, max_length: int, max_rows: int = 0) -> Answers:
    """Rows with `prompt_ids`, `completion_ids` and whether they are desired (`label`). Raises as `open_pairs`."""

    def judged(row: Row) -> tuple[dict[str, Any], list[Example]]:
        ids, start = answered(tokenizer, row)
        values = {"prompt_ids": ids[:start], "completion_ids": ids[start:max_length], "label": row.label == "true"}
        return values, [_example(ids, start, max_length)]

    return _open(path, judged, max_length, max_rows)


def _open(path: Path, make: Callable[[Row], tuple[dict[str, Any], list[Example]]], max_length: int, max_rows: int) -> Answers:
    report, rows, lengths = SplitReport(path.stem, max_length), [], []
    for values, examples, line in _made(path, make, max_rows):
        # A row is as good as the worse of its answers.
        if report.add(min(examples, key=lambda example: example.targets), line):
            rows.append(values)
            lengths.append(sum(len(example.input_ids) for example in examples))
    report.check()
    return Answers(Dataset.from_list(rows), np.asarray(lengths, dtype=np.int64), report)


def _made(path: Path, make: Callable[[Row], Any], max_rows: int) -> Iterator[tuple[dict[str, Any], list[Example], int]]:
    for row in islice(iter_split(path), max_rows or None):
        yield *make(row), row.line


def _rejected(row: Row) -> Row:
    """The pair's other row."""
    if row.messages is None:
        return replace(row, completion=row.rejected)
    return replace(row, messages=(*row.messages[:-1], Message("assistant", row.rejected)))


def _example(ids: list[int], start: int, max_length: int) -> Example:
    labels = [-100] * start + ids[start:]
    return Example(ids[:max_length], labels[:max_length], len(ids), len(ids) - start)
