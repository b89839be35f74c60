"""The quality report: what was seen while reading, and what a person should look at."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from agents.data.splits import TEST, TRAIN, Keys
from common.rows import Row
from luthier.v1 import dataset_pb2

LONG_CHARACTERS = 16_384
FEW_ROWS = 5
NAMED = 5


@dataclass
class Tally:
    """Counts over all rows, row by row."""

    keys: Keys = field(default_factory=Keys)
    split_keys: dict[str, Keys] = field(default_factory=lambda: defaultdict(Keys))
    labels: Counter[str] = field(default_factory=Counter)
    split_labels: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    characters: int = 0
    most_characters: int = 0
    long_rows: int = 0

    def add(self, row: Row, key: int) -> None:
        """Count a row as it is read."""
        self.keys.add(key)
        length = row.characters()
        self.characters += length
        self.most_characters = max(self.most_characters, length)
        self.long_rows += length > LONG_CHARACTERS
        if row.label:
            self.labels[row.label] += 1

    def place(self, row: Row, key: int, split: str) -> None:
        """Count a row in its split."""
        self.split_keys[split].add(key)
        if row.label:
            self.split_labels[split].add(row.label)

    def report(self) -> dataset_pb2.QualityReport:
        """Return the report once every row has been read and placed."""
        rows = len(self.keys.values)
        return dataset_pb2.QualityReport(
            duplicate_rows=self.keys.duplicates(),
            label_counts=dict(self.labels),
            mean_characters=self.characters / rows if rows else 0.0,
            max_characters=self.most_characters,
            warnings=self._warnings(),
        )

    def _warnings(self) -> list[str]:
        warnings = []
        repeated = self.keys.duplicates()
        if repeated:
            warnings.append(f"{repeated:,} rows repeat an earlier row")
        if TEST not in self.split_keys:
            warnings.append(
                "no rows are held out as test; set test_fraction above 0 or give a split column, or nothing can be evaluated"
            )
        for name, keys in sorted(self.split_keys.items()):
            shared = keys.shared_with(self.split_keys[TRAIN]) if name != TRAIN else 0
            if shared:
                warnings.append(f"{shared:,} rows of {name} are in train too, so scores on {name} will look better than they are")
            unknown = self.split_labels[name] - self.split_labels[TRAIN]
            if unknown and name != TRAIN:
                warnings.append(f"{name} has labels that train lacks: {_named(unknown)}")
        if len(self.labels) == 1:
            warnings.append(f"every row has the same label, {next(iter(self.labels))!r}")
        rare = {label for label, count in self.labels.items() if count < FEW_ROWS}
        if rare:
            warnings.append(f"fewer than {FEW_ROWS} rows have the labels {_named(rare)}")
        if self.long_rows:
            warnings.append(
                f"{self.long_rows:,} rows are longer than {LONG_CHARACTERS:,} characters and may be cut at max_length"
            )
        return warnings


def _named(labels: set[str]) -> str:
    shown = ", ".join(repr(label[:60]) for label in sorted(labels)[:NAMED])
    return shown + (f" and {len(labels) - NAMED} more" if len(labels) > NAMED else "")
