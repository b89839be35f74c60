"""Which of several coordinators on one store leads: decides, drives Ray, ends runs. All of them serve the API.

A lock says quickly who leads: an advisory lock on PostgreSQL, which the server lets go of when its holder's connection ends, or
a lock on a file beside SQLite's, which the kernel lets go of when its holder's process ends. A number says it safely: every new
leader counts the epoch up, and a leader's changes are made only while the epoch is still its own. Writing transactions run one
at a time (`engines.py`), so that reading the epoch first in one is as good as naming it in each of its UPDATEs. A leader that was
frozen and wakes up finds another epoch, and changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, select

from common.errors import Unavailable
from coordinator.store.database import Store
from coordinator.store.tables import Leader, now

log = logging.getLogger(__name__)

T = TypeVar("T")

LEADER_LOCK = 0x4C756C64
"""Number of the advisory lock that the leader holds for as long as it lives."""

BEAT_SECONDS = 1.0
"""How often a leader says that it lives, and a follower asks for the lock."""

SILENCE_SECONDS = 6.0
"""How long a leader that holds the lock may be silent before a follower, by its own clock, has its connection ended."""


class NotLeading(Unavailable):
    """What only the leader may do was tried by a coordinator that leads no longer, or not yet. Nothing was changed."""


class Lock(Protocol):
    """Held by one process at a time, and let go of when that process dies."""

    def take(self) -> bool:
        """Try to get it, without waiting."""

    def beat(self, epoch: int) -> bool:
        """Say that the holder lives; False where it is not held any more."""

    def oust(self) -> None:
        """End the holder's hold, where the lock can do that."""

    def release(self) -> None:
        """Let go, if it is held."""


class Leadership:
    """This coordinator's part in who leads. `epoch` is the number it leads by, 0 while it follows.

    `run` has a thread of its own, so that a leader whose event loop or writer is busy still says that it lives.
    """

    def __init__(self, store: Store, holder: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._holder = holder
        self._clock = clock
        self._lock: Lock = _FileLock(store.engine) if store.kind == "sqlite" else _AdvisoryLock(store.engine)
        self._seen: tuple[int, int] | None = None
        self._seen_at = 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.epoch = 0

    def run(self, changed: Callable[[], object] = lambda: None) -> None:
        """Stand for leader until `stop`. Calls `changed`, in a thread of its own, on beginning or ceasing to lead."""
        self._thread = threading.Thread(target=self._serve, args=(changed,), name="leader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lead no longer, and stand no more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self.resign()

    def _serve(self, changed: Callable[[], object]) -> None:
        while not self._stopped.is_set():
            before = self.epoch
            try:
                self.look()
            except Exception:  # whatever it was, this thread goes on: without it nobody would lead
                log.exception("standing for leader failed")
                self.resign()
            if self.epoch != before:
                if self.epoch:
                    log.info("leads, epoch %d", self.epoch)
                else:
                    log.warning("leads no longer")
                changed()
            self._stopped.wait(BEAT_SECONDS)

    def look(self) -> None:
        """Lead if nobody does, and say that we live where we do. Blocks; never raises for a database that is away."""
        try:
            if self.epoch:
                if not self._lock.beat(self.epoch):
                    self.resign()
            elif self._lock.take():
                self.epoch = self._store.write_now(lambda session: _next_epoch(session, self._holder))
            else:
                self._watch()
        except (SQLAlchemyError, Unavailable) as error:
            # Whoever cannot reach the records cannot lead: the lock may have gone to another already.
            log.warning("cannot tell who leads: %s", error)
            self.resign()

    def resign(self) -> None:
        """Lead no longer; another may."""
        self.epoch = 0
        with contextlib.suppress(SQLAlchemyError):
            self._lock.release()

    async def write(self, work: Callable[[Session], T], epoch: int) -> T:
        """As `Store.write`, if `epoch` is still the leader's. Raises NotLeading where it is not."""
        return await self._store.write(fenced(work, epoch))

    async def confirm(self, epoch: int) -> None:
        """Raise NotLeading where another leads meanwhile: for calls to Ray that a predecessor must not make any more."""
        await self._store.read(lambda session: _check(session, epoch))

    async def present(self) -> tuple[int, str]:
        """Epoch and address of whoever leads, as last recorded; 0 and empty before there was anybody."""
        row = await self._store.read(lambda session: session.get(Leader, 1))
        return (row.epoch, row.holder) if row is not None else (0, "")

    def _watch(self) -> None:
        """Another holds the lock. Where it is silent for too long, it hangs: end its hold."""
        row = self._store.read_now(lambda session: session.get(Leader, 1))
        seen = (row.epoch, row.beat) if row is not None else (0, 0)
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
        elif self._clock() - self._seen_at > SILENCE_SECONDS:
            log.warning("the leader is silent for %.0f s: taking over", self._clock() - self._seen_at)
            self._lock.oust()  # the next look takes it


def fenced(work: Callable[[Session], T], epoch: int) -> Callable[[Session], T]:
    """`work`, done only while `epoch` is the leader's."""

    def checked(session: Session) -> T:
        _check(session, epoch)
        return work(session)

    return checked


def _check(session: Session, epoch: int) -> None:
    present = session.exec(select(Leader.epoch)).first() or 0
    if not epoch or present != epoch:
        raise NotLeading(f"this coordinator does not lead (epoch {epoch or 'none'}, now {present})", "NOT_LEADING")


def _next_epoch(session: Session, holder: str) -> int:
    row = session.get(Leader, 1) or Leader(id=1)
    row.epoch, row.holder, row.beat_time = row.epoch + 1, holder, now()
    session.add(row)
    session.flush()
    return row.epoch


class _FileLock:
    """A lock on a file beside the database."""

    def __init__(self, engine: Engine) -> None:
        self._path = Path(f"{engine.url.database}.leader")
        self._file: IO[str] | None = None

    def take(self) -> bool:
        file = self._path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        return True

    def beat(self, epoch: int) -> bool:
        return self._file is not None

    def oust(self) -> None:
        """Nobody can take a file lock from a process that lives."""

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _AdvisoryLock:
    """A session's advisory lock, on a connection that does nothing else."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def take(self) -> bool:
        if self._connection is None:
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()  # not one of the pool's: it stays out as long as we live
            self._connection = connection
        return bool(self._ask("SELECT pg_try_advisory_lock(:lock)"))

    def beat(self, epoch: int) -> bool:
        # Not through the store's writer: a leader with much to write is busy, not silent.
        statement = (
            "UPDATE leader SET beat = beat + 1, beat_time = now() WHERE epoch = :epoch AND EXISTS (SELECT 1 FROM pg_locks"
            " WHERE locktype = 'advisory' AND objid = :lock AND pid = pg_backend_pid()) RETURNING beat"
        )
        return self._connection is not None and self._ask(statement, epoch=epoch) is not None

    def oust(self) -> None:
        self._ask(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND objid = :lock AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )

    def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _ask(self, statement: str, **values: int) -> object:
        assert self._connection is not None
        return self._connection.execute(text(statement), {"lock": LEADER_LOCK, **values}).scalar()
