"""The demonstration's data set, and the classical baseline on the same rows."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cli.failures import Failure

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE = EXAMPLES / "tickets.py"

Row = dict[str, str]


def load_rows() -> list[Row]:
    """The support tickets of examples/tickets.py: prompt, completion, label and split."""
    spec = importlib.util.spec_from_file_location("luthier_example_tickets", EXAMPLE)
    if not EXAMPLE.is_file() or spec is None or spec.loader is None:
        raise Failure(f"the example data is not there ({EXAMPLE}); run the demo from a checkout of Luthier: `make demo`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows: Callable[[], Iterable[Row]] = module.rows
    return list(rows())


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Write rows, one JSON document a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def questions(rows: list[Row], count: int = 3) -> list[Row]:
    """Held-out tickets to ask the endpoint, each of another category, the shortest of it."""
    held_out = sorted((row for row in rows if row["split"] == "test"), key=lambda row: len(row["prompt"]))
    first: dict[str, Row] = {}
    for row in held_out:
        first.setdefault(row["label"], row)
    return list(first.values())[:count]


@dataclass(frozen=True)
class Baseline:
    """Scores of TF-IDF with logistic regression."""

    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float


def baseline(rows: list[Row]) -> Baseline:
    """Train and score TF-IDF with logistic regression on the splits that the model gets, so that nobody is fooled."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]

    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] == "test"]
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000, C=10))
    pipeline.fit([row["prompt"] for row in train], [row["label"] for row in train])
    truth, predicted = [row["label"] for row in test], pipeline.predict([row["prompt"] for row in test])
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    return Baseline(float(accuracy_score(truth, predicted)), float(precision), float(recall), float(f1))
