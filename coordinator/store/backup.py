"""A backup of the records: one file of one form, whatever database they are in, so that it can be restored into another kind.

It is a zip that any tool opens: `tables/<name>.jsonl` with one JSON object a row, and `manifest.json` with the number of rows and
the SHA-256 of each. The file's last 64 bytes (the zip's comment) are the SHA-256 of all that come before, so that a file
that was cut off or changed anywhere is known before anything else is looked at.

Everything is read in one transaction that sees one state of the records, while others write.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import zipfile
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from typing import IO, Any

from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, Table, func, select
from sqlmodel import SQLModel

from common.errors import FailedPrecondition
from coordinator.store.engines import for_reading
from coordinator.store.migrate import head
from coordinator.store.tables import now

FORMAT, FORMAT_VERSION = "luthier-backup", 1
MANIFEST = "manifest.json"
SEAL_BYTES = 64
"""The hex digits of a SHA-256."""

ROWS_AT_ONCE = 500
PIECE = 1 << 20

WITHOUT = (
    "artifacts, which stay under the storage URI, and files of the home: admin.key, and secrets.key, without which encrypted"
    " secrets cannot be read; put that into a new home before its coordinator starts"
)
"""What no backup holds, for people."""

Told = Callable[[int, int], None]
"""Told how many rows were read or written so far, and how many there are. What it raises ends the work."""


@dataclass(frozen=True)
class Part:
    """A table in a backup: where it lies, and what it has to be."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a backup says of itself."""

    schema: str
    luthier: str
    store: str
    time: str
    id: str
    parts: dict[str, Part] = field(default_factory=dict)
    format: str = FORMAT
    version: int = FORMAT_VERSION
    without: str = WITHOUT

    @property
    def rows(self) -> int:
        """Rows of all tables together."""
        return sum(part.rows for part in self.parts.values())


def dump(engine: Engine, target: IO[bytes], told: Told = lambda _done, _total: None) -> Manifest:
    """Write a backup of the whole store to a fresh file that can be read and sought in. Blocks, for long where there is much.

    Raises FailedPrecondition where the store's schema is not this version's own.
    """
    with for_reading(engine).connect() as connection, connection.begin():
        schema = MigrationContext.configure(connection).get_current_revision() or "none"
        if schema != head():
            why = f"the store has schema {schema}, and this version of Luthier ({version('luthier')}) has {head()}"
            raise FailedPrecondition(f"{why}: back it up with the version that runs on it", "SCHEMA_DIFFERS")
        known = SQLModel.metadata.sorted_tables
        counts = {table.name: connection.execute(select(func.count()).select_from(table)).scalar_one() for table in known}
        progress = _Progress(sum(counts.values()), told)
        parts = {}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for table in known:
                parts[table.name] = _dump_table(connection, table, archive, progress)
            manifest = Manifest(
                schema=schema,
                luthier=version("luthier"),
                store=engine.url.get_backend_name(),
                time=now().isoformat(timespec="milliseconds"),
                id=secrets.token_hex(8),
                parts=parts,
            )
            archive.writestr(MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n", zipfile.ZIP_DEFLATED)
            archive.comment = b"0" * SEAL_BYTES
    _seal(target)
    return manifest


class _Progress:
    """Counts rows for whoever is told."""

    def __init__(self, total: int, told: Told) -> None:
        self._total, self._told, self._done = total, told, 0
        told(0, total)

    def add(self, rows: int) -> None:
        self._done += rows
        self._told(self._done, max(self._total, self._done))


def _dump_table(connection: Connection, table: Table, archive: zipfile.ZipFile, progress: _Progress) -> Part:
    file, rows, size, digest = f"tables/{table.name}.jsonl", 0, 0, hashlib.sha256()
    names = [column.name for column in table.columns]
    streaming = connection.execution_options(stream_results=True, yield_per=ROWS_AT_ONCE)
    with archive.open(file, "w", force_zip64=True) as part, streaming.execute(select(table)) as result:
        for rows_together in result.partitions():
            lines = [
                json.dumps(dict(zip(names, row, strict=True)), default=_encoded, ensure_ascii=False) for row in rows_together
            ]
            piece = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
            part.write(piece)
            digest.update(piece)
            rows, size = rows + len(lines), size + len(piece)
            progress.add(len(lines))
    return Part(file, rows, size, digest.hexdigest())


def _encoded(value: Any) -> str:
    """What JSON has no word for, as text; the column's type says how to read it back."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes | memoryview):
        return b64encode(value).decode()
    raise TypeError(f"a {type(value).__name__} cannot be backed up")


def _seal(target: IO[bytes]) -> None:
    """Put the SHA-256 of everything else into the comment at the end."""
    size = target.seek(0, 2)
    target.seek(size - SEAL_BYTES)
    seal = sha256_of(target, size - SEAL_BYTES)
    target.seek(size - SEAL_BYTES)
    target.write(seal.encode())
    target.flush()


def sha256_of(file: IO[bytes], size: int) -> str:
    """SHA-256 of the first `size` bytes of a file in hex."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (piece := file.read(min(PIECE, size))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()
