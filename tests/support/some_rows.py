"""Rows in every table of a database, of whatever schema: for tests of what happens to a store as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, DateTime, Engine, LargeBinary, MetaData, Table, insert, select
from sqlalchemy.types import Boolean, Float, Integer, TypeEngine

from coordinator.store.engines import for_writing, make_engine

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@contextmanager
def empty_database(request: pytest.FixtureRequest, kind: str, folder: Path) -> Iterator[str]:
    """URL of a database without anything in it."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'records.db'}"
        return
    server = request.getfixturevalue("postgres")
    name = server.database()
    yield server.url(name)
    server.drop(name)


def tables_of(engine: Engine) -> list[Table]:
    """The tables as the database has them, those first that others refer to."""
    found = MetaData()
    found.reflect(engine)
    return [table for table in found.sorted_tables if table.name != "alembic_version"]


def some(kind: TypeEngine[Any]) -> Any:
    """A value of a column's type; the same everywhere, so that references lead somewhere."""
    if isinstance(kind, DateTime):
        return MOMENT
    if isinstance(kind, JSON):
        return {"kept": [1]}
    if isinstance(kind, LargeBinary):
        return b"\0\xffbytes"
    if isinstance(kind, Boolean):
        return True
    return 7 if isinstance(kind, Integer | Float) else "x"


def add(engine: Engine, table: Table, *many: dict[str, Any], **values: Any) -> None:
    """Put a row in with these values, or a row with each of several."""
    row = {column.name: some(column.type) for column in table.columns if not column.nullable or column.primary_key}
    with for_writing(engine).begin() as connection:
        connection.execute(insert(table), [row | values | each for each in many or ({},)])


def rows(engine: Engine, table: Table) -> list[dict[str, Any]]:
    """A table's rows."""
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(select(table)).mappings()]


def everything(url: str) -> dict[str, Any]:
    """Columns and rows of every table and the revision, the same on both kinds of database."""
    engine = make_engine(url)
    found: dict[str, Any] = {}
    for table in tables_of(engine):
        kept = [{name: _plain(value) for name, value in row.items()} for row in rows(engine, table)]
        found[table.name] = ([column.name for column in table.columns], sorted(kept, key=str))
    if found:
        with engine.connect() as connection:
            found["revision"] = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    engine.dispose()
    return found


def _plain(value: Any) -> Any:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value
