"""The events of a project's jobs for everyone who watches it: read from the store once, however many watch.

The latest events are kept in memory as the messages that are sent. A watcher who is up to date is served from there. One who is
far behind reads the store by himself, at his own pace, and holds up nobody. What is kept is bounded, and forgotten with the last
watcher.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

from sqlmodel import Session, col, select

from common.errors import Unavailable
from coordinator import messages
from coordinator.compaction import holes
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


@dataclass(frozen=True)
class Look:
    """Events after some number, in order: all that there are up to `seen`.

    Numbers up to `holes` may be missing, because their job was deleted or their time was over; up to `compacted` for the latter.
    """

    events: Sequence[job_pb2.WatchJobsResponse]
    seen: int
    holes: int
    compacted: int


class ProjectFeed:
    """The end of one project's events. `last` is the number of the latest that is known here."""

    def __init__(self, store: Store, notifier: Notifier, project: str, last: int) -> None:
        self._store = store
        self._notifier = notifier
        self._project = project
        self._kept: deque[job_pb2.WatchJobsResponse] = deque(maxlen=KEPT)
        self._kept_after = last
        self._holes = Look((), 0, 0, 0)
        self._news = asyncio.Event()
        self.watchers = 0
        self.last = last

    async def after(self, sequence: int) -> Look:
        """Events after a number, as many as are at hand; none where nothing newer is known."""
        if sequence < self._kept_after:
            return await self._store.read(partial(look, project=self._project, sequence=sequence))
        begin = bisect_right(self._kept, sequence, key=lambda kept: kept.sequence)
        events = list(islice(self._kept, begin, begin + BATCH))
        seen = events[-1].sequence if begin + BATCH < len(self._kept) else max(sequence, self.last)
        return replace(self._holes, events=events, seen=seen)

    async def news(self, seconds: float) -> bool:
        """Wait until there are newer events; False where there are none within the time."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def pump(self) -> None:
        """Read what is new for all who watch, until nobody does."""
        while self.watchers and not self._notifier.closing.is_set():
            heard = self._notifier.count
            try:
                found = await self._store.read(partial(look, project=self._project, sequence=self.last))
            except Exception as error:  # whoever watches waits for this loop: it goes on whatever happens
                log.warning(
                    "the events of project %s cannot be read: %s",
                    self._project,
                    error,
                    exc_info=not isinstance(error, Unavailable),
                )
                found = replace(self._holes, events=(), seen=self.last)
                await asyncio.sleep(LOOK_SECONDS)
            if found.seen > self.last:
                self._keep(found)
                woken, self._news = self._news, asyncio.Event()
                woken.set()
            await asyncio.sleep(REST_SECONDS)
            if len(found.events) < BATCH and self._notifier.count == heard:
                # Without a hint, too: another coordinator may have recorded something.
                await self._notifier.wait(ANYTHING, LOOK_SECONDS)

    def _keep(self, found: Look) -> None:
        too_many = len(self._kept) + len(found.events) - KEPT
        if too_many > 0:
            self._kept_after = next(islice(chain(self._kept, found.events), too_many - 1, None)).sequence
        self._kept.extend(found.events)
        self._holes, self.last = replace(found, events=()), found.seen


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


def look(session: Session, project: str, sequence: int) -> Look:
    """Events of a project after a number, as the store has them, and what the project's row says of those that are gone."""
    query = (
        select(JobEvent, Job.job_id)
        .join(Job, col(Job.uid) == col(JobEvent.job_uid))
        .where(JobEvent.project_id == project, JobEvent.project_sequence > sequence)
        .order_by(col(JobEvent.project_sequence))
        .limit(BATCH)
    )
    events = [
        job_pb2.WatchJobsResponse(
            event=messages.job_event(event), job=f"projects/{project}/jobs/{job_id}", sequence=event.project_sequence
        )
        for event, job_id in session.exec(query).all()
    ]
    row = session.get_one(Project, project)
    # One state of the records throughout: after the last event there is nothing up to the project's own number.
    seen = events[-1].sequence if len(events) == BATCH else max(sequence, row.event_sequence)
    return Look(events, seen, holes(row), row.events_compacted)
