"""Scores over labels, by scikit-learn's definitions."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.v1 import evaluation_pb2


def classify(truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> evaluation_pb2.Classification:
    """Compare predictions (None where an answer held no known label) with the true labels.

    The means run over the labels that occur, in the truth or as a prediction; an answer without a label counts as wrong but is
    no label of its own. A label that was never predicted has precision 0.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    index = {label: number for number, label in enumerate(labels)}
    none = len(labels)
    true_ids = [index[label] for label in truth]
    predicted_ids = [none if label is None else index[label] for label in predicted]
    occurring = sorted({*true_ids, *predicted_ids} - {none})
    precision, recall, f1, _ = precision_recall_fscore_support(
        true_ids, predicted_ids, labels=occurring, average="macro", zero_division=0
    )
    matrix = confusion_matrix(true_ids, predicted_ids, labels=range(none + 1))
    return evaluation_pb2.Classification(
        accuracy=float(accuracy_score(true_ids, predicted_ids)),
        macro_precision=float(precision),
        macro_recall=float(recall),
        macro_f1=float(f1),
        unparsed=predicted_ids.count(none),
        labels=labels,
        confusion=[evaluation_pb2.ConfusionRow(counts=[int(count) for count in row]) for row in matrix[:none]],
    )
