"""Removes what was deleted (the bytes in storage first, then the records that say where they were) and what is too old to keep.

A kill in between leaves the mark, and the next round begins again with it: deleting what is gone already does nothing. Bytes are
deleted in a thread and outside of any transaction.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import CursorResult, delete, tuple_, update
from sqlmodel import Session, SQLModel, col, or_, select

from common import manifest, storage
from common.errors import LuthierError, Unavailable
from coordinator import compaction
from coordinator.compaction import Retention
from coordinator.garbage import JOBS, folder_of, needed
from coordinator.jobs.states import State
from coordinator.notify import Notifier
from coordinator.store.database import Store
from coordinator.store.leader import Leadership, NotLeading
from coordinator.store.tables import Checkpoint, Garbage, Hold, Job, ModelVersion, now

log = logging.getLogger(__name__)

T = TypeVar("T")

TOPIC = "collector"
"""What is notified where something was deleted."""

PERIOD = 60.0
"""Seconds between rounds."""

SETTLE = timedelta(seconds=60)
"""How long after its end a job's files are left alone: its processes may still be leaving."""

PIECES = 50
"""Transactions of each kind in which one round compacts at most."""

BATCH = 100
"""Checkpoints, jobs and folders that one round takes on at most."""


class Collector:
    """Runs in the event loop of every coordinator as one task, and works in the one that leads."""

    def __init__(self, store: Store, notifier: Notifier, leadership: Leadership, storage_uri: str, retention: Retention) -> None:
        self._store = store
        self._notifier = notifier
        self._leadership = leadership
        self._epoch = 0
        self._storage = storage_uri.rstrip("/")
        self._retention = retention

    async def run(self) -> None:
        """Go round until cancelled. A round that fails is logged and tried again."""
        while not self._notifier.closing.is_set():
            try:
                await self.round()
            except Unavailable as error:
                log.warning("%s", error)
            except Exception:
                log.exception("a round of the collector failed")
            await self._notifier.wait(TOPIC, PERIOD)

    async def round(self) -> None:
        """Remove once what can be removed."""
        self._epoch = self._leadership.epoch
        if not self._epoch:
            return
        await self._write(self._retire_checkpoints)
        await self._each(await self._store.read(_retired), self._remove_checkpoint)
        await self._each(await self._store.read(_deleted_jobs), self._remove_job)
        await self._each(await self._store.read(partial(_garbage, storage_uri=self._storage)), self._remove_folder)
        await self._compact()

    async def _compact(self) -> None:
        """Remove old events and log lines. What one round leaves is for the next."""
        kept = self._retention
        for _ in range(PIECES):
            moment = now()
            old = await self._store.read(partial(compaction.with_old_events, before=moment - kept.events))
            if old:
                await self._write(partial(compaction.compact_events, uids=old))
            lines = await self._store.read(partial(compaction.with_old_lines, before=moment - kept.logs, lines=kept.log_lines))
            if lines:
                await self._write(partial(compaction.compact_logs, jobs=lines))
            if not (old or lines):
                return

    async def _each(self, items: Sequence[T], remove: Callable[[T], Awaitable[None]]) -> None:
        """Remove one after another; one that cannot be removed now does not hold up the others."""
        for item in items:
            try:
                await remove(item)
            except NotLeading:
                raise
            except LuthierError as error:
                log.warning("not removed yet: %s", error)

    async def _remove_checkpoint(self, point: Checkpoint) -> None:
        await self._outside(manifest.delete, point.uri)
        await self._write(partial(_forget_checkpoint, uid=point.job_uid, run=point.run, step=point.step))

    async def _remove_folder(self, uri: str) -> None:
        if await self._write(partial(_begin, uri=uri, storage_uri=self._storage)):
            await self._outside(manifest.delete, uri)
            await self._write(partial(_finish, uri=uri))

    async def _remove_job(self, uid: str) -> None:
        folder = storage.join(self._storage, JOBS, uid)
        kept = await self._store.read(partial(_kept_below, folder=folder))
        await self._outside(storage.delete_but, folder, kept)
        await self._write(partial(compaction.note_deletion, uid=uid))
        for table, key in _tables_of_jobs():
            while await self._write(partial(_delete_rows, table=table, key=key, uid=uid)):
                pass
        await self._write(lambda session: session.exec(delete(Job).where(col(Job.uid) == uid)))

    async def _write(self, work: Callable[[Session], T]) -> T:
        return await self._leadership.write(work, self._epoch)

    async def _outside(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do something to the storage, unless another leads meanwhile."""
        await self._leadership.confirm(self._epoch)
        await asyncio.to_thread(work, *arguments)

    def _retire_checkpoints(self, session: Session) -> None:
        """Mark the checkpoints of jobs whose model has been registered for long enough: nobody will go on from them."""
        registered = col(Job.result)["model_version"].as_string().is_not(None)
        ended = select(Job.uid).where(
            Job.state == State.SUCCEEDED.value, col(Job.end_time) < now() - self._retention.checkpoints, registered
        )
        statement = update(Checkpoint).where(col(Checkpoint.delete_time).is_(None), col(Checkpoint.job_uid).in_(ended))
        session.execute(statement.values(delete_time=now()).execution_options(synchronize_session=False))


def _retired(session: Session) -> Sequence[Checkpoint]:
    return session.exec(select(Checkpoint).where(col(Checkpoint.delete_time).is_not(None)).limit(BATCH)).all()


def _forget_checkpoint(session: Session, uid: str, run: int, step: int) -> None:
    row = session.get(Checkpoint, (uid, run, step))
    if row is not None:
        session.delete(row)


def _deleted_jobs(session: Session) -> Sequence[str]:
    settled = or_(col(Job.end_time).is_(None), col(Job.end_time) < now() - SETTLE)
    return session.exec(select(Job.uid).where(col(Job.delete_time).is_not(None), settled).limit(BATCH)).all()


def _kept_below(session: Session, folder: str) -> list[str]:
    """Folders within a job's folder that are not the job's alone: of models that it made, and what the models' deletion left."""
    below = folder + "/"
    base = col(ModelVersion.document)["base_artifact_uri"].as_string()
    uris = {
        *session.exec(select(ModelVersion.uri).where(col(ModelVersion.uri).startswith(below, autoescape=True))).all(),
        *session.exec(select(base).where(base.startswith(below, autoescape=True))).all(),
        *session.exec(select(Garbage.uri).where(col(Garbage.uri).startswith(below, autoescape=True))).all(),
    }
    return sorted(uris)


def _tables_of_jobs() -> list[tuple[Any, Any]]:
    """The tables whose rows belong to jobs, each with the column that says to which."""
    return [
        (table, column)
        for table in reversed(SQLModel.metadata.sorted_tables)
        for column in table.columns
        if any(key.target_fullname == "job.uid" for key in column.foreign_keys)
    ]


def _delete_rows(session: Session, table: Any, key: Any, uid: str) -> bool:
    """Delete some rows of a job. False where there were none left."""
    primary = list(table.primary_key.columns)
    some = select(*primary).where(key == uid).limit(compaction.ROWS)
    result = session.execute(delete(table).where(tuple_(*primary).in_(some)))
    assert isinstance(result, CursorResult)
    return bool(result.rowcount)


def _garbage(session: Session, storage_uri: str) -> Sequence[str]:
    # What was begun comes first: others wait for its end.
    rows = session.exec(select(Garbage).order_by(col(Garbage.start_time).is_(None), col(Garbage.create_time))).all()
    return [row.uri for row in rows if row.start_time is not None or not needed(session, row.uri, storage_uri)]


def _begin(session: Session, uri: str, storage_uri: str) -> bool:
    """Decide to delete a folder; from here on nobody publishes there until it is gone. False where somebody needs it."""
    row = session.get(Garbage, uri)
    if row is None:
        return False
    if not folder_of(uri, storage_uri):
        log.warning("%s is left alone: it lies outside of the storage", uri)
        session.delete(row)
        return False
    for hold in session.exec(select(Hold).where(Hold.expire_time <= now())).all():
        session.delete(hold)
    if row.start_time is None:
        if needed(session, uri, storage_uri):
            return False
        row.start_time = now()
        session.add(row)
    return True


def _finish(session: Session, uri: str) -> None:
    row = session.get(Garbage, uri)
    if row is not None:
        session.delete(row)
