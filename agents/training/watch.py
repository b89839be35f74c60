"""Finds out that this rank stands still: tells where it and its threads are, and in the end leaves; the run is tried again then.

A rank that is stuck, in a data loader or in a collective that one of them never entered, takes all others with it, because they
wait for it. So every rank watches itself, by its own clock and from a thread of its own, and needs nobody for that: not the other
ranks, not Ray, not the coordinator. Each tells how often it has moved, by which the coordinator names the one that is behind
(coordinator/jobs/hang.py). A rank whose very interpreter stands still tells nothing; Ray Train's health check finds that one.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from agents.link import Link
from luthier.agent.v1 import agent_pb2

logger = logging.getLogger(__name__)

LEAST_SECONDS = 300.0
STEPS = 20.0
REMEMBERED = 51
LONG_SECONDS = 3600.0
BYTES_A_SECOND = 10e6
FLUSH_SECONDS = 10.0
EXIT_STATUS = 76
TRACEBACK_LIMIT = 6000
THREAD_LIMIT = 6000


@dataclass(frozen=True)
class Standing:
    """Where a rank stands: how often it has moved, steps done, what it is at, since how many seconds, and how many it may."""

    moves: int
    step: int
    doing: str
    seconds: float
    limit: float


class Watch:
    """What a rank is at, and for how long it may be. Nothing is judged before the first `at`, nor after `rest`.

    `hang_seconds` is what the job allows within a step; 0 stands for 20 times the median step, and 5 minutes at least. What comes
    before the first step is done, and whatever is called long, may take an hour, and more where bytes have to be moved. Safe to
    use from several threads.
    """

    def __init__(self, hang_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._given = hang_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._moves = self._step = 0
        self._doing = ""
        self._since = self._step_since = clock()
        self._long: float | None = None

    def at(self, step: int, doing: str) -> None:
        """The rank moved: it is within a step now, `step` of them being done, and does this."""
        self._move(step, doing, None)

    def at_length(self, step: int, doing: str, size_bytes: float = 0.0) -> None:
        """The rank moved, and what it does now takes long: loading, compiling, scoring, or moving so many bytes."""
        self._move(step, doing, max(LONG_SECONDS, self._given, size_bytes / BYTES_A_SECOND))

    def stepped(self, step: int, doing: str) -> None:
        """A step is done, `step` of them in all; its time counts for the median unless something long was in between."""
        with self._lock:
            now = self._clock()
            self._durations.append(now - self._step_since)
        self._move(step, doing, None)

    def rest(self) -> None:
        """Judge nothing until the rank is at something again."""
        with self._lock:
            self._doing = ""
            self._moves += 1

    def standing(self) -> Standing | None:
        """Where the rank stands now; None while nothing is judged."""
        with self._lock:
            if not self._doing:
                return None
            return Standing(self._moves, self._step, self._doing, self._clock() - self._since, self._limit())

    def _move(self, step: int, doing: str, long: float | None) -> None:
        with self._lock:
            self._since = self._clock()
            if self._long is not None or not self._doing or step != self._step:
                self._step_since = self._since
            self._moves += 1
            self._step, self._doing, self._long = step, doing, long

    def _limit(self) -> float:
        if self._long is not None:
            return self._long
        if not self._durations:
            # The first step pays for compiling and warming up.
            return max(LONG_SECONDS, self._given)
        return self._given or max(LEAST_SECONDS, STEPS * statistics.median(self._durations))


class Guard:
    """Looks at a rank's watch and tells its link; a thread calls `look` now and then."""

    def __init__(self, watch: Watch, link: Link, leave: Callable[[], None]) -> None:
        self._watch = watch
        self._link = link
        self._leave = leave
        self._told: int | None = None
        self._left = False

    def look(self) -> float:
        """Look once: tell of a rank that stands for half of what it may, and leave after the whole. Seconds to the next look."""
        standing = self._watch.standing()
        if self._told is not None and (standing is None or standing.moves != self._told):
            self._told = None
            self._link.standing(agent_pb2.StandingReport())
            logger.warning("moves again")
        if standing is None:
            return 1.0
        if standing.seconds >= standing.limit and not self._left:
            self._left = True
            self._tell(standing, gives_up=True)
            logger.error("gives up: has stood for %.0f s, where it %s", standing.seconds, standing.doing)
            self._link.flush(FLUSH_SECONDS)
            self._leave()
        elif standing.seconds >= standing.limit / 2 and self._told != standing.moves:
            self._told = standing.moves
            self._tell(standing)
            text = "has stood for %.0f s after step %d, where it %s, and is given up after %.0f s"
            logger.warning(text, standing.seconds, standing.step, standing.doing, standing.limit)
            for name, stack in stacks():
                logger.warning("thread %s:\n%s", name, stack)
        return min(1.0, standing.limit / 10)

    def _tell(self, standing: Standing, gives_up: bool = False) -> None:
        self._link.standing(
            agent_pb2.StandingReport(
                moves=standing.moves,
                step=standing.step,
                doing=standing.doing,
                seconds=standing.seconds,
                gives_up=gives_up,
                traceback=next((stack for name, stack in stacks() if name == threading.main_thread().name), ""),
            )
        )


def watched(link: Link, hang_seconds: float, leave: Callable[[], None] | None = None) -> tuple[Watch, Callable[[], None]]:
    """A watch over this process that ends it where it stands still, and what stops the watching."""
    watch, done = Watch(hang_seconds), threading.Event()
    guard = Guard(watch, link, leave or (lambda: os._exit(EXIT_STATUS)))

    def run() -> None:
        pause = 1.0
        while not done.wait(pause):
            pause = guard.look()

    threading.Thread(target=run, name="luthier-watch", daemon=True).start()
    return watch, done.set


def stacks() -> list[tuple[str, str]]:
    """What each thread of this process is at, by name, innermost call last and shortened at the front; the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    found = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if ident == main or ident != threading.get_ident():  # what looks need not be seen
            found.append((names.get(ident, str(ident)), "".join(traceback.format_stack(frame))[-THREAD_LIMIT:]))
    return found
