"""Opening a database: what SQLite and PostgreSQL each need for the same code to have the same guarantees on both."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url

READERS = 4
"""Threads that read at the same time."""

PATIENCE_SECONDS = 10.0
"""How long a transaction waits for another process that writes. SQLite's URL may say otherwise (`?timeout=…`)."""

IDLE_SECONDS = 8.0
"""How long PostgreSQL lets a transaction do nothing: a coordinator that hangs inside one must not keep others from writing."""

WRITING = "luthier_write"
"""Execution option of connections that write."""

WRITERS_LOCK = 0x4C757468
"""Number of the advisory lock that serialises the writing transactions of every coordinator on one PostgreSQL database."""

TRANSACTION_ID = "luthier_transaction_id"
"""Key of `Connection.info` with the id of the writing transaction, by which PostgreSQL later tells how it ended."""

NUL_IN_JSON = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def make_engine(url: str) -> Engine:
    """Open the database at a SQLAlchemy URL (`sqlite:///path`, `postgresql+psycopg://…`).

    On both, writing transactions run one at a time: what a function read before it writes is still so when it writes.
    """
    parsed = make_url(url)
    return _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed)


def for_writing(engine: Engine) -> Engine:
    """The engine with transactions that wait for their turn to write."""
    return engine.execution_options(**{WRITING: True})


def for_reading(engine: Engine) -> Engine:
    """The engine with transactions that see one state of the records throughout, as SQLite's do anyway."""
    if engine.url.get_backend_name() == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


@contextlib.contextmanager
def without_foreign_keys(engine: Engine) -> Iterator[Connection]:
    """A connection on which SQLite does not look at references, so that tables can be rebuilt; it can only be told outside of a
    transaction. PostgreSQL needs nothing of the kind.
    """
    with engine.connect() as connection:
        if engine.url.get_backend_name() != "sqlite":
            yield connection
            return
        raw: Any = connection.connection.driver_connection
        raw.execute("PRAGMA foreign_keys=OFF")
        try:
            yield connection
        finally:
            connection.rollback()
            raw.execute("PRAGMA foreign_keys=ON")


def _sqlite(url: URL) -> Engine:
    """WAL with full synchronisation, so that a commit that was answered survives a power cut.

    Writing begins with BEGIN IMMEDIATE: with the default, two writers that have both read lose one of their changes.
    """
    patience = float(str(url.query.get("timeout", PATIENCE_SECONDS)))
    engine = create_engine(
        url,
        pool_size=READERS + 2,
        max_overflow=0,
        pool_timeout=PATIENCE_SECONDS,
        connect_args={"timeout": patience, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={int(patience * 1000)}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get(WRITING, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    """Commits wait for the disk whatever the server's default is, and writers take their turn by an advisory lock.

    The lock makes READ COMMITTED as strong as SQLite's single writer: the statements of a writing transaction each see all that
    was committed, and nothing is committed between them.
    """
    options = {
        "synchronous_commit": "on",
        "lock_timeout": f"{PATIENCE_SECONDS * 1000:.0f}",
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS * 1000:.0f}",
    }
    engine = create_engine(
        url,
        pool_size=READERS + 2,
        max_overflow=0,
        pool_timeout=PATIENCE_SECONDS,
        json_serializer=_json,
        connect_args={
            "connect_timeout": 5,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
        },
    )
    dumper = _nul_free_dumper()

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.adapters.register_dumper(str, dumper)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get(WRITING, False):
            statement = "SELECT pg_advisory_xact_lock(%s), pg_current_xact_id()::text"
            connection.info[TRANSACTION_ID] = connection.exec_driver_sql(statement, (WRITERS_LOCK,)).one()[1]

    return engine


def _nul_free_dumper() -> type[Any]:
    """PostgreSQL keeps no NUL in texts and a log line may have one: it becomes the replacement character."""
    from psycopg.types.string import StrDumperUnknown

    class NulFree(StrDumperUnknown):
        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in obj else obj)

    return NulFree


def _json(value: Any) -> str:
    text = json.dumps(value)
    return NUL_IN_JSON.sub(r"\1\\ufffd", text) if "\\u0000" in text else text
