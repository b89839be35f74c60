"""The database goes away, is full, locked or read-only: nobody is told of a record that is not there, and it goes on."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from sqlmodel import select

from common.errors import Unavailable
from coordinator.store import engines, tables
from coordinator.store.database import Store
from coordinator.store.migrate import upgrade
from luthier.v1 import job_pb2, job_pb2_grpc
from tests.support.coordinator_process import TOKEN, CoordinatorProcess
from tests.support.postgres import Postgres

PARENT = "projects/default"
KEY = [("authorization", f"Bearer {TOKEN}")]
Fresh = Callable[..., CoordinatorProcess]


class Submitters:
    """Threads that submit jobs without end and without retries, and remember what they were told."""

    def __init__(self, address: str, threads: int = 4) -> None:
        self.acknowledged: dict[str, str] = {}
        self.when: list[float] = []
        self.errors: list[grpc.RpcError] = []
        self._stop = threading.Event()
        self._address = address
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Submitters:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self._address, options=options) as channel:
            while not self._stop.is_set():
                request_id = uuid.uuid4().hex
                try:
                    self.acknowledged[request_id] = submit(channel, request_id).uid
                    self.when.append(time.monotonic())
                except grpc.RpcError as error:
                    self.errors.append(error)
                    time.sleep(0.02)

    def wait_for(self, more: int, seconds: float = 30.0) -> None:
        """Until so many more are acknowledged."""
        wanted, deadline = len(self.when) + more, time.monotonic() + seconds
        while len(self.when) < wanted:
            assert time.monotonic() < deadline, f"{wanted - len(self.when)} of {more} still missing; {self.errors[-1:]}"
            time.sleep(0.02)


def submit(channel: grpc.Channel, request_id: str = "", timeout: float = 20.0) -> job_pb2.Job:
    job = job_pb2.Job(import_model={"source": "builtin:tiny", "output_model": "m"})  # type: ignore[arg-type]
    request = job_pb2.CreateJobRequest(parent=PARENT, job=job, request_id=request_id)
    return job_pb2_grpc.JobServiceStub(channel).CreateJob(request, metadata=KEY, timeout=timeout).job


def refused(channel: grpc.Channel, request_id: str = "") -> str:
    """What a submission is told that cannot be recorded."""
    with pytest.raises(grpc.RpcError) as caught:
        submit(channel, request_id)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, caught.value
    said = caught.value.details()
    assert "nothing was recorded" in said or "does not answer" in said
    assert "INSERT INTO" not in said
    assert "\n" not in said
    return said


def recorded(url: str) -> dict[str, str]:
    """Jobs by request id, as the database has them."""
    store = Store(url)
    try:
        rows = store.read_now(lambda session: session.exec(select(tables.Job)).all())
    finally:
        store.close()
    return {row.request_id or "": row.uid for row in rows}


def fits(submitters: Submitters, url: str) -> None:
    """What was acknowledged is there, as it was acknowledged; every refusal was UNAVAILABLE, in a plain sentence."""
    there = recorded(url)
    assert submitters.acknowledged
    assert {request_id: there.get(request_id) for request_id in submitters.acknowledged} == submitters.acknowledged
    assert {error.code() for error in submitters.errors} <= {grpc.StatusCode.UNAVAILABLE}
    for error in submitters.errors:
        assert re.match(r"the store (does not|was lost)", error.details()), error.details()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Fresh]:
    made: list[CoordinatorProcess] = []

    def make(home: Path | None = None, **settings: str) -> CoordinatorProcess:
        made.append(CoordinatorProcess(home or tmp_path / f"home{len(made)}", **settings))
        return made[-1]

    yield make
    for process in made:
        process.kill()


@pytest.fixture
def channel() -> Iterator[Callable[[CoordinatorProcess], grpc.Channel]]:
    with contextlib.ExitStack() as stack:
        yield lambda process: stack.enter_context(grpc.insecure_channel(process.address, options=[("grpc.enable_retries", 0)]))


def test_what_was_acknowledged_is_there_after_a_kill(store_url: str) -> None:
    upgrade_here(store_url)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.store_writer", store_url, "20"], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    acknowledged = done.stdout.split()
    assert {line.partition("-")[0] for line in acknowledged} == {str(number) for number in range(20)}
    store = Store(store_url)
    there = set(store.read_now(lambda session: session.exec(select(tables.StackFact.key)).all()))
    store.close()
    assert set(acknowledged) <= there


def upgrade_here(url: str) -> None:
    engine = engines.make_engine(url)
    upgrade(engine)
    engine.dispose()


@pytest.mark.postgres
def test_killed_backends_lose_nothing_and_cost_little(fresh: Fresh, postgres: Postgres, postgres_url: str) -> None:
    process = fresh(store_url=postgres_url).start()
    killed = 0
    with Submitters(process.address) as submitters:
        submitters.wait_for(20)
        for _ in range(10):
            killed += postgres.terminate_backends(postgres_url.rpartition("/")[2])
            submitters.wait_for(10)
    assert killed >= 10
    fits(submitters, postgres_url)
    # A connection that was lost in a pool or before the commit is replaced without anybody noticing.
    assert len(submitters.errors) <= killed


@pytest.mark.postgres
def test_a_crash_of_the_server_is_survived(fresh: Fresh, postgres: Postgres, postgres_url: str, channel: Callable) -> None:  # type: ignore[type-arg]
    process = fresh(store_url=postgres_url).start()
    with Submitters(process.address) as submitters:
        submitters.wait_for(20)
        postgres.halt(signal.SIGQUIT)
        try:
            time.sleep(0.5)
            started = time.monotonic()
            assert "refused" in refused(channel(process))
            assert time.monotonic() - started < 5
        finally:
            postgres.start()
        submitters.wait_for(20)
    fits(submitters, postgres_url)
    assert "Traceback" not in process.log()


@pytest.mark.chaos
@pytest.mark.postgres
def test_after_a_restart_the_rate_is_what_it_was(fresh: Fresh, postgres: Postgres, postgres_url: str) -> None:
    process, beside = fresh(store_url=postgres_url).start(), fresh().start()
    with Submitters(process.address) as submitters, Submitters(beside.address) as control:
        submitters.wait_for(50)
        control.wait_for(50)

        def share(windows: int = 1) -> tuple[int, int]:
            # Beside a second coordinator that nothing happens to: whatever else this machine does slows both.
            start = len(submitters.when), len(control.when)
            time.sleep(2.0 * windows)
            return len(submitters.when) - start[0], len(control.when) - start[1]

        ours, others = share(windows=3)
        before = ours / others
        postgres.halt(signal.SIGQUIT)
        time.sleep(2.0)
        postgres.start()
        up = time.monotonic()
        counts: list[tuple[int, int]] = []
        after: list[float] = []
        while time.monotonic() < up + 30 and max(after, default=0.0) < 0.95 * before:
            counts.append(share())
            if len(counts) >= 3:
                after.append(sum(ours for ours, _ in counts[-3:]) / max(sum(others for _, others in counts[-3:]), 1))
    fits(submitters, postgres_url)
    assert max(after) >= 0.95 * before, f"{before} before, {after} after"


@pytest.mark.postgres
def test_a_connection_that_was_lost_in_the_pool_is_replaced(postgres: Postgres, postgres_url: str) -> None:
    store = Store(postgres_url)
    try:
        for number in range(3):
            store.write_now(lambda session, key=f"k{number}": session.add(tables.StackFact(key=key, value="")))  # type: ignore[misc]
            assert len(store.read_now(lambda session: session.exec(select(tables.StackFact)).all())) == number + 1
            assert postgres.terminate_backends(postgres_url.rpartition("/")[2]) >= 1
            assert len(store.read_now(lambda session: session.exec(select(tables.StackFact)).all())) == number + 1
            postgres.terminate_backends(postgres_url.rpartition("/")[2])
    finally:
        store.close()


@pytest.mark.postgres
def test_no_free_connection_is_told_and_got_over(
    fresh: Fresh, postgres: Postgres, postgres_url: str, channel: Callable[[CoordinatorProcess], grpc.Channel]
) -> None:
    process = fresh(store_url=postgres_url).start()
    database = postgres_url.rpartition("/")[2]
    line = channel(process)
    submit(line, "first")
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE {database} CONNECTION LIMIT 0")
        postgres.terminate_backends(database)
        assert "too many connections" in refused(line, "second")
        connection.execute(f"ALTER DATABASE {database} CONNECTION LIMIT -1")
    submit(line, "second")
    assert recorded(postgres_url).keys() == {"first", "second"}


@pytest.mark.postgres
def test_a_server_that_takes_no_writes_still_answers_reads(
    fresh: Fresh, postgres: Postgres, postgres_url: str, channel: Callable[[CoordinatorProcess], grpc.Channel]
) -> None:
    process = fresh(store_url=postgres_url).start()
    database = postgres_url.rpartition("/")[2]
    line = channel(process)
    job = submit(line, "first")
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        postgres.terminate_backends(database)
        assert "read-only" in refused(line, "second")
        stub = job_pb2_grpc.JobServiceStub(line)
        assert stub.GetJob(job_pb2.GetJobRequest(name=job.name), metadata=KEY, timeout=10).job.uid == job.uid
        connection.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
        postgres.terminate_backends(database)
    submit(line, "second")
    assert recorded(postgres_url).keys() == {"first", "second"}


def test_a_pool_without_a_free_connection_is_told(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PATIENCE_SECONDS", 0.2)
    upgrade_here(store_url)
    store = Store(store_url)
    try:
        with contextlib.ExitStack() as held:
            for _ in range(engines.READERS + 2):
                held.enter_context(store.engine.connect())
            with pytest.raises(Unavailable, match="every connection is in use"):
                store.read_now(lambda session: session.get(tables.StackFact, "x"))
            with pytest.raises(Unavailable, match="every connection is in use"):
                store.write_now(lambda session: session.add(tables.StackFact(key="x", value="")))
        assert store.read_now(lambda session: session.get(tables.StackFact, "x")) is None
        store.write_now(lambda session: session.add(tables.StackFact(key="x", value="")))
    finally:
        store.close()


def test_a_locked_file_is_told_and_got_over(
    fresh: Fresh, tmp_path: Path, channel: Callable[[CoordinatorProcess], grpc.Channel]
) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}?timeout=0.3"
    process = fresh(store_url=url).start()
    line = channel(process)
    submit(line, "first")
    with contextlib.closing(sqlite3.connect(tmp_path / "records.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with Submitters(process.address, threads=16) as submitters:
            assert "database is locked" in refused(line, "second")
            time.sleep(1.0)
        # Those who wait together wait once: no queue of patience builds up behind the lock.
        assert time.monotonic() - started < 6
        assert len(submitters.errors) >= 16
        assert submitters.acknowledged == {}
        other.execute("ROLLBACK")
    submit(line, "second")
    assert recorded(url).keys() == {"first", "second"}


@contextlib.contextmanager
def full_disk(_process: CoordinatorProcess, folder: Path) -> Iterator[None]:
    """Fill the file system to the last byte."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
    yield
    filler.unlink()


@contextlib.contextmanager
def no_file_may_grow(process: CoordinatorProcess, folder: Path) -> Iterator[None]:
    """Set the kernel's limit on the size of files where they are now."""
    assert process.process is not None
    size = max(file.stat().st_size for file in folder.glob("records.db*"))
    _, hard = resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture(params=[full_disk, no_file_may_grow])
def trouble(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Callable, Path]]:  # type: ignore[type-arg]
    """A way to run out of space, and the folder in which that will happen."""
    if request.param is no_file_may_grow:
        yield request.param, tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="lt-full-") as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip("a small file system of its own cannot be mounted here (needs root)")
        try:
            yield request.param, Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_no_space_left_is_told_and_got_over(
    fresh: Fresh,
    trouble: tuple[Callable, Path],
    channel: Callable[[CoordinatorProcess], grpc.Channel],  # type: ignore[type-arg]
) -> None:
    out_of_space, folder = trouble
    url = f"sqlite:///{folder / 'records.db'}"
    process = fresh(store_url=url).start()
    line = channel(process)
    submit(line, "first")
    with Submitters(process.address) as submitters:
        submitters.wait_for(5)
        with out_of_space(process, folder):
            submitters.errors.clear()
            deadline = time.monotonic() + 20
            while len(submitters.errors) < 8 and time.monotonic() < deadline:
                time.sleep(0.05)
        submitters.wait_for(10)
    assert submitters.errors
    fits(submitters, url)
    # The answers hold across a crash too: what SQLite said was not written is not in its log either.
    process.kill()
    process.start()
    fits(submitters, url)
    assert "Traceback" not in process.log()


def test_a_read_only_file_is_told(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    upgrade_here(url)
    writable = Store(url)
    writable.write_now(lambda session: session.add(tables.StackFact(key="kept", value="")))
    store = Store(f"sqlite:///file:{tmp_path / 'records.db'}?mode=ro&uri=true")
    try:
        with pytest.raises(Unavailable, match="readonly database"):
            store.write_now(lambda session: session.add(tables.StackFact(key="x", value="")))
        assert store.read_now(lambda session: session.get(tables.StackFact, "kept")) is not None
    finally:
        store.close()
        writable.close()


def test_a_database_that_is_away_is_one_line_at_the_start(fresh: Fresh) -> None:
    process = fresh(store_url="postgresql+psycopg://nobody:secret@127.0.0.1:1/x")
    done = subprocess.run(
        [sys.executable, "-m", "coordinator"], env=process.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "the store does not take this now" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
