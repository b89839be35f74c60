"""Putting a backup into an empty store: checked whole before, and in one transaction, so that it is all there or nothing is.

The schema is made as the backup has it, filled, and then brought up to date like any store that is opened by a newer version.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import zipfile
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from sqlalchemy import (
    JSON,
    Connection,
    DateTime,
    Engine,
    LargeBinary,
    MetaData,
    Table,
    func,
    insert,
    inspect,
    null,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.types import TypeEngine
from sqlmodel import Session, SQLModel

from common.errors import FailedPrecondition, InvalidArgument
from coordinator.store.backup import FORMAT, FORMAT_VERSION, MANIFEST, ROWS_AT_ONCE, SEAL_BYTES, Manifest, Part, Told, sha256_of
from coordinator.store.engines import for_writing, make_engine, without_foreign_keys
from coordinator.store.faults import is_fault, unavailable
from coordinator.store.migrate import bring_to, check_references, head, known_revisions
from coordinator.store.tables import StackFact

RESTORED = "restored"
"""Key of the fact that the store was restored; its value is new with each restore."""

DIGITS = re.compile(r"[0-9a-f]{64}")


def restore(url: str, path: Path, told: Told = lambda _done, _total: None) -> Manifest:
    """Restore a backup into the empty store at a SQLAlchemy URL. Blocks, for long where there is much.

    Raises InvalidArgument for a file that is no backup or damaged, FailedPrecondition for one that a newer version made and for a
    store that is not empty, Unavailable where the database does not answer. In each of these cases the store is as it was.
    """
    with _opened(path) as (archive, manifest):
        engine = make_engine(url)
        created = _new_files(engine)
        try:
            with without_foreign_keys(for_writing(engine)) as connection, connection.begin():
                _check_empty(connection, engine)
                bring_to(connection, manifest.schema)
                _fill(connection, archive, manifest, told)
                bring_to(connection, head())
                check_references(connection)
        except SQLAlchemyError as error:
            _remove(engine, created)
            if is_fault(error):
                raise unavailable(error) from error
            why = str(getattr(error, "orig", None) or error).strip().splitlines()[0][:300]
            raise InvalidArgument(
                f"the database does not take what {path} holds ({why}); nothing was restored", "NO_BACKUP"
            ) from error
        except BaseException:
            _remove(engine, created)
            raise
        engine.dispose()
    return manifest


def restored(session: Session) -> str:
    """What the store's latest restore is known by; empty where there was none."""
    fact = session.get(StackFact, RESTORED)
    return fact.value if fact is not None else ""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, Manifest]]:
    """The archive and its manifest, once the file as a whole is known to be what was written."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}", "NO_BACKUP") from error
    with file:
        size = file.seek(0, 2)
        _check_seal(path, file, size)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive, _manifest(path, archive)
        except zipfile.BadZipFile as error:
            raise _damaged(path, str(error)) from error


def _check_seal(path: Path, file: IO[bytes], size: int) -> None:
    if size <= SEAL_BYTES:
        raise InvalidArgument(f"{path} is no backup of Luthier: it is too short for one", "NO_BACKUP")
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        raise InvalidArgument(f"{path} is no backup of Luthier: it does not begin like one", "NO_BACKUP")
    file.seek(size - SEAL_BYTES)
    seal = file.read().decode("ascii", "replace")
    if not DIGITS.fullmatch(seal):
        raise _damaged(path, "it does not end as it should; was it copied whole?")
    if sha256_of(file, size - SEAL_BYTES) != seal:
        raise _damaged(path, "its content is not what was written")


def _manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    try:
        content: dict[str, Any] = json.loads(archive.read(MANIFEST))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        if content["version"] > FORMAT_VERSION:
            raise FailedPrecondition(
                f"{path} was made by Luthier {content['luthier']} in a form that this version does not know; restore it with that"
                " version or a later one",
                "BACKUP_NEWER",
            )
        content["parts"] = {name: Part(**part) for name, part in content["parts"].items()}
        manifest = Manifest(**content)
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidArgument(f"{path} is no backup of Luthier: its manifest cannot be read ({error})", "NO_BACKUP") from error
    if manifest.schema not in known_revisions():
        raise FailedPrecondition(
            f"{path} has schema {manifest.schema} of Luthier {manifest.luthier}, and this version knows those up to {head()};"
            " restore it with that version or a later one",
            "BACKUP_NEWER",
        )
    return manifest


def _damaged(path: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"{path} is damaged: {why}. Nothing was restored; take another copy of it", "BACKUP_DAMAGED")


def _new_files(engine: Engine) -> list[Path]:
    """The files that opening the database is about to make."""
    database = engine.url.database
    if engine.url.get_backend_name() != "sqlite" or not database or Path(database).exists():
        return []
    Path(database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    Path(database).touch(mode=0o600)
    return [Path(database), Path(f"{database}-wal"), Path(f"{database}-shm")]


def _remove(engine: Engine, files: list[Path]) -> None:
    engine.dispose()
    for file in files:
        file.unlink(missing_ok=True)


def _check_empty(connection: Connection, engine: Engine) -> None:
    present = {*inspect(connection).get_table_names()}
    ours = present & {"alembic_version", *SQLModel.metadata.tables}
    if not ours:
        return
    where = engine.url.render_as_string(hide_password=True)
    jobs = connection.execute(select(func.count()).select_from(text("job"))).scalar_one() if "job" in ours else 0
    if engine.url.get_backend_name() == "sqlite":
        way = "stop its coordinator and move the file away, or name a fresh home with --home"
    else:
        way = "make a fresh database (CREATE DATABASE) and name that with --store-url"
    raise FailedPrecondition(
        f"the store at {where} is not empty (it has {jobs} jobs), and a backup is restored into an empty one only: {way}."
        " Nothing was changed",
        "STORE_NOT_EMPTY",
    )


def _fill(connection: Connection, archive: zipfile.ZipFile, manifest: Manifest, told: Told) -> None:
    found = MetaData()
    found.reflect(connection, only=lambda name, _: name in manifest.parts)
    by_name = {table.name: table for table in found.sorted_tables}
    for table in found.sorted_tables:
        for column in table.columns:
            if isinstance(column.type, JSON):
                column.type.none_as_null = bool(column.nullable)
    unknown = sorted({*manifest.parts} - {*by_name})
    if unknown:
        raise InvalidArgument(
            f"the backup has tables that its schema {manifest.schema} has not: {', '.join(unknown)}", "NO_BACKUP"
        )
    done = 0
    told(done, manifest.rows)
    for name, table in by_name.items():
        for rows in _rows(archive, manifest.parts[name], table):
            connection.execute(insert(table), rows)
            done += len(rows)
            told(done, manifest.rows)
        count = connection.execute(select(func.count()).select_from(table)).scalar_one()
        if count != manifest.parts[name].rows:
            raise InvalidArgument(f"{name} has {count} rows after {manifest.parts[name].rows} were put in", "BACKUP_DAMAGED")
    _go_on_counting(connection, by_name)
    _as_of_now(connection, by_name, manifest)


def _rows(archive: zipfile.ZipFile, part: Part, table: Table) -> Iterator[list[dict[str, Any]]]:
    """A part's rows, some at a time. Raises InvalidArgument at the end where they are not those that were written."""
    digest, count = hashlib.sha256(), 0
    special = {column.name: read for column in table.columns if (read := _reader(column.type)) is not None}
    rows: list[dict[str, Any]] = []
    with archive.open(part.file) as lines:
        for line in lines:
            digest.update(line)
            count += 1
            row = json.loads(line)
            for name, read in special.items():
                if row[name] is not None:
                    row[name] = read(row[name])
            rows.append(row)
            if len(rows) == ROWS_AT_ONCE:
                yield rows
                rows = []
    if rows:
        yield rows
    if (count, digest.hexdigest()) != (part.rows, part.sha256):
        raise InvalidArgument(f"{part.file} of the backup is damaged; nothing was restored", "BACKUP_DAMAGED")


def _reader(kind: TypeEngine[Any]) -> Callable[[str], Any] | None:
    """How a column's values are read that JSON has no word for."""
    if isinstance(kind, DateTime):
        return lambda text: datetime.fromisoformat(text).astimezone(UTC)
    return b64decode if isinstance(kind, LargeBinary) else None


def _go_on_counting(connection: Connection, tables: dict[str, Table]) -> None:
    """PostgreSQL counts the rows of some tables, and does not see what is put in with a number of its own."""
    if connection.dialect.name != "postgresql":
        return
    for table in tables.values():
        for column in table.primary_key.columns:
            name = {"table": table.name, "column": column.name}
            counter = connection.execute(text("SELECT pg_get_serial_sequence(:table, :column)"), name).scalar()
            if counter:
                last = connection.execute(select(func.max(column))).scalar()
                if last is not None:
                    connection.execute(select(func.setval(counter, last)))


def _as_of_now(connection: Connection, tables: dict[str, Table], manifest: Manifest) -> None:
    """Records of the past become those of the present.

    Nobody leads, and whoever does next has a number that nobody had. For runs that had not ended, time stood still in between, so
    that none is over its limit or budget for having lain in a file. What came after the backup is unknown here but may have left
    traces, with Ray and in storage: the fact that says so has runs keep out of their way (jobs/reconcile.py, services/agent.py).
    """
    facts, leader, runs = tables["stack_fact"], tables.get("leader"), tables["job_run"]
    mark = {"key": RESTORED, "value": secrets.token_hex(3)}
    connection.execute(facts.delete().where(facts.c.key == RESTORED))
    connection.execute(insert(facts), [mark])
    if leader is not None:
        connection.execute(update(leader).values(epoch=leader.c.epoch + 1, holder="", beat=0, beat_time=null()))
    away = max(datetime.now(UTC) - datetime.fromisoformat(manifest.time), timedelta())
    live = connection.execute(select(runs.c.job_uid, runs.c.run, runs.c.create_time).where(runs.c.end_time.is_(None))).all()
    for uid, run, began in live:
        moment = (began.replace(tzinfo=UTC) if began.tzinfo is None else began) + away
        connection.execute(update(runs).where(runs.c.job_uid == uid, runs.c.run == run).values(create_time=moment))
