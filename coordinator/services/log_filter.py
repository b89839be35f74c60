"""Which lines of a log somebody wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import re2

from common.errors import InvalidArgument, Violation
from coordinator.store.tables import JobLog
from luthier.v1 import job_pb2

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LONGEST_PATTERN = 1000
"""Characters of a pattern."""


@dataclass(frozen=True)
class LineFilter:
    """Source, run, least level and pattern; each of them matches everything where it is empty."""

    source: str
    run: int
    levels: frozenset[str]
    pattern: Any

    @classmethod
    def of(cls, request: job_pb2.TailLogsRequest) -> LineFilter:
        """Read a request. Raises InvalidArgument naming every field that cannot be read.

        The pattern is RE2's: its time is linear in the line, whatever somebody writes.
        """
        bad = []
        level = request.level.upper()
        if level and level not in LEVELS:
            bad.append(Violation("level", f"{request.level[:40]!r} is none; say one of {', '.join(LEVELS)}"))
        if request.run < 0:
            bad.append(Violation("run", f"{request.run} is no run; they are counted from 1, and 0 is all of them"))
        pattern = None
        if len(request.pattern) > LONGEST_PATTERN:
            bad.append(Violation("pattern", f"has {len(request.pattern)} characters; at most {LONGEST_PATTERN} are taken"))
        elif request.pattern:
            options = re2.Options()
            options.log_errors = False
            try:
                pattern = re2.compile(request.pattern, options)
            except re2.error as error:
                why = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
                bad.append(Violation("pattern", f"is no regular expression of RE2: {why}"))
        if bad:
            raise InvalidArgument.of(bad)
        return cls(request.source, request.run, frozenset(LEVELS[LEVELS.index(level) :] if level else ()), pattern)

    def takes(self, line: JobLog) -> bool:
        """Whether a line is wanted. A level that has no rank here, a library's own, is taken for INFO."""
        if (self.source and line.source != self.source) or (self.run and line.run != self.run):
            return False
        level = line.level if line.level in LEVELS else "INFO"
        return (not self.levels or level in self.levels) and (self.pattern is None or bool(self.pattern.search(line.message)))
