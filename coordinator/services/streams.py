"""How many streams may be open at once: watches and log followers, each of which costs memory for as long as it lives."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from common.errors import ResourceExhausted


class Streams:
    """Counts what is open, in all and by project, so that one project cannot take what the others need."""

    def __init__(self, most: int, most_of_project: int) -> None:
        self._most = most
        self._most_of_project = most_of_project
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def opened(self, project: str) -> Iterator[None]:
        """Hold a place while the stream lives. Raises ResourceExhausted where none is left."""
        if self._open[project] >= self._most_of_project:
            raise ResourceExhausted(
                f"the project has {self._most_of_project} streams open, which is the most (max_project_streams); close some, "
                "or watch the whole project with one WatchJobs",
                "TOO_MANY_STREAMS",
            )
        if self._open.total() >= self._most:
            raise ResourceExhausted(
                f"{self._most} streams are open, which is the most that this coordinator holds (max_streams); try again later",
                "TOO_MANY_STREAMS",
            )
        self._open[project] += 1
        try:
            yield
        finally:
            self._open[project] -= 1
            if not self._open[project]:
                del self._open[project]
