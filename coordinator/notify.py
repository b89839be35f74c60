"""Wakes those who wait for a change. A hint only: everyone who waits also looks by himself now and then."""

from __future__ import annotations

import asyncio
from collections import defaultdict


class Notifier:
    """Wakes waiters by topic (a job's uid, `scheduler`, `endpoints`). Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.closing = asyncio.Event()

    def notify(self, *topics: str) -> None:
        """Wake everyone who waits for one of the topics."""
        for topic in topics:
            for waiter in self._waiters.get(topic, ()):
                waiter.set()

    async def wait(self, topic: str, timeout: float) -> None:
        """Return when the topic is notified, the server closes, or `timeout` seconds have passed."""
        waiter = asyncio.Event()
        self._waiters[topic].add(waiter)
        try:
            if not self.closing.is_set():
                await asyncio.wait_for(waiter.wait(), timeout)
        except TimeoutError:
            pass
        finally:
            self._waiters[topic].discard(waiter)
            if not self._waiters[topic]:
                del self._waiters[topic]

    def close(self) -> None:
        """Wake everyone for good; watches end by this."""
        self.closing.set()
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.set()
