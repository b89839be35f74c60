"""Bring the schema of a database up to date: all of it in one transaction, or nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from importlib.metadata import version
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from common.errors import FailedPrecondition, Internal, LuthierError
from coordinator.store.engines import for_writing, without_foreign_keys
from coordinator.store.faults import is_fault, unavailable

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"


def known_revisions() -> set[str]:
    """The revisions that this code knows."""
    return {script.revision for script in _scripts().walk_revisions()}


def bring_to(connection: Connection, revision: str) -> None:
    """Apply what leads to a revision, in the transaction that is under way on `connection`."""
    command.upgrade(config(connection), revision)


def config(connection: Connection) -> Config:
    """Alembic's settings for this package's migrations on `connection`, whose transaction they share."""
    settings = Config()
    settings.set_main_option("script_location", str(MIGRATIONS))
    settings.attributes["connection"] = connection
    return settings


def head() -> str:
    """The newest revision that this code knows."""
    found = _scripts().get_current_head()
    assert found is not None
    return found


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Apply every migration up to `revision` that has not been applied yet, in one transaction.

    An SQLite database that has records is copied first, beside itself; the copy stays.

    Raises FailedPrecondition for a database that a newer version has written, Internal where a migration failed, Unavailable
    where the database does not answer. In each of these cases it is as it was.
    """
    wanted = head() if revision == "head" else revision
    copy: Path | None = None
    try:
        with without_foreign_keys(for_writing(engine)) as connection, connection.begin():
            present = MigrationContext.configure(connection).get_current_revision() or ""
            _check_known(present)
            if present == wanted:
                return
            if present:
                copy = _prepare(engine, present, wanted)
            bring_to(connection, wanted)
            check_references(connection)
    except BaseException as error:
        if copy is not None:
            copy.unlink(missing_ok=True)  # the store itself is still what it was
        if isinstance(error, LuthierError) or not isinstance(error, Exception):
            raise
        if isinstance(error, SQLAlchemyError) and is_fault(error) and not _is_about_statements(error):
            raise unavailable(error) from error
        log.exception("bringing the schema to %s failed", wanted)
        words = str(getattr(error, "orig", None) or error).strip().splitlines()
        why = words[0][:300] if words else type(error).__name__
        raise Internal(
            f"bringing the store to schema {wanted} failed ({why}); the store is as it was, and the version that ran before"
            " still works with it",
            "MIGRATION_FAILED",
        ) from error


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS))


def _check_known(present: str) -> None:
    if present and present not in known_revisions():
        raise FailedPrecondition(
            f"the store has schema {present}, and this version of Luthier ({version('luthier')}) knows those up to {head()}: a"
            " newer version has written it. Start that version or a later one, or use a copy from before the upgrade;"
            " nothing was changed",
            "SCHEMA_NEWER",
        )


def _is_about_statements(error: SQLAlchemyError) -> bool:
    """Whether the database answered, and did not like what a migration said (sqlite3 has one class for both)."""
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    return name == "SQLITE_ERROR"


def _prepare(engine: Engine, present: str, wanted: str) -> Path | None:
    """Copy what is about to be changed, where that is a matter of a file; return the copy."""
    database = engine.url.database
    if engine.url.get_backend_name() != "sqlite":
        log.warning(
            "bringing the store from schema %s to %s. PostgreSQL is not copied for that: stop now if there is neither a pg_dump"
            " nor a `luthier backup` of it",
            present,
            wanted,
        )
        return None
    if not database or database == ":memory:":
        return None
    copy = _free_name(Path(f"{database}.before-{wanted}"))
    try:
        _copy_sqlite(Path(database), copy)
    except (OSError, sqlite3.Error) as error:
        raise FailedPrecondition(
            f"the store has to be brought from schema {present} to {wanted}, and cannot be copied to {copy} before that"
            f" ({error}); make room there. Nothing was changed",
            "NO_COPY",
        ) from error
    log.info("bringing the store from schema %s to %s; as it was, it is kept in %s", present, wanted, copy)
    return copy


def _free_name(path: Path) -> Path:
    """The path, or one with a number behind it: a copy that is there is never written over."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _copy_sqlite(database: Path, copy: Path) -> None:
    """SQLite's own way of copying a database in use. The copy is private, whole or absent, and on the disk."""
    unfinished = copy.with_name(f"{copy.name}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with contextlib.closing(sqlite3.connect(database)) as source, contextlib.closing(sqlite3.connect(unfinished)) as target:
            source.backup(target)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(copy)
    finally:
        unfinished.unlink(missing_ok=True)


def check_references(connection: Connection) -> None:
    """What SQLite would have looked at on the way, had it not been told to leave references alone."""
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise RuntimeError(f"rows of {broken[0]} would refer to nothing in {broken[2]}")
