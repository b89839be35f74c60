"""The call of AdminService that backs the records up."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from sqlalchemy.exc import SQLAlchemyError

from common.errors import ResourceExhausted
from coordinator.services.principal import Context
from coordinator.store.backup import Manifest, dump, sha256_of
from coordinator.store.database import Store
from coordinator.store.faults import is_fault, unreadable
from luthier.v1 import admin_pb2

CHUNK = 512 << 10
"""Bytes of one message."""

TELL_SECONDS = 0.5
"""How often a caller hears how far the reading is."""


class BackupCalls:
    """Makes backups; a part of AdminService.

    A backup is written to a file without a name first: what reads the store must not wait for a caller whose line is slow.
    """

    _store: Store
    _home: Path
    _backing_up = False

    async def BackupRecords(
        self, request: admin_pb2.BackupRecordsRequest, context: Context
    ) -> AsyncIterator[admin_pb2.BackupRecordsResponse]:
        """See admin.proto."""
        if self._backing_up:
            raise ResourceExhausted("another backup is being made; try again when it is done", "BACKUP_RUNNING")
        self._backing_up = True
        try:
            with tempfile.TemporaryFile(dir=self._home) as file:
                reading = _Reading(self._store, file)
                try:
                    while not await reading.over(TELL_SECONDS):
                        done, total = reading.progress
                        progress = admin_pb2.BackupProgress(rows=done, total_rows=total)
                        yield admin_pb2.BackupRecordsResponse(progress=progress)
                    manifest = await self._result(reading)
                finally:
                    await reading.stop()
                yield admin_pb2.BackupRecordsResponse(summary=await asyncio.to_thread(_summary, file, manifest))
                while chunk := await asyncio.to_thread(file.read, CHUNK):
                    yield admin_pb2.BackupRecordsResponse(chunk=chunk)
        finally:
            self._backing_up = False

    async def _result(self, reading: _Reading) -> Manifest:
        try:
            return await reading.result()
        except OSError as error:
            why = f"the coordinator cannot write the backup to {self._home}, from where it is sent: {error.strerror}"
            raise ResourceExhausted(f"{why}; make room there", "NO_ROOM") from error


class _GivenUp(Exception):
    """Nobody waits for the backup any more."""


class _Reading:
    """A dump in a thread of its own."""

    def __init__(self, store: Store, file: IO[bytes]) -> None:
        self.progress = (0, 0)
        self._given_up = False
        self._work = asyncio.ensure_future(asyncio.to_thread(dump, store.engine, file, self._told))

    def _told(self, done: int, total: int) -> None:
        if self._given_up:
            raise _GivenUp
        self.progress = (done, total)

    async def over(self, seconds: float) -> bool:
        """Whether it has ended, after waiting for at most so long."""
        return bool((await asyncio.wait([self._work], timeout=seconds))[0])

    async def result(self) -> Manifest:
        """What was written."""
        try:
            return await self._work
        except SQLAlchemyError as error:
            if not is_fault(error):
                raise
            raise unreadable(error) from error

    async def stop(self) -> None:
        """Have it end, and wait for that."""
        self._given_up = True
        await asyncio.wait([self._work])
        self._work.exception()  # asked for, so that nobody is told that nobody did


def _summary(file: IO[bytes], manifest: Manifest) -> admin_pb2.BackupSummary:
    size = file.seek(0, 2)
    summary = admin_pb2.BackupSummary(
        size_bytes=size, sha256=sha256_of(file, size), schema=manifest.schema, without=manifest.without
    )
    summary.time.FromJsonString(manifest.time)
    summary.rows.update({name: part.rows for name, part in manifest.parts.items()})
    file.seek(0)
    return summary
