"""The thread that works on a replica's running batch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from common import tracing
from common.errors import LuthierError
from serving.engines.base import Completion, Done, Engine, Request

logger = logging.getLogger(__name__)

FAILURES_UNTIL_UNHEALTHY = 3


class Batcher:
    """Lets requests join the engine's running batch as they come, and works on it while there is anything to do."""

    def __init__(self, engine: Engine) -> None:
        self._lanes = engine.lanes()
        self._arriving: queue.SimpleQueue[tuple[Request, Done] | Callable[[], None] | None] = queue.SimpleQueue()
        self._failures = 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread lives and the engine does not fail again and again."""
        return self._failures < FAILURES_UNTIL_UNHEALTHY and self._thread.is_alive()

    def submit(self, request: Request, done: Done) -> None:
        """Let `request` join; `done` gets its completion, or the error, from the batcher's thread."""
        self._arriving.put((request, done))

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter is ready for use; it may be let go at any time."""
        return self._lanes.has_adapter(name)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Read an adapter and make it ready for use; blocks. Raises what `Lanes.add_adapter` and what it returns raise."""
        make_ready = self._lanes.add_adapter(name, folder)
        added: Future[None] = Future()

        def add() -> None:
            try:
                added.set_result(make_ready())
            except BaseException as error:
                added.set_exception(error)

        self._arriving.put(add)
        added.result()

    def close(self) -> None:
        """End the thread once what it has is done."""
        self._arriving.put(None)

    def _work(self) -> None:
        while True:
            self._take(wait=not self._lanes.busy and not self._closing)
            if self._lanes.busy:
                self._step()
            elif self._closing:
                return

    def _take(self, wait: bool) -> None:
        while True:
            try:
                item = self._arriving.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if item is None:
                self._closing = True
            elif callable(item):
                item()
            else:
                request, done = item
                self._lanes.join(request, self._traced(request, done))

    def _step(self) -> None:
        try:
            self._lanes.step()
        except BaseException as error:  # every request has been told
            if not isinstance(error, LuthierError):
                self._failures += 1
                logger.exception("the engine failed")

    def _traced(self, request: Request, done: Done) -> Done:
        span = tracing.begin("engine", request.trace_parent)

        def end(result: Completion | BaseException) -> None:
            if isinstance(result, BaseException):
                tracing.failed(span, result.reason if isinstance(result, LuthierError) else type(result).__name__)
            else:
                self._failures = 0
            span.end()
            done(result)

        return end
