"""Runs the requests that are waiting together in one batch of the engine."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from common import tracing
from common.errors import LuthierError
from serving.engines.base import Completion, Engine, Request

logger = logging.getLogger(__name__)

Done = Callable[[Completion | BaseException], None]
FAILURES_UNTIL_UNHEALTHY = 3


class Batcher:
    """Threads that take what waits, up to `max_rows` at once, and run it to its end.

    With more than one thread a short request does not have to wait for the end of a long stream.
    """

    def __init__(self, engine: Engine, max_rows: int = 16, threads: int = 2) -> None:
        self._engine = engine
        self._max_rows = max_rows
        self._waiting: queue.SimpleQueue[tuple[Request, Done] | None] = queue.SimpleQueue()
        self._failures = 0
        self._threads = [threading.Thread(target=self._work, name=f"batcher-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the threads live and the engine does not fail again and again."""
        return self._failures < FAILURES_UNTIL_UNHEALTHY and all(thread.is_alive() for thread in self._threads)

    def submit(self, request: Request, done: Done) -> None:
        """Queue `request`; `done` gets its completion, or the error, from one of the batcher's threads."""
        self._waiting.put((request, done))

    def close(self) -> None:
        """End the threads once what they run is done."""
        for _ in self._threads:
            self._waiting.put(None)

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            live = []
            for request, done in batch:
                if request.cancel.is_set():  # left while it waited
                    done(Completion("", "cancelled", 0, 0))
                else:
                    live.append((request, done))
            if live:
                self._run(live)

    def _take(self) -> list[tuple[Request, Done]] | None:
        item = self._waiting.get()
        if item is None:
            return None
        batch = [item]
        while len(batch) < self._max_rows:
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._waiting.put(None)  # for the next look
                break
            batch.append(item)
        return batch

    def _run(self, batch: list[tuple[Request, Done]]) -> None:
        spans = [tracing.begin("engine", request.trace_parent, luthier__batch=len(batch)) for request, _ in batch]
        try:
            completions = self._engine.run([request for request, _ in batch])
        except BaseException as error:
            for span in spans:
                tracing.failed(span, type(error).__name__)
            if not isinstance(error, LuthierError):
                self._failures += 1
                logger.exception("the engine failed on a batch of %d", len(batch))
            for _, done in batch:
                done(error)
            return
        finally:
            for span in spans:
                span.end()
        self._failures = 0
        for (_, done), completion in zip(batch, completions, strict=True):
            done(completion)
