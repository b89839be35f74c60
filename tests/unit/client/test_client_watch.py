"""A watch shows every event once and in order, whatever happens to the connection."""

import threading
import time
from collections.abc import Iterator
from itertools import islice

import grpc
import pytest

from luthier.client import Client, DeadlineExceeded, Internal, OutOfRange, Unavailable
from luthier.client.streams import watch, watch_project
from luthier.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    Job,
    JobEvent,
    LogLine,
    Progress,
    WatchJobResponse,
    WatchJobsResponse,
)
from tests.support.fake_services import Failure, FakeCoordinator


def run_job(fake: FakeCoordinator, events: int, pause: float = 0.0) -> Job:
    job = fake.add_job(Job())

    def live() -> None:
        for number in range(events - 1):
            time.sleep(pause)
            fake.emit(job, JOB_STATE_RUNNING, str(number))
            fake.progress(job, Progress(step=number))
        fake.emit(job, JOB_STATE_SUCCEEDED, "done")

    threading.Thread(target=live, daemon=True).start()
    return job


def sequences(items: list[WatchJobResponse]) -> list[int]:
    return [item.event.sequence for item in items if item.HasField("event")]


def test_a_watch_ends_with_the_terminal_event_and_the_job(fake: FakeCoordinator, client: Client) -> None:
    job = run_job(fake, 5)
    items = list(client.watch(job.name))
    assert sequences(items) == [1, 2, 3, 4, 5]
    assert items[-1].job.state == JOB_STATE_SUCCEEDED
    assert any(item.HasField("progress") for item in items)
    assert not any(item.WhichOneof("item") == "bookmark" for item in items)


def test_events_come_once_and_in_order_when_the_stream_breaks(fake: FakeCoordinator, client: Client) -> None:
    fake.cut_streams_after.extend([0, 3, 1, 4])
    job = run_job(fake, 12)
    assert sequences(list(client.watch("j-1"))) == list(range(1, 13))
    after = [call.request.after_sequence for call in fake.called("WatchJob")]
    assert len(after) == 5
    assert after == sorted(after)
    assert job.sequence == 12


def test_a_watch_goes_on_when_the_server_was_away(fake: FakeCoordinator, client: Client) -> None:
    job = run_job(fake, 30, pause=0.05)
    seen = []
    for item in client.watch(job.name):
        seen.append(item)
        if len(sequences(seen)) == 3 and item.HasField("event"):
            fake.stop()
            threading.Timer(1.0, fake.start).start()
    assert sequences(seen) == list(range(1, 31))


def test_a_watch_starts_after_a_number(fake: FakeCoordinator, client: Client) -> None:
    job = run_job(fake, 6)
    assert sequences(list(client.watch(job.name, after_sequence=4))) == [5, 6]


def test_patience_runs_out(fake: FakeCoordinator) -> None:
    job = fake.add_job(Job())
    fake.stop()
    with Client(fake.address, fake.token, patience=0.5) as client, pytest.raises(Unavailable):
        list(client.watch(job.name))


def test_compacted_history_is_said(fake: FakeCoordinator, client: Client) -> None:
    job = fake.add_job(Job())
    fake.fail("WatchJob", Failure(grpc.StatusCode.OUT_OF_RANGE, "events before 40 are gone"))
    with pytest.raises(OutOfRange, match="40"):
        list(client.watch(job.name))


class Scripted:
    """A stream that says what it is told to."""

    def __init__(self, *numbers: int) -> None:
        self.items = iter(
            WatchJobResponse(event=JobEvent(sequence=n, state=JOB_STATE_CANCELLED if n == 9 else 4)) for n in numbers
        )

    def __iter__(self) -> "Scripted":
        return self

    def __next__(self) -> WatchJobResponse:
        return next(self.items)

    def cancel(self) -> None: ...


def test_a_gap_is_read_again_and_a_repeated_event_dropped() -> None:
    streams = iter([Scripted(7, 9), Scripted(7, 8, 9)])
    asked: list[int] = []

    def open_stream(seen: int) -> Scripted:
        asked.append(seen)
        return next(streams)

    assert sequences(list(watch(open_stream, 6, patience=5))) == [7, 8, 9]
    assert asked == [6, 7]


def test_a_gap_that_stays_is_an_error_not_a_silent_loss() -> None:
    with pytest.raises(Internal, match="skips event 7"):
        list(watch(lambda seen: Scripted(8, 9), 6, patience=5))


def test_what_a_bookmark_passes_over_is_no_gap() -> None:
    class Stream(Scripted):
        def __init__(self) -> None:
            late = WatchJobResponse(event=JobEvent(sequence=9, state=JOB_STATE_CANCELLED))
            self.items = iter([WatchJobResponse(bookmark=8), late])

    assert sequences(list(watch(lambda seen: Stream(), 0, patience=5))) == [9]


def test_a_project_is_watched_from_where_it_stands_and_over_a_break_without_gap_or_repeat() -> None:
    def says(*items: int) -> Iterator[WatchJobsResponse]:
        for number in items:
            yield WatchJobsResponse(event=JobEvent(), sequence=number) if number else WatchJobsResponse(bookmark=6, sequence=6)

    class Stream:
        def __init__(self, *items: int) -> None:
            self.items = says(*items)

        def __iter__(self) -> Iterator[WatchJobsResponse]:
            return self.items

        def cancel(self) -> None: ...

    streams = iter([Stream(0, 7, 8, 10), Stream(8, 9, 10)])
    asked: list[int] = []

    def open_stream(seen: int) -> Stream:
        asked.append(seen)
        return next(streams)

    found = [item.sequence for item in islice(watch_project(open_stream, -1, patience=5), 4)]
    assert (found, asked) == ([7, 8, 9, 10], [-1, 8])


def test_wait_returns_the_job_or_says_that_it_takes_too_long(fake: FakeCoordinator, client: Client) -> None:
    assert client.wait(run_job(fake, 3).name).state == JOB_STATE_SUCCEEDED
    slow = fake.add_job(Job())
    with pytest.raises(DeadlineExceeded, match="has not ended within"):
        client.wait(slow.name, timeout=0.3)


def test_logs_resume_and_end_with_the_job(fake: FakeCoordinator, client: Client) -> None:
    job = fake.add_job(Job())
    fake.logs[job.name] = [LogLine(sequence=n, source="rank-0", message=str(n)) for n in range(1, 6)]
    fake.cut_streams_after.append(3)
    assert [line.sequence for line in client.logs(job.name)] == [1, 2, 3, 4, 5]
    threading.Timer(0.3, lambda: fake.logs[job.name].append(LogLine(sequence=6)) or fake.emit(job, JOB_STATE_SUCCEEDED)).start()
    assert [line.sequence for line in client.logs(job.name, after_sequence=4, follow=True)] == [5, 6]
