"""The spans of one process of a run: one for all that it does, and below that one for each of its phases."""

from __future__ import annotations

import threading

from opentelemetry.trace import Span

from common import tracing


class Trail:
    """Begins with the process's work. `traceparent` is what belongs below it in other processes; empty where traces are off."""

    def __init__(self, service: str, name: str, parent: str, **attributes: str | int) -> None:
        """`parent` is the traceparent that it belongs to; `name` says what the process does."""
        tracing.start_from_environment(service)
        self._whole = tracing.begin(name, parent, **attributes)
        self._phase: Span | None = None
        self._lock = threading.Lock()
        self.traceparent = tracing.traceparent(self._whole)

    def phase(self, word: str) -> None:
        """The phase before is over, and another begins."""
        with self._lock:
            self._end_phase()
            self._phase = tracing.begin(word, self.traceparent) if self.traceparent else None

    def end(self, failure: str = "") -> None:
        """The work is over; `failure` is a word for why, where it was not done. `tracing.flush` sends what is left."""
        with self._lock:
            if failure:
                for span in filter(None, (self._phase, self._whole)):
                    tracing.failed(span, failure)
            self._end_phase()
            self._whole.end()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.end()
            self._phase = None
