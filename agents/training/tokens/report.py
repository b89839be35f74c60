"""What became of the rows of a split when it was tokenised: which were cut, which were left out, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from agents.training.data import Example
from common.errors import InvalidArgument, Violation

NAMED = 20
NO_ANSWER = "no answer to learn"
CUT_AWAY = "the answer beyond max_length"


@dataclass
class Lines:
    """How many rows something happened to, and the lines of the first of them in the source."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        """Count a row."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(line)

    def __str__(self) -> str:
        lines = ", ".join(map(str, self.first)) + (", ..." if self.count > len(self.first) else "")
        return f"line {lines}" if self.count == 1 else f"lines {lines}"

    def have(self, what: str) -> str:
        """A clause about them."""
        return f"{self} {'has' if self.count == 1 else 'have'} {what}"


@dataclass
class SplitReport:
    """The rows of one split."""

    split: str
    max_length: int
    rows: int = 0
    cut: Lines = field(default_factory=Lines)
    no_answer: Lines = field(default_factory=Lines)
    cut_away: Lines = field(default_factory=Lines)

    @classmethod
    def of(cls, values: dict[str, Any]) -> SplitReport:
        """Read what `values` gave."""
        lines = {name: Lines(**values.pop(name)) for name in ("cut", "no_answer", "cut_away")}
        return cls(**values, **lines)

    def values(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @property
    def left_out(self) -> int:
        """Number of rows from which nothing can be learned."""
        return self.no_answer.count + self.cut_away.count

    def add(self, example: Example, line: int) -> bool:
        """Count a row. Returns whether there is anything to learn in it."""
        self.rows += 1
        if example.targets:
            if example.cut:
                self.cut.add(line)
            return True
        (self.cut_away if example.whole_targets else self.no_answer).add(line)
        return False

    def check(self) -> None:
        """Raise InvalidArgument (BAD_DATA), naming lines, where no row is left."""
        if not self.rows:
            raise InvalidArgument(
                f"the split {self.split!r} holds no rows, so there is nothing to learn from",
                "BAD_DATA",
                [Violation(self.split, "holds no rows")],
            )
        if self.left_out == self.rows:
            raise InvalidArgument(
                f"all {self.rows} rows of the split {self.split!r} have nothing left to learn within "
                f"max_length={self.max_length} tokens: {self._clauses()}; raise hyperparameters.max_length, shorten the prompts "
                "or give answers",
                "BAD_DATA",
                [Violation(f"{self.split} line {line}", f"has {why}") for lines, why in self._reasons() for line in lines.first],
            )

    def warnings(self) -> list[str]:
        """What to tell people about rows that are not learned as they stand."""
        texts = []
        if self.left_out:
            texts.append(f"{self._part(self.left_out)} left out, as nothing of them could be learned: {self._clauses()}")
        if self.cut.count:
            texts.append(f"{self._part(self.cut.count)} cut at max_length={self.max_length} tokens: {self.cut}")
        return texts

    def _part(self, count: int) -> str:
        return f"{count} of {self.rows} rows of {self.split!r} {'is' if count == 1 else 'are'}"

    def _reasons(self) -> list[tuple[Lines, str]]:
        reasons = [(self.no_answer, NO_ANSWER), (self.cut_away, f"{CUT_AWAY}={self.max_length}")]
        return [(lines, why) for lines, why in reasons if lines.count]

    def _clauses(self) -> str:
        return "; ".join(lines.have(why) for lines, why in self._reasons())
