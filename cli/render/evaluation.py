"""Scores as tables."""

from __future__ import annotations

from typing import Literal

from rich.table import Table

from cli.render.text import number, plain_table
from luthier.v1.evaluation_pb2 import Classification, Evaluation

Way = Literal["generated", "likelihood"]

WAYS: tuple[tuple[Way, str], ...] = (("generated", "generated answers"), ("likelihood", "likelihood of each label"))
ROWS = ("loss", "perplexity")
SCORES = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "unparsed")


def side_by_side(columns: dict[str, Evaluation]) -> Table:
    """Evaluations next to each other, one a column."""
    table = plain_table("", *columns)
    table.columns[0].style = "bold"
    for name in ROWS:
        table.add_row(name, *(number(getattr(evaluation, name)) for evaluation in columns.values()))
    for way, title in WAYS:
        if not any(evaluation.HasField(way) for evaluation in columns.values()):
            continue
        table.add_row(f"by {title}", *("" for _ in columns), style="dim")
        for name in SCORES:
            cells = [
                number(getattr(getattr(evaluation, way), name)) if evaluation.HasField(way) else "-"
                for evaluation in columns.values()
            ]
            table.add_row(f"  {name.replace('_', ' ')}", *cells)
    table.add_row("rows", *(str(evaluation.rows) for evaluation in columns.values()))
    return table


def confusion_table(scores: Classification) -> Table:
    """How often each label (a row) was predicted as which (a column)."""
    table = plain_table("true \\ predicted", *scores.labels, "(none)")
    for label, row in zip(scores.labels, scores.confusion, strict=True):
        counts = [*row.counts, *([0] * (len(scores.labels) + 1 - len(row.counts)))]
        table.add_row(label, *("." if count == 0 else str(count) for count in counts))
    return table
