"""Watching a whole project, and reading logs by what is wanted of them, on a live coordinator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from sqlmodel import Session, select

from coordinator import compaction
from coordinator.store import tables
from luthier.client import Client
from luthier.client.errors import InvalidArgument, OutOfRange
from luthier.v1 import job_pb2, training_pb2
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.tenants import in_store

Fresh = Callable[..., CoordinatorProcess]


@pytest.fixture
def process(fresh: Fresh, rows: Path, store_url: str) -> CoordinatorProcess:
    process = fresh(store_url=store_url).start()
    with process.client() as client:
        client.upload_dataset(rows, "rows")
    return process


def create(client: Client) -> str:
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full")
    return client.create_job(job_pb2.Job(finetune=spec)).name


def until_ended(client: Client, jobs: int, after: int = 0) -> list[tuple[int, str, int]]:
    """Events of the project until so many of its jobs have ended."""
    found = []
    for item in client.watch_jobs(after):
        found.append(told(item))
        jobs -= item.event.state == job_pb2.JOB_STATE_CANCELLED
        if not jobs:
            break
    return found


def told(item: job_pb2.WatchJobsResponse) -> tuple[int, str, int]:
    return item.sequence, item.job, item.event.sequence


def test_everyone_sees_every_event_of_the_project_once_and_in_one_order(process: CoordinatorProcess) -> None:
    with process.client() as client, ThreadPoolExecutor(8) as pool:
        early = [pool.submit(until_ended, client, 20) for _ in range(3)]

        def use(_: int) -> None:
            name = create(client)
            client.jobs.CancelJob(job_pb2.CancelJobRequest(name=name))

        list(pool.map(use, range(20)))
        seen = [each.result(30) for each in early]
        late = until_ended(client, 20)
        rest = [told(item) for item in islice(client.watch_jobs(25), len(late) - 25)]
    assert len(late) >= 40
    assert [number for number, _, _ in late] == list(range(1, len(late) + 1))
    assert seen == [late] * 3
    assert rest == late[25:]
    for name in {job for _, job, _ in late}:
        # Within a job they come in the job's own order.
        own = [number for _, job, number in late if job == name]
        assert own == list(range(1, len(own) + 1))


def test_a_watch_goes_on_over_a_kill_and_begins_where_it_is_told(process: CoordinatorProcess) -> None:
    with process.client() as client:
        old = create(client)
        # What it waits for is told once.
        list(islice(client.watch_jobs(0), 2))
        watch = client.watch_jobs(-1)
        first: list[job_pb2.WatchJobsResponse] = []
        reader = threading.Thread(target=lambda: first.append(next(watch)))
        reader.start()
        reader.join(1.0)
        assert not first  # what was there before is not told
        new = create(client)
        reader.join(20)
        process.kill()
        process.start()
        client.jobs.CancelJob(job_pb2.CancelJobRequest(name=old))
        second = next(item for item in watch if item.event.state == job_pb2.JOB_STATE_CANCELLED)
        with pytest.raises(InvalidArgument, match="beyond the last event"):
            next(client.watch_jobs(99))
    assert (first[0].sequence, first[0].job) == (3, new)
    assert second.job == old


def test_one_who_does_not_read_holds_up_nobody(process: CoordinatorProcess) -> None:
    with process.client() as client, process.client() as slow:
        idle = slow.jobs.WatchJobs(job_pb2.WatchJobsRequest(parent="projects/default"))
        next(iter(idle))
        for _ in range(30):
            create(client)
        assert [item.sequence for item in islice(client.watch_jobs(0), 30)] == list(range(1, 31))
        # And finds everything when it does read.
        assert [item.sequence for item in islice(idle, 30)] == list(range(1, 31))
        idle.cancel()


def compact(process: CoordinatorProcess, uid: str, upto: int) -> None:
    """What the collector does with a job that ended long ago, at once."""

    def work(session: Session) -> None:
        compaction.compact_events(session, [uid])
        assert session.get_one(tables.Job, uid).events_compacted == upto

    in_store(process, work)


def test_who_comes_too_late_is_told_and_who_begins_anew_gets_what_is_left(process: CoordinatorProcess) -> None:
    with process.client() as client:
        old, new = create(client), create(client)
        begun = list(islice(client.watch_jobs(0), 4))  # each was made, and told what it waits for
        first_of_new = next(item.sequence for item in begun if item.job == new)
        until_ended_by(client, old)
        last = client.get_job(old).sequence
        compact(process, client.get_job(old).uid, last - 1)
        gone = [item.sequence for item in islice(client.watch_jobs(0), 2)]
        with pytest.raises(OutOfRange, match="are no longer kept; watch after 0") as late:
            next(client.watch_jobs(1))
        for after in (1, last - 2):
            with pytest.raises(OutOfRange) as caught:
                list(client.watch(old, after))
            assert caught.value.metadata == {"first_sequence": str(last)}
        left = list(client.watch(old))
        assert list(client.watch(old, last - 1)) == left
        assert [told_of(item) for item in left] == [(last, job_pb2.JOB_STATE_CANCELLED)]
        first_kept = int(late.value.metadata["first_sequence"])
        # One who has seen all that is gone goes on, and the other job's events are all there.
        assert next(client.watch_jobs(first_kept - 1)).sequence == first_kept
        assert next(client.watch(new)).event.sequence == 1
    assert gone[0] == first_of_new


def until_ended_by(client: Client, name: str) -> None:
    client.jobs.CancelJob(job_pb2.CancelJobRequest(name=name))
    for _ in client.watch(name):
        pass


def told_of(item: job_pb2.WatchJobResponse) -> tuple[int, int]:
    return item.event.sequence, item.event.state


def test_the_events_of_a_deleted_job_are_no_gap_for_those_who_watch(process: CoordinatorProcess) -> None:
    with process.client() as client:
        first, gone, last = create(client), create(client), create(client)
        until_ended_by(client, gone)
        seen: list[job_pb2.WatchJobsResponse] = []
        watch = client.watch_jobs(0)
        seen.append(next(watch))
        in_store(process, lambda session: remove_events(session, client.get_job(gone).uid))
        process.kill()  # what was kept in memory is gone, too
        process.start()
        for name in (first, last):
            client.jobs.CancelJob(job_pb2.CancelJobRequest(name=name))
        while sum(item.event.state == job_pb2.JOB_STATE_CANCELLED for item in seen) < 2:
            seen.append(next(watch))
        again = list(islice(client.watch_jobs(0), len(seen)))
    assert [told(item) for item in again] == [told(item) for item in seen]
    for name in (first, last):
        own = [item.event.sequence for item in seen if item.job == name]
        assert own == list(range(1, len(own) + 1))
    assert gone not in {item.job for item in seen}


def remove_events(session: Session, uid: str) -> None:
    """The first half of what the collector does with a job that was deleted."""
    compaction.note_deletion(session, uid)
    for event in session.exec(select(tables.JobEvent).where(tables.JobEvent.job_uid == uid)).all():
        session.delete(event)


def test_lines_that_are_no_longer_kept_are_counted(process: CoordinatorProcess) -> None:
    with process.client() as client:
        name = create(client)
        uid = client.get_job(name).uid

        def work(session: Session) -> None:
            for number in range(1, 41):
                values = {"job_uid": uid, "sequence": number, "time": tables.now(), "run": 1, "source": "rank-0"}
                session.add(tables.JobLog(**values, level="INFO", message=f"line {number}"))
            session.flush()
            compaction.compact_logs(session, [(uid, 30)])

        in_store(process, work)
        lines = [(line.sequence, line.source, line.message) for line in client.logs(name, pattern="line 3.")]
        assert lines[0] == (30, "luthier", "30 older lines are no longer kept")
        assert [sequence for sequence, _, _ in lines[1:]] == list(range(31, 40))
        assert next(client.logs(name, after_sequence=10)).message == "20 older lines are no longer kept"
        assert next(client.logs(name, after_sequence=30)).message == "line 31"


def test_logs_are_read_by_source_run_level_and_pattern(process: CoordinatorProcess) -> None:
    with process.client() as client:
        name = create(client)
        uid = client.get_job(name).uid
        lines = [
            tables.JobLog(
                **{"job_uid": uid, "sequence": number, "time": tables.now(), "run": 1 + number // 600},
                source=f"rank-{number % 2}",
                level="ERROR" if number % 100 == 0 else "INFO",
                message=f"step {number} of 1200",
            )
            for number in range(1, 1201)
        ]
        in_store(process, lambda session: session.add_all(lines))

        def read(**wanted: object) -> list[int]:
            return [line.sequence for line in client.logs(name, **wanted)]  # type: ignore[arg-type]

        assert read() == list(range(1, 1201))
        assert read(level="warning") == list(range(100, 1201, 100))
        assert read(level="error", source="rank-1") == []
        assert read(run=3) == [1200]
        assert read(pattern=r"step 11\d7 ") == list(range(1107, 1200, 10))
        assert read(pattern="(a|aa)+$", level="INFO") == []
        request = job_pb2.TailLogsRequest(name=name, pattern="nothing like it")
        # What does not match counts as seen, so that following goes on from there.
        assert [(len(part.lines), part.seen) for part in client.jobs.TailLogs(request)] == [(0, 500), (0, 1000), (0, 1200)]
        with pytest.raises(InvalidArgument) as refused:
            list(client.logs(name, level="loud", pattern="(", run=-1))
    assert [bad.field for bad in refused.value.violations] == ["level", "run", "pattern"]
