"""Transactions on SQLite and PostgreSQL. Domain code is plain functions of a session; this file decides where they run.

A transaction never waits for anything but the database: no Ray, no network, no file of another system inside one.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlmodel import Session

from common.errors import Unavailable

T = TypeVar("T")

READERS = 4
"""Threads that read at the same time."""


def make_engine(url: str) -> Engine:
    """Open the database at a SQLAlchemy URL (`sqlite:///path`, `postgresql+psycopg://…`).

    SQLite runs in WAL mode with full synchronisation, so that a commit that was answered survives a power cut, and opens writing
    transactions with BEGIN IMMEDIATE: with the default, two writers that have both read lose one of their changes.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True, pool_size=READERS + 2, max_overflow=4)
    engine = create_engine(parsed, connect_args={"timeout": 10, "check_same_thread": False}, pool_size=READERS + 2)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("luthier_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


class Store:
    """Runs functions of a session in transactions, off the event loop.

    `write` commits when the function returns and rolls back when it raises; what it returned is given to the caller only after
    the commit. Writes run one at a time, in order of arrival: on SQLite there is one writer anyway.
    """

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self.kind = self.engine.url.get_backend_name()
        self._write_engine = self.engine.execution_options(luthier_write=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")

    def write_now(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a writing transaction in this thread."""
        try:
            with Session(self._write_engine, expire_on_commit=False) as session, session.begin():
                result = work(session)
                session.flush()
            return result
        except OperationalError as error:
            raise _unavailable(error) from error

    def read_now(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a reading transaction in this thread."""
        try:
            with Session(self.engine, expire_on_commit=False) as session:
                return work(session)
        except OperationalError as error:
            raise _unavailable(error) from error

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a writing transaction; when this returns, it is durable."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, self.write_now, work)

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a reading transaction."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self.read_now, work)

    def close(self) -> None:
        """Wait for what is running and close every connection."""
        self._writer.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self.engine.dispose()


def _unavailable(error: DBAPIError) -> Unavailable:
    """Say in plain words that the records cannot be reached or written, without the statement and its values."""
    return Unavailable(f"the store does not take this now ({error.orig}); nothing was recorded, try again", "STORE_UNAVAILABLE")
