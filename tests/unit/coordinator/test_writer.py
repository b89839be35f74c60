"""Writes that wait together share a commit, and nothing else: not their errors, and not an answer before its time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, select

from common.errors import FailedPrecondition, Unavailable
from coordinator.jobs import create, report
from coordinator.store import tables, writer
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2

NewJob = Callable[..., tables.Job]


def put(key: str, value: str = "") -> Callable[[Session], str]:
    def work(session: Session) -> str:
        session.add(tables.StackFact(key=key, value=value))
        return key

    return work


def append(key: str, word: str) -> Callable[[Session], None]:
    """Read, then write: what is lost where two do it at the same time."""

    def work(session: Session) -> None:
        row = session.get_one(tables.StackFact, key)
        row.value = f"{row.value} {word}"
        session.add(row)

    return work


def add_one(session: Session) -> None:
    row = session.get_one(tables.StackFact, "counter")
    row.value = str(int(row.value) + 1)
    session.add(row)


def facts(store: Store) -> dict[str, str]:
    rows = store.read_now(lambda session: session.exec(select(tables.StackFact)).all())
    return {row.key: row.value for row in rows}


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """How groups form must not hang on how fast this machine is just now."""
    monkeypatch.setattr(writer, "GROUP_SECONDS", 30.0)


@contextmanager
def held(store: Store) -> Iterator[None]:
    """Keep the writer busy, so that what is written inside waits together; let go at the end."""
    busy, go = threading.Event(), threading.Event()

    def work(_session: Session) -> None:
        busy.set()
        go.wait(20)
        raise FailedPrecondition("leaves nothing, so that what waited is first in its transaction")

    def write() -> None:
        with pytest.raises(FailedPrecondition):
            store.write_now(work)

    thread = threading.Thread(target=write)
    thread.start()
    busy.wait(20)
    try:
        yield
    finally:
        go.set()
    thread.join()


@contextmanager
def commits(store: Store, before: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Count commits; `before` runs first in each."""
    seen: list[int] = []

    def note(_connection: Any) -> None:
        seen.append(1)
        before()

    event.listen(store.engine, "commit", note)
    yield seen
    event.remove(store.engine, "commit", note)


async def written(store: Store, works: list[Callable[[Session], Any]]) -> list[Any]:
    """Write all at once, in a group where they fit one; results and errors in order."""
    with held(store):
        tasks = [asyncio.ensure_future(store.write(work)) for work in works]
        await asyncio.sleep(0)  # every task queues what it writes
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_waits_together_shares_a_commit(store: Store) -> None:
    with commits(store) as seen:
        await written(store, [put(f"k{number}") for number in range(40)])
    assert len(seen) == 1
    assert len([key for key in facts(store) if key.startswith("k")]) == 40


async def test_a_group_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "GROUP", 10)
    with commits(store) as seen:
        await written(store, [put(f"k{number}") for number in range(40)])
    assert len(seen) == 5  # with the one that kept the writer busy, 41


@pytest.mark.parametrize("place", [0, 3, 9])
async def test_one_that_raises_takes_back_its_own_changes_only(store: Store, place: int) -> None:
    def bad(session: Session) -> None:
        session.add(tables.StackFact(key="bad", value=""))
        session.flush()
        raise FailedPrecondition("not now")

    works: list[Callable[[Session], Any]] = [put(f"k{number}") for number in range(10)]
    works[place] = bad
    results = await written(store, works)
    assert isinstance(results[place], FailedPrecondition)
    assert [result for result in results if result is not results[place]] == [f"k{n}" for n in range(10) if n != place]
    assert facts(store).keys() >= {f"k{number}" for number in range(10) if number != place}
    assert "bad" not in facts(store)


async def test_one_that_breaks_a_constraint_spoils_it_for_nobody(store: Store) -> None:
    results = await written(store, [put("a"), put("secret"), put("b")])
    assert (results[0], results[2]) == ("a", "b")
    assert type(results[1]).__name__ == "IntegrityError"
    assert facts(store).keys() >= {"a", "b"}


async def test_a_fault_of_the_database_is_answered_to_him_whom_it_hit(store: Store) -> None:
    def unlucky(session: Session) -> None:
        session.add(tables.StackFact(key="unlucky", value=""))
        raise OperationalError("SELECT", {}, Exception("out of shared memory"))

    results = await written(store, [put("a"), unlucky, put("b")])
    assert (results[0], results[2]) == ("a", "b")
    assert isinstance(results[1], Unavailable)
    assert "out of shared memory); nothing was recorded" in results[1].message
    assert facts(store).keys() >= {"a", "b"}
    assert "unlucky" not in facts(store)


async def test_writes_run_in_order_of_arrival(store: Store) -> None:
    store.write_now(put("log"))
    await written(store, [append("log", str(number)) for number in range(150)])
    assert facts(store)["log"].split() == [str(number) for number in range(150)]


async def test_a_result_is_what_it_was_when_its_own_function_returned(store: Store, new_job: NewJob) -> None:
    job = new_job()

    def raise_priority(session: Session) -> tables.Job:
        row = session.get_one(tables.Job, job.uid)
        row.priority += 1
        session.add(row)
        session.flush()
        return row

    def forget(session: Session) -> None:
        session.get_one(tables.Job, job.uid)
        session.expire_all()
        raise FailedPrecondition("no")

    first, _, second = await written(store, [raise_priority, forget, raise_priority])
    assert (first.priority, second.priority) == (1, 2)


async def test_nobody_is_answered_before_the_commit(store: Store) -> None:
    committing, go = threading.Event(), threading.Event()

    def wait() -> None:
        committing.set()
        go.wait(20)

    with commits(store, wait):
        tasks = [asyncio.ensure_future(store.write(put(f"k{number}"))) for number in range(3)]
        await asyncio.to_thread(committing.wait, 20)
        await asyncio.sleep(0.05)
        assert [task.done() for task in tasks] == [False] * 3
        assert "k0" not in facts(store)
        go.set()
        assert await asyncio.gather(*tasks) == ["k0", "k1", "k2"]


async def test_a_commit_that_fails_fails_everybody_in_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def broken(_connection: Any) -> None:
            raise store.engine.dialect.dbapi.OperationalError("disk I/O error")  # type: ignore[union-attr]

        patch.setattr(writer, "ASK_SECONDS", 0.3)
        patch.setattr(store.engine.dialect, "do_commit", broken)
        results = await asyncio.gather(*(store.write(put(f"k{n}")) for n in range(5)), return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results), results
    assert "disk I/O error" in str(results[0])
    assert not [key for key in facts(store) if key.startswith("k")]
    assert await store.write(put("after")) == "after"


def test_two_hundred_writers_lose_no_update(store: Store) -> None:
    store.write_now(put("counter", "0"))
    with ThreadPoolExecutor(200) as pool:
        for done in [pool.submit(store.write_now, add_one) for _ in range(400)]:
            done.result()
    assert facts(store)["counter"] == "400"


def test_two_coordinators_on_one_database_lose_no_update(store: Store) -> None:
    store.write_now(put("counter", "0"))
    other = Store(store.engine.url.render_as_string(hide_password=False))
    try:
        with ThreadPoolExecutor(20) as pool:
            for done in [pool.submit(one.write_now, add_one) for one in (store, other) * 100]:
                done.result()
    finally:
        other.close()
    assert facts(store)["counter"] == "200"


async def test_the_same_request_a_hundred_times_at_once_makes_one_job(store: Store, new_job: NewJob) -> None:
    with ThreadPoolExecutor(100) as pool:
        jobs = [done.result() for done in [pool.submit(new_job, request_id="r1") for _ in range(100)]]
    assert len({job.uid for job in jobs}) == 1
    assert len(store.read_now(lambda session: session.exec(select(tables.JobEvent)).all())) == 1


def test_a_request_that_loses_a_race_finds_the_earlier_job(
    store: Store, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(request_id="r1")
    real, looked = create.earlier, []

    def too_early(session: Session, request: create.Request) -> tables.Job | None:
        looked.append(request)
        return None if len(looked) == 1 else real(session, request)

    monkeypatch.setattr(create, "earlier", too_early)
    assert new_job(request_id="r1").uid == job.uid
    assert len(looked) == 2


async def test_who_gave_up_waiting_is_not_run(store: Store) -> None:
    with held(store):
        kept, given_up = (asyncio.ensure_future(store.write(put(key))) for key in ("kept", "given-up"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
    assert await kept == "kept"
    assert "given-up" not in facts(store)


async def test_more_than_can_wait_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_WAITING", 5)
    results = await written(store, [put(f"k{number}") for number in range(8)])
    assert [isinstance(result, Unavailable) for result in results] == [False] * 5 + [True] * 3
    assert not facts(store).keys() & {"k5", "k6", "k7"}


def test_what_waits_when_the_store_closes_is_recorded(store_url: str, store: Store) -> None:
    other = Store(store_url)
    with ThreadPoolExecutor(11) as pool:
        with held(other):
            done = [pool.submit(other.write_now, put(f"k{number}")) for number in range(10)]
            while other._writer._waiting.qsize() < 10:
                time.sleep(0.01)
            closing = pool.submit(other.close)
        closing.result()
    assert sorted(one.result() for one in done) == sorted(f"k{number}" for number in range(10))
    assert facts(store).keys() >= {f"k{number}" for number in range(10)}
    with pytest.raises(RuntimeError, match="closed"):
        other.write_now(put("late"))


def test_a_zero_byte_in_what_a_process_wrote_stops_nothing(store: Store, new_job: NewJob) -> None:
    job = new_job(labels={"team": "a\0b"})
    line = job_pb2.LogLine(message="bro\0ken", level="info")
    body = agent_pb2.Report(sequence=1, log=agent_pb2.LogReport(lines=[line]))
    request = agent_pb2.ReportRequest(job_uid=job.uid, run=0, source="rank-0", reports=[body])
    store.write_now(lambda session: report._add_log(session, job.uid, 0, "rank-0", request.reports[0]))
    log = store.read_now(lambda session: session.exec(select(tables.JobLog)).one())
    assert log.message in ("bro\0ken", "bro\N{REPLACEMENT CHARACTER}ken")
    labels = tables.Job.labels["team"].as_string()  # type: ignore[index, attr-defined]
    query = select(tables.Job).where(labels == "another")
    assert store.read_now(lambda session: session.exec(query).all()) == []
    assert job_pb2.Job(labels=store.read_now(lambda session: session.get_one(tables.Job, job.uid)).labels).labels["team"]


class Batches:
    """Records items together, and remembers which came together."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, session: Session, items: list[str]) -> list[str | FailedPrecondition]:
        self.seen.append(list(items))
        for item in items:
            put(item)(session)
        session.flush()
        return [FailedPrecondition(item) if item.startswith("refused") else item for item in items]


async def written_together(store: Store, batches: Batches, items: list[str]) -> list[Any]:
    with held(store):
        tasks = [asyncio.ensure_future(store.write_together(batches, item)) for item in items]
        await asyncio.sleep(0)
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_neighbours_are_recorded_by_one_call(store: Store) -> None:
    batches = Batches()
    results = await written_together(store, batches, ["a", "refused", "b"])
    assert batches.seen == [["a", "refused", "b"]]
    assert (results[0], str(results[1]), results[2]) == ("a", "refused", "b")
    assert isinstance(results[1], FailedPrecondition)


async def test_where_together_fails_each_is_recorded_alone(store: Store) -> None:
    batches = Batches()
    results = await written_together(store, batches, ["a", "secret", "b"])  # "secret" is there already
    assert batches.seen[:2] == [["a", "secret", "b"], ["a"]]
    assert (results[0], results[2]) == ("a", "b")
    assert type(results[1]).__name__ == "IntegrityError"
    assert facts(store).keys() >= {"a", "b"}


async def test_what_stands_between_neighbours_keeps_its_place(store: Store) -> None:
    batches = Batches()
    with held(store):
        first = [asyncio.ensure_future(store.write_together(batches, item)) for item in ("a", "b")]
        await asyncio.sleep(0)
        between = asyncio.ensure_future(store.write(append("b", "seen")))
        await asyncio.sleep(0)
        last = asyncio.ensure_future(store.write_together(batches, "c"))
        await asyncio.sleep(0)
    await asyncio.gather(*first, between, last)
    assert batches.seen == [["a", "b"], ["c"]]
    assert facts(store)["b"] == " seen"
