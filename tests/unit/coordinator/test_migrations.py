"""A store that has data in it is brought up to date, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from common.errors import FailedPrecondition, Internal
from coordinator.store import migrate
from coordinator.store.engines import for_writing, make_engine
from coordinator.store.migrate import upgrade
from tests.support.some_rows import MOMENT, add, empty_database, rows, tables_of
from tests.support.some_rows import everything as contents


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database, unlike what the other tests get."""
    with empty_database(request, request.param, tmp_path) as url:
        engine = make_engine(url)
        yield engine
        engine.dispose()


both = pytest.mark.parametrize("engine", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)], indirect=True)


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


WIDENS = """
    rebuilt = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("project", recreate=rebuilt) as batch:
        batch.add_column(sa.Column("colour", sa.String(), nullable=False, server_default="red"))
    op.create_table("paint", sa.Column("colour", sa.String(), primary_key=True))
"""
BREAKS = """
    op.create_table("brush", sa.Column("width", sa.Integer(), primary_key=True))
    op.execute("UPDATE project SET display_name = 'half done'")
    op.execute("DELETE FROM no_such_table")
"""
ORPHANS = """
    op.execute("DELETE FROM project")
"""


def everything(engine: Engine) -> dict[str, Any]:
    """All that is in a database."""
    return contents(engine.url.render_as_string(hide_password=False))


def filled(engine: Engine) -> dict[str, Any]:
    """Bring a database to the present schema, with a project and a job in it."""
    upgrade(engine)
    tables = {table.name: table for table in tables_of(engine)}
    add(engine, tables["project"], id="a")
    add(engine, tables["job"], uid="one", project_id="a", job_id="one", request_id="one")
    return everything(engine)


@both
def test_a_store_that_a_newer_version_has_written_is_left_alone(engine: Engine) -> None:
    filled(engine)
    with for_writing(engine).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '4711'")
    before = everything(engine)
    with pytest.raises(FailedPrecondition) as refused:
        upgrade(engine)
    message = refused.value.message
    assert f"has schema 4711, and this version of Luthier ({version('luthier')}) knows those up to {migrate.head()}" in message
    assert "\n" not in message
    assert everything(engine) == before


@both
def test_a_migration_that_fails_half_way_takes_back_those_before_it(engine: Engine, later: Callable[..., None]) -> None:
    before = filled(engine)
    later(WIDENS, BREAKS)
    with pytest.raises(Internal, match=r"schema next_2 failed \(.*no_such_table.*the store is as it was"):
        upgrade(engine)
    assert everything(engine) == before
    assert copies(engine) == []


def test_sqlite_finds_out_that_a_migration_leaves_references_to_nothing(tmp_path: Path, later: Callable[..., None]) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'records.db'}")
    before = filled(engine)
    later(ORPHANS)
    with pytest.raises(Internal, match="rows of job would refer to nothing in project"):
        upgrade(engine)
    assert everything(engine) == before
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    engine.dispose()


@both
def test_a_table_that_others_refer_to_is_rebuilt_and_sqlite_keeps_a_copy(
    engine: Engine, later: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    before = filled(engine)
    later(WIDENS)
    with caplog.at_level("INFO"):
        upgrade(engine)
    after = everything(engine)
    assert after["revision"] == "next_1"
    assert after["job"] == before["job"]
    assert after["project"][1] == [row | {"colour": "red"} for row in before["project"][1]]
    if engine.url.get_backend_name() == "postgresql":
        assert "PostgreSQL is not copied for that" in caplog.text
        return
    (copy,) = copies(engine)
    assert copy.name == "records.db.before-next_1"
    assert str(copy) in caplog.text
    assert copy.stat().st_mode & 0o777 == 0o600
    kept = make_engine(f"sqlite:///{copy}")
    assert everything(kept) == before
    kept.dispose()


def test_no_copy_is_made_of_nothing_nor_over_an_earlier_one_nor_where_there_is_no_room(
    tmp_path: Path, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'records.db'}")
    before = filled(engine)
    assert copies(engine) == []
    later(WIDENS)
    earlier = tmp_path / "records.db.before-next_1"
    earlier.write_text("of another time")
    with monkeypatch.context() as patch:
        patch.setattr(migrate.os, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FailedPrecondition, match=r"cannot be copied to .*No space left"):
            upgrade(engine)
    assert everything(engine) == before
    upgrade(engine)
    assert {copy.name for copy in copies(engine)} == {earlier.name, f"{earlier.name}-2"}
    assert earlier.read_text() == "of another time"
    engine.dispose()


def copies(engine: Engine) -> list[Path]:
    if engine.url.get_backend_name() != "sqlite":
        return []
    path = Path(str(engine.url.database))
    return sorted(path.parent.glob(f"{path.name}.before-*"))
