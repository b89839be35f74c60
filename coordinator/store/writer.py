"""Group commit: one thread runs what waits to be written in one transaction, commits once, and only then answers.

A commit costs one synchronisation of the disk however much it holds, so that writers who come while one runs share the next.
Each function after the first runs behind a savepoint of its own: one that raises takes back its own changes and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlmodel import Session

from common.errors import Unavailable
from coordinator import metrics
from coordinator.store.engines import TRANSACTION_ID, for_writing
from coordinator.store.faults import is_disconnect, is_fault, unavailable, uncertain

log = logging.getLogger(__name__)

GROUP = 64
"""Functions that share a commit, at most."""

CROWD = 4
"""More than so many in a group, and there are more to come."""

LINGER_SECONDS = 0.002
"""Where writers came together just now, the next one waits so long for others to join him."""

GROUP_SECONDS = 0.05
"""After so long no further function joins a group: the first of it waits for the last."""

MAX_WAITING = 10_000
"""Functions that may wait; more are refused rather than kept waiting for ever."""

ASK_SECONDS = 5.0
"""How long PostgreSQL is asked whether a commit that broke off took place."""


Batch = Callable[[Session, list[Any]], Sequence[Any]]
"""Does for many items what they would each have done alone, in fewer statements; gives each its result or its exception."""


class Entry:
    """A function that waits, and whom to tell what became of it."""

    def __init__(self, work: Callable[[Session], Any], loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.work = work
        self.batch: Batch | None = None
        self.item: Any = None
        self.loop = loop
        self.future: asyncio.Future[Any] | Future[Any] = loop.create_future() if loop else Future()
        self.result: Any = None
        self.error: BaseException | None = None
        # When its group began, by the monotonic clock, and how many were in it.
        self.begun = 0.0
        self.together = 0

    @classmethod
    def of_item(cls, batch: Batch, item: Any, loop: asyncio.AbstractEventLoop | None = None) -> Entry:
        """An item that is recorded together with its neighbours where they go by the same function."""

        def alone(session: Session) -> Any:
            (outcome,) = batch(session, [item])
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        entry = cls(alone, loop)
        entry.batch, entry.item = batch, item
        return entry

    def settle(self) -> None:
        """Tell the caller, unless he has gone."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Writer:
    """Takes functions in order of arrival and records them, in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._write_engine = for_writing(engine)
        self._waiting: SimpleQueue[Entry | None] = SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="store-write", daemon=True)
        self._thread.start()

    def submit(self, entry: Entry) -> None:
        """Queue a function. Raises Unavailable where too many wait already."""
        if self._closed.is_set():
            raise RuntimeError("this store is closed")
        if self._waiting.qsize() >= MAX_WAITING:
            raise Unavailable("too many changes wait to be recorded; nothing was recorded, try again", "STORE_BUSY")
        self._waiting.put(entry)

    def close(self) -> None:
        """Record what waits, then end."""
        if not self._closed.is_set():
            self._closed.set()
            self._waiting.put(None)
        self._thread.join()

    def _serve(self) -> None:
        crowded = False
        while (first := self._waiting.get()) is not None:
            if crowded and self._waiting.qsize() < GROUP // 2:
                time.sleep(LINGER_SECONDS)
            group = [first]
            started = time.monotonic()
            try:
                self._record(group)
            except BaseException as error:  # whatever happens, nobody may wait for ever, and the thread goes on
                log.exception("recording a group failed")
                for entry in group:
                    entry.error = entry.error or error
            metrics.COMMIT.observe(time.monotonic() - started)
            metrics.FAILED.inc(sum(isinstance(entry.error, Unavailable) for entry in group))
            metrics.GROUP.observe(len(group))
            for entry in group:
                entry.begun, entry.together = started, len(group)
            _answer(group)
            crowded = len(group) > CROWD

    def _record(self, group: list[Entry]) -> None:
        """Run the group and what joins it meanwhile; afterwards each of it has its result or its error."""
        try:
            self._transaction(group, joinable=True)
            return
        except SQLAlchemyError as error:
            if not is_fault(error):
                raise
            if len(group) == 1 and not is_disconnect(error):
                group[0].error = unavailable(error)
                return
        # Nothing of it is recorded. Once more, each by itself on a connection that works, so that only he fails who is to blame.
        for number, entry in enumerate(group):
            try:
                self._transaction([entry], joinable=False)
            except _Closed as closed:
                _fail(group[number:], closed.cause)
                return
            except SQLAlchemyError as error:
                if not is_fault(error):
                    raise
                entry.error = unavailable(error)

    def _transaction(self, group: list[Entry], joinable: bool) -> None:
        """Raises the database's fault where nothing of the group is recorded."""
        try:
            connection = self._open()
        except _Closed as closed:
            if not joinable:
                raise
            # Whoever waits has waited for this very connection or lock: he need not wait for it again.
            while (entry := self._next()) is not None:
                group.append(entry)
            _fail(group, closed.cause)
            return
        with connection:
            deadline = time.monotonic() + GROUP_SECONDS
            number, recorded = 0, False
            try:
                while number < len(group) or (joinable and self._join(group, deadline)):
                    end = number + 1
                    while group[number].batch and (end < len(group) or (joinable and self._join(group, deadline))):
                        if group[end].batch is not group[number].batch:
                            break
                        end += 1
                    recorded |= _run_together(connection, group[number:end], savepoint=recorded)
                    number = end
                self._commit(connection, group)
            except SQLAlchemyError:
                connection.invalidate()  # in whatever state it is: the next one gets another
                raise

    def _open(self) -> Connection:
        """A connection whose turn it is to write. One that was lost while it lay in the pool is replaced."""
        for last in (False, True):
            connection = None
            try:
                connection = self._write_engine.connect()
                connection.begin()
                return connection
            except SQLAlchemyError as error:
                if connection is not None:
                    connection.close()
                if not is_fault(error):
                    raise
                if last or not is_disconnect(error):
                    raise _Closed(error) from error
        raise AssertionError("unreachable")

    def _commit(self, connection: Connection, group: list[Entry]) -> None:
        transaction_id = connection.info.get(TRANSACTION_ID)
        try:
            connection.commit()
        except SQLAlchemyError as error:
            if not is_fault(error):
                raise
            connection.invalidate()
            took_place = self._took_place(transaction_id, error)
            if took_place:
                return
            if took_place is False:
                raise
            log.error("a commit of %d changes broke off and nobody knows how it ended: %s", len(group), error)
            for entry in group:
                entry.error = entry.error or uncertain(error)

    def _took_place(self, transaction_id: str | None, error: SQLAlchemyError) -> bool | None:
        """Whether a commit that broke off took place; None where nobody can tell."""
        if transaction_id is None:
            # SQLite writes the commit last, so that without room for it there is none.
            return False if "full" in str(error) else None
        deadline = time.monotonic() + ASK_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(SQLAlchemyError), self._engine.connect() as connection:
                status = connection.execute(text("SELECT pg_xact_status(CAST(:id AS xid8))"), {"id": transaction_id}).scalar()
                if status in ("committed", "aborted"):
                    return bool(status == "committed")
            time.sleep(0.1)
        return None

    def _join(self, group: list[Entry], deadline: float) -> bool:
        """Take one more that waits into the group, if there is room and time."""
        if len(group) >= GROUP or time.monotonic() > deadline:
            return False
        entry = self._next()
        if entry is None:
            return False
        group.append(entry)
        return True

    def _next(self) -> Entry | None:
        try:
            entry = self._waiting.get_nowait()
        except Empty:
            return None
        if entry is None:
            self._waiting.put(None)  # the word to end is for the thread's own loop
        return entry


class _Closed(Exception):
    """No connection is to be had, or it was never this process's turn."""

    def __init__(self, cause: SQLAlchemyError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _run_together(connection: Connection, entries: list[Entry], savepoint: bool) -> bool:
    """Run neighbours by their common function, or one by one where that fails; as `_run` otherwise."""
    entries = [entry for entry in entries if not entry.future.cancelled()]
    batch = entries[0].batch if entries else None
    if batch is None or len(entries) == 1:
        return bool(entries) and _run(connection, entries[0], savepoint)
    try:
        with _session(connection, savepoint) as session:
            outcomes = batch(session, [entry.item for entry in entries])
            session.flush()
        _keep(connection, savepoint)
    except Exception as error:
        if is_fault(error):
            raise
        _take_back(connection, savepoint)
        recorded = False
        for entry in entries:
            recorded |= _run(connection, entry, savepoint or recorded)
        return recorded
    for entry, outcome in zip(entries, outcomes, strict=True):
        entry.error = outcome if isinstance(outcome, Exception) else None
        entry.result = outcome
    return True


def _run(connection: Connection, entry: Entry, savepoint: bool) -> bool:
    """Run one function. True if what it did is to be committed; raises a fault of the database, which concerns the whole group.

    A function that loses a race for a unique value (no other coordinator can be that fast, but the constraint has the last word)
    runs once more and then finds what was faster.
    """
    entry.error = None
    for last in (False, True):
        try:
            with _session(connection, savepoint) as session:
                entry.result = entry.work(session)
                session.flush()
            _keep(connection, savepoint)
            return True
        except Exception as error:
            if is_fault(error):
                raise
            _take_back(connection, savepoint)
            if last or not isinstance(error, IntegrityError):
                entry.error = error
                return False
    raise AssertionError("unreachable")


def _session(connection: Connection, savepoint: bool) -> Session:
    """A session of its own for each function: what one loads, changes or expires is nobody else's."""
    if savepoint:
        connection.begin_nested()
    elif not connection.in_transaction():
        connection.begin()
    return Session(connection, expire_on_commit=False, join_transaction_mode="rollback_only")


def _keep(connection: Connection, savepoint: bool) -> None:
    transaction = connection.get_nested_transaction() if savepoint else None
    if transaction is not None:
        transaction.commit()


def _take_back(connection: Connection, savepoint: bool) -> None:
    # A failed flush has rolled back already.
    transaction = connection.get_nested_transaction() if savepoint else connection.get_transaction()
    if transaction is not None:
        transaction.rollback()


def _fail(group: Iterable[Entry], error: SQLAlchemyError) -> None:
    for entry in group:
        entry.error = unavailable(error)


def _answer(group: list[Entry]) -> None:
    """Tell everybody. Callers in an event loop are told together, because waking a loop costs more than telling."""
    loops: defaultdict[asyncio.AbstractEventLoop, list[Entry]] = defaultdict(list)
    for entry in group:
        if entry.loop is None:
            entry.settle()
        else:
            loops[entry.loop].append(entry)
    for loop, entries in loops.items():
        with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody left to tell
            loop.call_soon_threadsafe(_settle, entries)


def _settle(entries: list[Entry]) -> None:
    for entry in entries:
        entry.settle()
