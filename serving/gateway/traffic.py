"""What each route was asked and how it did, counted since the gateway began: for canaries, for Prometheus, for whoever asks."""

from __future__ import annotations

import secrets
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the latencies that are counted together, in seconds; one more is for all above."""

REMEMBERED = 20_000
"""Ids of answers that feedback may still come for; an answer has two."""


@dataclass
class RouteCounts:
    """Counts of one route of one endpoint. Latencies are of whole answers, in seconds."""

    requests: int = 0
    errors: int = 0  # answers that failed by no fault of the caller's
    tokens: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    feedback: int = 0
    feedback_sum: float = 0.0

    def add(self, seconds: float) -> None:
        """Count the latency of an answer."""
        self.seconds += seconds
        self.buckets[bisect_left(BUCKETS, seconds)] += 1


class Measure:
    """One request at one route, from its beginning to its end. The first word on how it ended counts."""

    def __init__(self, traffic: Traffic, name: str, app: str) -> None:
        self._traffic = traffic
        self._name = name
        self._app = app
        self._begun = time.monotonic()
        self._ended = False
        traffic.in_flight[app] += 1

    def answered(self, tokens: int) -> None:
        """It was answered to its end, with so many tokens."""
        if counts := self._end():
            counts.requests += 1
            counts.tokens += tokens
            counts.add(time.monotonic() - self._begun)

    def failed(self) -> None:
        """It was not answered, by no fault of the caller's."""
        if counts := self._end():
            counts.requests += 1
            counts.errors += 1
            counts.add(time.monotonic() - self._begun)

    def dropped(self) -> None:
        """Its caller left, or asked for what cannot be answered: it says nothing about the route."""
        self._end()

    def _end(self) -> RouteCounts | None:
        if self._ended:
            return None
        self._ended = True
        self._traffic.in_flight[self._app] -= 1
        return self._traffic.of(self._name)


class Traffic:
    """Counts by route, and what is in flight by application."""

    def __init__(self) -> None:
        self.started = secrets.token_hex(8)  # counts begin anew with another one
        self.in_flight: Counter[str] = Counter()
        self._routes: dict[str, RouteCounts] = {}
        self._answered: OrderedDict[str, tuple[str, str]] = OrderedDict()

    @staticmethod
    def name(project: str, endpoint: str, model_version: str) -> str:
        """What a route's counts are found by."""
        return f"{project}/{endpoint}/{model_version}"

    def of(self, name: str) -> RouteCounts:
        """The counts of a route, which may be written to."""
        return self._routes.setdefault(name, RouteCounts())

    def begin(self, name: str, app: str) -> Measure:
        """Count a request in."""
        return Measure(self, name, app)

    def remember(self, project: str, name: str, *ids: str) -> None:
        """Note who gave an answer, so that feedback finds it. The latest so many are remembered."""
        for each in ids:
            self._answered[each] = (project, name)
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    def rate(self, project: str, id_: str, score: float) -> bool:
        """Count a score for the route that gave an answer. False where the project has no such answer any more."""
        owner, name = self._answered.get(id_, ("", ""))
        if not name or owner != project:
            return False
        counts = self.of(name)
        counts.feedback += 1
        counts.feedback_sum += score
        return True

    def keep(self, names: frozenset[str]) -> None:
        """Forget routes that are no more."""
        self._routes = {name: counts for name, counts in self._routes.items() if name in names}

    def routes(self) -> list[tuple[str, RouteCounts]]:
        """The counts by `project/endpoint/model_version`."""
        return sorted(self._routes.items())

    def told(self) -> Mapping[str, Any]:
        """All of it, for the coordinator."""
        routes = {name: vars(counts) for name, counts in self._routes.items()}
        return {"started": self.started, "in_flight": {app: n for app, n in self.in_flight.items() if n}, "routes": routes}
