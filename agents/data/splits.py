"""Which rows are held out: by a hash of the row's content and a seed, so that neither order nor file format matters."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

import numpy as np

from common.rows import Row

TRAIN, TEST = "train", "test"


def split_key(row: Row, seed: int) -> int:
    """Return the row's place in the draw: evenly spread over 64 bits, the same for rows of equal content."""
    digest = hashlib.sha256(f"{seed}\n".encode() + row.canonical()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass
class Keys:
    """The keys of all rows in order: eight bytes a row, so that millions fit."""

    values: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, key: int) -> None:
        """Append the key of the next row."""
        self.values.append(key)

    def duplicates(self) -> int:
        """Return how many rows repeat an earlier one."""
        return len(self.values) - len(self._distinct())

    def threshold(self, fraction: float) -> int:
        """Return the key below which rows are held out, so that `fraction` of the distinct rows are.

        At least one is held out and one is not, where the fraction is not 0 and there are two distinct rows.
        """
        distinct = self._distinct()
        if fraction <= 0 or len(distinct) < 2:
            return 0
        count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
        return int(distinct[count])

    def shared_with(self, other: Keys) -> int:
        """Return how many of these rows are among the others too."""
        return int(np.isin(self._array(), other._distinct()).sum())

    def _distinct(self) -> np.ndarray:
        return np.unique(self._array())

    def _array(self) -> np.ndarray:
        return np.frombuffer(self.values, dtype=np.uint64) if self.values else np.empty(0, dtype=np.uint64)
