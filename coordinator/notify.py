"""Wakes those who wait for a change. A hint only: everyone who waits also looks by himself now and then."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

ANYTHING = "anything"
"""Topic of those who want to know of every notification."""


class Notifier:
    """Wakes waiters by topic (a job's uid, `scheduler`, `endpoints`). Belongs to one event loop.

    `count` counts the notifications, for those who want to know whether there was one since they looked.
    """

    def __init__(self) -> None:
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._listeners: defaultdict[str, list[Callable[[], None]]] = defaultdict(list)
        self.closing = asyncio.Event()
        self.count = 0

    def notify(self, *topics: str) -> None:
        """Tell those who listen to the topics, then wake everyone who waits for one of them."""
        self.count += 1
        for topic in (*topics, ANYTHING):
            for listener in self._listeners.get(topic, ()):
                listener()
            for waiter in self._waiters.get(topic, ()):
                waiter.set()

    def on(self, topic: str, listener: Callable[[], None]) -> None:
        """Call `listener` at once, before `notify` returns, whenever the topic is notified."""
        self._listeners[topic].append(listener)

    async def wait(self, topic: str, timeout: float) -> None:
        """Return when the topic is notified, the server closes, or `timeout` seconds have passed."""
        waiter = asyncio.Event()
        self._waiters[topic].add(waiter)
        try:
            if not self.closing.is_set():
                async with asyncio.timeout(timeout):
                    await waiter.wait()
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
