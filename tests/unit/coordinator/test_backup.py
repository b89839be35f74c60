"""A backup is one state of the records, goes into a database of either kind, and is there whole or not at all."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, SQLModel, select

from common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from common.settings import Settings
from coordinator.offline import back_up, put_back
from coordinator.services import backups
from coordinator.services.backups import BackupCalls
from coordinator.store import migrate, tables
from coordinator.store.backup import dump
from coordinator.store.database import Store
from coordinator.store.engines import make_engine
from coordinator.store.migrate import upgrade
from coordinator.store.restore import RESTORED, restore
from tests.support.some_rows import add, empty_database, everything, tables_of

NewJob = Callable[..., tables.Job]

TO = ("sqlite", pytest.param("postgresql", marks=pytest.mark.postgres))


@pytest.fixture(params=TO)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database to restore into, of either kind."""
    folder = tmp_path / "target"
    folder.mkdir()
    with empty_database(request, request.param, folder) as url:
        yield url


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "records.backup"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """URL of an SQLite store with a row in every table."""
    url = f"sqlite:///{tmp_path / 'source.db'}"
    engine = make_engine(url)
    upgrade(engine)
    for table in tables_of(engine):
        add(engine, table)
    engine.dispose()
    return url


def backed_up(url: str, path: Path) -> Path:
    engine = make_engine(url)
    with path.open("w+b") as file:
        dump(engine, file)
    engine.dispose()
    return path


def comparable(url: str) -> dict[str, Any]:
    """What a restored store has to have in common with the one it comes from."""
    found = everything(url)
    del found["leader"]
    names, facts = found["stack_fact"]
    found["stack_fact"] = names, [fact for fact in facts if fact["key"] != RESTORED]
    for run in found["job_run"][1]:
        del run["create_time"]
    return found


def test_every_row_of_every_table_comes_back_in_a_database_of_either_kind(store_url: str, target: str, file: Path) -> None:
    engine = make_engine(store_url)
    upgrade(engine)
    for table in tables_of(engine):
        add(engine, table)
        if table.name == "job_log":
            # More than are read at once, and whatever a line may hold.
            add(engine, table, *({"sequence": n, "message": f'"{n}"\n\t\\u0000 ü \N{GRINNING FACE}'} for n in range(8, 1300)))
    engine.dispose()
    manifest = json.loads(zipfile.ZipFile(backed_up(store_url, file)).read("manifest.json"))
    assert {name: part["rows"] for name, part in manifest["parts"].items()} == {
        name: 1293 if name == "job_log" else 1 for name in SQLModel.metadata.tables
    }
    restore(target, file)
    assert comparable(target) == comparable(store_url)


def test_rows_that_postgresql_counts_go_on_where_they_were(source: str, target: str, file: Path) -> None:
    restore(target, backed_up(source, file))
    store = Store(target)

    def work(session: Session) -> int | None:
        metric = tables.Metric(job_uid="x", run=1, step=1, time=tables.now())
        session.add(metric)
        session.flush()
        return metric.id

    assert store.write_now(work) == 8  # the one that was restored has 7
    store.close()


def test_what_is_written_meanwhile_is_in_it_whole_or_not_at_all(
    store: Store, store_url: str, target: str, new_job: NewJob, file: Path
) -> None:
    before = new_job()
    made: list[tables.Job] = []

    def told(_done: int, _total: int) -> None:
        made.append(new_job())

    with file.open("w+b") as written:
        dump(store.engine, written, told)
    assert len(made) > 3
    restore(target, file)
    other = Store(target)
    jobs = other.read_now(lambda session: session.exec(select(tables.Job.uid)).all())
    events = other.read_now(lambda session: session.exec(select(tables.JobEvent.job_uid)).all())
    assert jobs == events == [before.uid]
    other.close()


def test_a_file_that_was_cut_off_or_changed_is_refused_and_leaves_nothing(source: str, tmp_path: Path, file: Path) -> None:
    whole = backed_up(source, file).read_bytes()
    fresh = tmp_path / "fresh" / "luthier.db"
    chance = random.Random(5)
    cut = [whole[:length] for length in (0, 1, 64, 100, len(whole) // 2, len(whole) - 64, len(whole) - 1)]
    flipped = []
    for position in [0, len(whole) - 1, len(whole) - 64, len(whole) - 65, *(chance.randrange(len(whole)) for _ in range(60))]:
        bits = bytearray(whole)
        bits[position] ^= 1 << chance.randrange(8)
        flipped.append(bytes(bits))
    for damaged in (*cut, *flipped, whole + b"x", b"something else" * 20):
        file.write_bytes(damaged)
        with pytest.raises(InvalidArgument, match=r"is damaged|is no backup"):
            restore(f"sqlite:///{fresh}", file)
    assert not list(fresh.parent.glob("*"))
    file.write_bytes(whole)
    restore(f"sqlite:///{fresh}", file)
    assert comparable(f"sqlite:///{fresh}") == comparable(source)


@pytest.mark.parametrize("spoil", ["rows", "sha256"])
def test_a_part_that_is_not_what_the_manifest_says_is_refused_with_all_the_others(
    source: str, target: str, file: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    """As if whoever wrote it had made a mistake: the file as a whole is sealed."""
    from coordinator.store import backup

    asdict = backup.asdict

    def spoilt(manifest: Any) -> dict[str, Any]:
        content = asdict(manifest)
        content["parts"]["trial"][spoil] = 2 if spoil == "rows" else "0" * 64
        return content

    monkeypatch.setattr(backup, "asdict", spoilt)
    backed_up(source, file)
    with pytest.raises(InvalidArgument, match=r"tables/trial.jsonl of the backup is damaged"):
        restore(target, file)
    assert everything(target) == {}


def test_a_restore_that_ends_half_way_leaves_nothing(source: str, target: str, file: Path) -> None:
    backed_up(source, file)

    def told(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(target, file, told)
    assert everything(target) == {}
    restore(target, file)
    assert comparable(target) == comparable(source)


def test_a_restore_that_is_killed_leaves_nothing_in_the_way_of_the_next(source: str, target: str, file: Path) -> None:
    backed_up(source, file)
    die = "lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total // 2 else None"
    code = "import os, signal; from pathlib import Path; from coordinator.store.restore import restore; "
    code += f"restore({target!r}, Path({str(file)!r}), {die})"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -signal.SIGKILL
    assert everything(target) == {}
    restore(target, file)
    assert comparable(target) == comparable(source)


def test_a_store_that_is_not_empty_is_left_alone(store: Store, store_url: str, new_job: NewJob, source: str, file: Path) -> None:
    new_job()
    before = everything(store_url)
    with pytest.raises(
        FailedPrecondition, match=r"is not empty \(it has 1 jobs\).*(--home|--store-url).*Nothing was changed"
    ) as refused:
        restore(store_url, backed_up(source, file))
    assert "secret" not in refused.value.message
    assert everything(store_url) == before


def test_an_older_backup_is_brought_up_to_date_and_a_newer_one_refused(
    source: str, target: str, file: Path, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = migrate.MIGRATIONS
    backed_up(source, file)
    later('op.add_column("project", sa.Column("colour", sa.String(), nullable=False, server_default="red"))')
    restore(target, file)
    after = everything(target)
    assert after["revision"] == "next_1"
    assert [row["colour"] for row in after["project"][1]] == ["red"]
    newer = backed_up(target, file.with_name("newer"))
    monkeypatch.setattr(migrate, "MIGRATIONS", known)
    with pytest.raises(FailedPrecondition, match=rf"has schema next_1 .*knows those up to {migrate.head()}"):
        restore(f"sqlite:///{file.parent / 'other.db'}", newer)
    assert not (file.parent / "other.db").exists()
    with pytest.raises(FailedPrecondition, match="back it up with the version that runs on it"):
        backed_up(target, file.with_name("of another version"))


def test_offline_it_is_private_whole_and_never_written_over(source: str, tmp_path: Path, file: Path) -> None:
    said: list[dict[str, Any]] = []
    back_up(Settings(home=tmp_path / "a", store_url=source), file, said.append)
    assert file.stat().st_mode & 0o777 == 0o600
    assert said[-1]["rows"]["job"] == 1
    with pytest.raises(InvalidArgument, match="there is a file"):
        back_up(Settings(home=tmp_path / "a", store_url=source), file, said.append)
    with pytest.raises(FailedPrecondition, match="there is no store"):
        back_up(Settings(home=tmp_path / "b"), file.with_name("other"), said.append)
    put_back(Settings(home=tmp_path / "b"), file, said.append)
    assert said[-1]["restored"] == f"sqlite:///{tmp_path / 'b' / 'luthier.db'}"
    assert (tmp_path / "b" / "luthier.db").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in file.parent.iterdir() if "backup" in path.name} == {file.name}


async def test_a_disk_without_room_for_it_is_said(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backups, "dump", full)
    calls = BackupCalls()
    calls._store, calls._home = store, tmp_path
    with pytest.raises(ResourceExhausted, match=f"cannot write the backup to {tmp_path}, from where it is sent: No space left"):
        _ = [part async for part in calls.BackupRecords(None, None)]  # type: ignore[arg-type]


async def test_one_backup_at_a_time_and_one_that_is_given_up_makes_room(store: Store, tmp_path: Path) -> None:
    calls = BackupCalls()
    calls._store, calls._home = store, tmp_path
    first: Any = calls.BackupRecords(None, None)  # type: ignore[arg-type]
    await anext(first)
    with pytest.raises(Exception, match="another backup is being made"):
        await anext(calls.BackupRecords(None, None))  # type: ignore[arg-type]
    await first.aclose()
    parts = [part async for part in calls.BackupRecords(None, None)]  # type: ignore[arg-type]
    received = b"".join(part.chunk for part in parts)
    (summary,) = [part.summary for part in parts if part.WhichOneof("part") == "summary"]
    assert len(received) == summary.size_bytes
    assert zipfile.ZipFile(io.BytesIO(received)).testzip() is None
    assert not [name for name in os.listdir(tmp_path) if name.startswith("tmp")]
