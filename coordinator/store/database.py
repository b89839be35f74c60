"""Transactions on SQLite and PostgreSQL. Domain code is plain functions of a session; this file decides where they run.

A transaction never waits for anything but the database: no Ray, no network, no file of another system inside one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from opentelemetry.trace import SpanKind
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

from common import tracing
from coordinator.store.engines import READERS, for_reading, make_engine
from coordinator.store.faults import is_disconnect, is_fault, unreadable
from coordinator.store.writer import Entry, Writer

T = TypeVar("T")
Item = TypeVar("Item")


class Store:
    """Runs functions of a session in transactions, off the event loop.

    `write` commits when the function returns and rolls back when it raises; what it returned is given to the caller only after
    the commit. Writes run one at a time, in order of arrival; those that wait at the same time share a commit (`writer.py`). A
    function may be run more than once, where nothing of its first run is recorded, so it does nothing but work with its session.
    """

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self.kind = self.engine.url.get_backend_name()
        self._read_engine = for_reading(self.engine)
        self._writer = Writer(self.engine)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")

    def write_now(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a writing transaction and wait for it."""
        entry = Entry(work)
        self._writer.submit(entry)
        return cast("T", entry.future.result())

    def read_now(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a reading transaction in this thread. A connection that was lost is replaced once."""
        for last in (False, True):
            try:
                with Session(self._read_engine, expire_on_commit=False) as session:
                    return work(session)
            except SQLAlchemyError as error:
                if not is_fault(error):
                    raise
                if last or not is_disconnect(error):
                    raise unreadable(error) from error
        raise AssertionError("unreachable")

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a writing transaction; when this returns, it is durable."""
        return cast("T", await self._recorded(Entry(work, asyncio.get_running_loop())))

    async def write_together(self, batch: Callable[[Session, list[Item]], Sequence[T | Exception]], item: Item) -> T:
        """Record `item`, by one call of `batch` for it and for those that wait beside it; when this returns, it is durable.

        `batch` gives each item its result, or the exception that its caller gets. Where it raises, it is called for each alone.
        """
        return cast("T", await self._recorded(Entry.of_item(batch, item, asyncio.get_running_loop())))

    async def _recorded(self, entry: Entry) -> Any:
        """What the writer makes of an entry; with a span that says how long it waited for its turn, where somebody traces."""
        if not tracing.recording():
            self._writer.submit(entry)
            return await cast("asyncio.Future[Any]", entry.future)
        with tracing.span("store.write", kind=SpanKind.CLIENT) as span:
            asked = time.monotonic()
            self._writer.submit(entry)
            try:
                return await cast("asyncio.Future[Any]", entry.future)
            finally:
                span.set_attribute("luthier.store.wait_seconds", max(entry.begun - asked, 0.0))
                span.set_attribute("luthier.store.record_seconds", time.monotonic() - max(entry.begun, asked))
                span.set_attribute("luthier.store.together", entry.together)

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a reading transaction."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self.read_now, work)

    def close(self) -> None:
        """Wait for what is running and close every connection."""
        self._writer.close()
        self._readers.shutdown(wait=True)
        self.engine.dispose()
