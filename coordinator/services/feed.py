"""The events of a project's jobs for everyone who watches it: read from the store once, however many watch.

The latest events are kept in memory as the messages that are sent. A watcher who is up to date is served from there. One who is
far behind reads the store by himself, at his own pace, and holds up nobody. What is kept is bounded, and forgotten with the last
watcher.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from sqlmodel import Session, col, select

from common.errors import Unavailable
from coordinator import messages
from coordinator.notify import ANYTHING, Notifier
from coordinator.store.database import Store
from coordinator.store.tables import Job, JobEvent, Project
from luthier.v1 import job_pb2

log = logging.getLogger(__name__)

KEPT = 2048
"""Events of a project that are kept in memory while somebody watches it."""

BATCH = 500
"""Events read at a time."""

LOOK_SECONDS = 1.0
"""How often a feed looks by itself, should no hint come."""

REST_SECONDS = 0.02
"""Pause between two reads of a feed: what is recorded meanwhile is read, and its watchers woken, together."""


class ProjectFeed:
    """The end of one project's events. `last` is the number of the latest that is known here."""

    def __init__(self, store: Store, notifier: Notifier, project: str, last: int) -> None:
        self._store = store
        self._notifier = notifier
        self._project = project
        self._kept: deque[job_pb2.WatchJobsResponse] = deque(maxlen=KEPT)
        self._news = asyncio.Event()
        self.watchers = 0
        self.last = last

    async def after(self, sequence: int) -> Sequence[job_pb2.WatchJobsResponse]:
        """Events after a number, in order, as many as are at hand; none where nothing newer is known."""
        if sequence >= self.last:
            return []
        first = self._kept[0].sequence if self._kept else self.last + 1
        if sequence + 1 < first:
            return await self._store.read(partial(_events_after, project=self._project, sequence=sequence))
        # Numbers have no gaps, so that an event's place follows from its number.
        begin = sequence + 1 - first
        return [self._kept[place] for place in range(begin, min(len(self._kept), begin + BATCH))]

    async def news(self, seconds: float) -> bool:
        """Wait until there are newer events; False where there are none within the time."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def pump(self) -> None:
        """Read what is new for all who watch, until nobody does."""
        while self.watchers and not self._notifier.closing.is_set():
            heard = self._notifier.count
            try:
                news = await self._store.read(partial(_events_after, project=self._project, sequence=self.last))
            except Exception as error:  # whoever watches waits for this loop: it goes on whatever happens
                log.warning(
                    "the events of project %s cannot be read: %s",
                    self._project,
                    error,
                    exc_info=not isinstance(error, Unavailable),
                )
                news = []
                await asyncio.sleep(LOOK_SECONDS)
            if news:
                self._kept.extend(news)
                self.last = news[-1].sequence
                woken, self._news = self._news, asyncio.Event()
                woken.set()
            await asyncio.sleep(REST_SECONDS)
            if len(news) < BATCH and self._notifier.count == heard:
                # Without a hint, too: another coordinator may have recorded something.
                await self._notifier.wait(ANYTHING, LOOK_SECONDS)


class ProjectFeeds:
    """The feeds of the projects that somebody watches."""

    def __init__(self, store: Store, notifier: Notifier) -> None:
        self._store = store
        self._notifier = notifier
        self._feeds: dict[str, ProjectFeed] = {}
        self._pumps: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def of(self, project: str) -> AsyncIterator[ProjectFeed]:
        """The project's feed for one who watches it. It knows every event that was recorded before."""
        last = await self._store.read(lambda session: session.get_one(Project, project).event_sequence)
        feed = self._feeds.get(project)
        if feed is None:
            feed = self._feeds[project] = ProjectFeed(self._store, self._notifier, project, last)
        feed.watchers += 1
        if feed.watchers == 1:
            pump = asyncio.create_task(feed.pump())
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)
        try:
            while feed.last < last and not self._notifier.closing.is_set():
                await feed.news(LOOK_SECONDS)
            yield feed
        finally:
            feed.watchers -= 1
            if not feed.watchers:
                self._feeds.pop(project, None)


def _events_after(session: Session, project: str, sequence: int) -> list[job_pb2.WatchJobsResponse]:
    query = (
        select(JobEvent, Job.job_id)
        .join(Job, col(Job.uid) == col(JobEvent.job_uid))
        .where(JobEvent.project_id == project, JobEvent.project_sequence > sequence)
        .order_by(col(JobEvent.project_sequence))
        .limit(BATCH)
    )
    return [
        job_pb2.WatchJobsResponse(
            event=messages.job_event(event), job=f"projects/{project}/jobs/{job_id}", sequence=event.project_sequence
        )
        for event, job_id in session.exec(query).all()
    ]
