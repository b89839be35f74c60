"""A store that has data in it is brought up to date, and loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import JSON, DateTime, Engine, MetaData, Table, insert, select
from sqlalchemy.types import Float, Integer, TypeEngine

from coordinator.store.engines import for_writing, make_engine
from coordinator.store.migrate import upgrade

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Engine]:
    """An empty database, unlike what the other tests get."""
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        name = server.database()
        engine = make_engine(server.url(name))
        yield engine
        engine.dispose()
        server.drop(name)
    else:
        engine = make_engine(f"sqlite:///{tmp_path / 'records.db'}")
        yield engine
        engine.dispose()


both = pytest.mark.parametrize("engine", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)], indirect=True)


def tables_of(engine: Engine) -> list[Table]:
    found = MetaData()
    found.reflect(engine)
    return [table for table in found.sorted_tables if table.name != "alembic_version"]


def some(kind: TypeEngine[Any]) -> Any:
    """A value of a column's type; the same everywhere, so that references lead somewhere."""
    if isinstance(kind, DateTime):
        return MOMENT
    if isinstance(kind, JSON):
        return {"kept": [1]}
    return 7 if isinstance(kind, Integer | Float) else "x"


def add(engine: Engine, table: Table, **values: Any) -> None:
    row = {column.name: some(column.type) for column in table.columns if not column.nullable or column.primary_key}
    with for_writing(engine).begin() as connection:
        connection.execute(insert(table), row | values)


def rows(engine: Engine, table: Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(select(table)).mappings()]


@both
def test_a_row_in_every_table_of_the_first_schema_is_there_in_the_last(engine: Engine) -> None:
    upgrade(engine, "0001")
    first = tables_of(engine)
    for table in first:
        add(engine, table)
    before = {table.name: rows(engine, table) for table in first}
    upgrade(engine)
    after = {table.name: rows(engine, table) for table in tables_of(engine)}
    assert len(before) >= 15
    for name, kept in before.items():
        assert [{column: row[column] for column in kept[0]} for row in after[name]] == kept, name


@both
def test_events_that_are_there_are_numbered_within_their_project(engine: Engine) -> None:
    upgrade(engine, "0007")
    tables = {table.name: table for table in tables_of(engine)}
    for project in ("a", "b", "empty"):
        add(engine, tables["project"], id=project)
    for uid, project in (("one", "a"), ("two", "a"), ("three", "b")):
        add(engine, tables["job"], uid=uid, project_id=project, job_id=uid, request_id=uid)
    for second, (uid, sequence) in enumerate([("one", 1), ("two", 1), ("three", 1), ("two", 2), ("one", 2), ("three", 2)]):
        add(engine, tables["job_event"], job_uid=uid, sequence=sequence, time=MOMENT.replace(second=second))
    upgrade(engine)
    tables = {table.name: table for table in tables_of(engine)}
    numbers = {
        (row["project_id"], row["project_sequence"]): (row["job_uid"], row["sequence"])
        for row in rows(engine, tables["job_event"])
    }
    of_a = {("a", 1): ("one", 1), ("a", 2): ("two", 1), ("a", 3): ("two", 2), ("a", 4): ("one", 2)}
    assert numbers == of_a | {("b", 1): ("three", 1), ("b", 2): ("three", 2)}
    assert {row["id"]: row["event_sequence"] for row in rows(engine, tables["project"])} == {"a": 4, "b": 2, "empty": 0}
