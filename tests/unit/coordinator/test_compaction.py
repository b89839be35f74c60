"""Old events and log lines go piece by piece, what is left says so, and nobody else's are missed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlmodel import Session, col, select

from common.settings import Settings
from coordinator import compaction
from coordinator.collector import Collector
from coordinator.compaction import FOR_GOOD, Retention
from coordinator.jobs import records
from coordinator.services.feed import look
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import job_pb2
from tests.support.deleting import delete, ended
from tests.support.job_runs import now_of, set_columns

NewJob = Callable[..., tables.Job]
OLD = timedelta(days=31)


def tell(store: Store, job: tables.Job, times: int) -> None:
    warning = job_pb2.JOB_EVENT_TYPE_WARNING
    for number in range(times):
        store.write_now(lambda session, n=number: records.add_event(session, job.uid, warning, f"event {n}"))  # type: ignore[misc]


def write_lines(store: Store, job: tables.Job, count: int) -> None:
    rows = [
        tables.JobLog(job_uid=job.uid, sequence=n, time=tables.now(), run=1, source="rank-0", level="INFO", message=str(n))
        for n in range(1, count + 1)
    ]
    store.write_now(lambda session: session.add_all(rows))
    set_columns(store, job, log_sequence=count)


def events_of(store: Store, job: tables.Job) -> list[int]:
    query = select(tables.JobEvent.sequence).where(tables.JobEvent.job_uid == job.uid)
    return store.read_now(lambda session: sorted(session.exec(query).all()))


def lines_of(store: Store, job: tables.Job) -> list[int]:
    query = select(tables.JobLog.sequence).where(tables.JobLog.job_uid == job.uid)
    return store.read_now(lambda session: sorted(session.exec(query).all()))


def seen_after(store: Store, sequence: int) -> tuple[list[int], int, int, int]:
    found = store.read_now(lambda session: look(session, "default", sequence))
    return [each.sequence for each in found.events], found.seen, found.holes, found.compacted


async def test_of_a_job_that_ended_long_ago_the_last_event_stays(
    store: Store, collector: Collector, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "ROWS", 4)
    old, recent, running = new_job(), new_job(), new_job()
    for job in (old, recent, running):
        tell(store, job, 10)
    ended(store, old, ago=OLD)
    ended(store, recent, ago=timedelta(days=29))
    await collector.round()
    assert events_of(store, old) == [11]
    assert events_of(store, recent) == events_of(store, running) == list(range(1, 12))
    assert now_of(store, old).events_compacted == 10
    assert now_of(store, old).version == old.version + 10  # those of its own events: nobody changed the job
    # The last that went was number 12 of the project: 3 jobs were made, then the old one told 10 times.
    assert seen_after(store, 0) == ([2, 3, *range(13, 34)], 33, 12, 12)
    await collector.round()
    assert events_of(store, old) == [11]


async def test_a_kill_between_two_pieces_is_made_good(
    store: Store, collector: Collector, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "ROWS", 3)
    job = new_job()
    tell(store, job, 10)
    ended(store, job, ago=OLD)
    store.write_now(lambda session: compaction.compact_events(session, [job.uid]))
    assert events_of(store, job) == list(range(4, 12))
    assert seen_after(store, 0)[1:] == (11, 3, 3)
    await collector.round()
    assert events_of(store, job) == [11]


async def test_events_of_a_deleted_job_are_passed_over_and_those_of_others_are_not(
    store: Store, collector: Collector, new_job: NewJob
) -> None:
    first, gone, last = new_job(), new_job(), new_job()
    for job in (first, gone, last):
        tell(store, job, 1)
    ended(store, gone)
    delete(store, gone)
    await collector.round()
    # 1 to 3 are the jobs, 4 to 6 what was told of each.
    assert seen_after(store, 0) == ([1, 3, 4, 6], 6, 5, 0)
    assert seen_after(store, 4) == ([6], 6, 5, 0)


async def test_what_is_looked_at_is_told_where_the_newest_events_are_gone(
    store: Store, collector: Collector, new_job: NewJob
) -> None:
    new_job()
    gone = new_job()
    ended(store, gone)
    delete(store, gone)
    await collector.round()
    assert seen_after(store, 1) == ([], 2, 2, 0)


async def test_log_lines_go_when_they_are_too_many_or_too_old(
    store: Store, collector: Collector, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "ROWS", 7)
    collector._retention = Retention(log_lines=30)
    many, few, old = new_job(), new_job(), new_job()
    for job, count in ((many, 50), (few, 30), (old, 20)):
        write_lines(store, job, count)
    ended(store, old, ago=timedelta(days=91))
    await collector.round()
    assert lines_of(store, many) == list(range(21, 51))
    assert lines_of(store, few) == list(range(1, 31))
    assert lines_of(store, old) == []
    compacted = [now_of(store, job).logs_compacted for job in (many, few, old)]
    assert compacted == [20, 0, 20]


def test_a_piece_is_no_larger_than_it_may_be(store: Store, new_job: NewJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "ROWS", 5)
    jobs = [new_job() for _ in range(3)]
    for job in jobs:
        tell(store, job, 3)
        ended(store, job, ago=OLD)

    def count(session: Session) -> int:
        return len(session.exec(select(tables.JobEvent.sequence).where(col(tables.JobEvent.job_uid).is_not(None))).all())

    uids = store.read_now(lambda session: compaction.with_old_events(session, tables.now() - timedelta(days=30)))
    assert set(uids) == {job.uid for job in jobs}
    before = store.read_now(count)
    store.write_now(lambda session: compaction.compact_events(session, uids))
    assert store.read_now(count) == before - 5


def test_what_is_to_be_kept_for_good_is(tmp_path: object) -> None:
    settings = Settings(home=tmp_path, event_days="inf", log_days=2)  # type: ignore[arg-type]
    kept = Retention.of(settings)
    assert (kept.events, kept.logs, kept.checkpoints) == (FOR_GOOD, timedelta(days=2), timedelta(days=7))
