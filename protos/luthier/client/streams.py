"""Streams that survive the coordinator: a broken one is opened again after the last number that was seen."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, Protocol, TypeVar

from luthier.client.errors import Cancelled, DeadlineExceeded, Internal, LuthierError, NotFound, Unavailable
from luthier.v1.endpoint_pb2 import Endpoint, WatchEndpointResponse
from luthier.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_SUCCEEDED,
    JobState,
    LogLine,
    TailLogsResponse,
    WatchJobResponse,
    WatchJobsResponse,
)

TERMINAL_STATES = frozenset({JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED})

# A connection that died without a word is noticed when the stream's own deadline passes.
STREAM_SECONDS = 300.0
FIRST_BACKOFF = 0.2
LONGEST_BACKOFF = 5.0

T_co = TypeVar("T_co", covariant=True)


class Stream(Protocol[T_co]):
    """A call that answers with many messages and can be given up."""

    def __iter__(self) -> Iterator[T_co]: ...

    def cancel(self) -> Any:
        """Give the call up."""


def is_terminal(state: JobState.ValueType) -> bool:
    """Whether a job in this state has ended."""
    return state in TERMINAL_STATES


def broke(error: LuthierError) -> bool:
    """Whether a stream that ended with `error` is worth opening again.

    A server that stops may show as UNAVAILABLE, as CANCELLED, or as a reset stream, by the moment that it was caught at.
    """
    if isinstance(error, Internal):
        return "RST_STREAM" in error.message or "Stream removed" in error.message
    return isinstance(error, Unavailable | Cancelled | DeadlineExceeded)


class Patience:
    """Waits between tries, longer each time, and gives up after `limit` seconds without a sign of life."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        """Something arrived: start over."""
        self._since = time.monotonic()
        self._pause = FIRST_BACKOFF

    def wait(self, error: LuthierError | None) -> None:
        """Sleep before the next try, or raise `error` where patience has run out."""
        if self._limit is not None and time.monotonic() - self._since >= self._limit:
            raise error or Unavailable(f"the stream ended over and over for {self._limit:.0f} s without a word")
        time.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(self._pause * 2, LONGEST_BACKOFF)


def watch(
    open_stream: Callable[[int], Stream[WatchJobResponse]], after_sequence: int, patience: float | None
) -> Iterator[WatchJobResponse]:
    """Yield events in order, each once, and progress in between; end after the terminal event.

    `open_stream` opens the call after a sequence number. Bookmarks are taken in and not passed on.
    """
    seen, gaps, waiting = after_sequence, 0, Patience(patience)
    while True:
        error: LuthierError | None = None
        stream = open_stream(seen)
        try:
            with closing(_cancelling(stream)) as items:
                for item in items:
                    if item.WhichOneof("item") == "event":
                        if item.event.sequence <= seen:
                            continue
                        if item.event.sequence > seen + 1:
                            gaps += 1
                            break
                        seen, gaps = item.event.sequence, 0
                    elif item.WhichOneof("item") == "bookmark":
                        seen = max(seen, item.bookmark)
                    waiting.reset()
                    if item.WhichOneof("item") != "bookmark":
                        yield item
                    if item.WhichOneof("item") == "event" and is_terminal(item.event.state):
                        return
        except LuthierError as failure:
            if not broke(failure):
                raise
            error = None if isinstance(failure, DeadlineExceeded) else failure
        if gaps > 2:
            raise Internal(f"the coordinator skips event {seen + 1} of the watch")
        waiting.wait(error)


def watch_project(
    open_stream: Callable[[int], Stream[WatchJobsResponse]], after_sequence: int, patience: float | None
) -> Iterator[WatchJobsResponse]:
    """Yield the events of a project in order, each once, for ever. Bookmarks are taken in and not passed on."""
    seen, gaps, waiting = after_sequence, 0, Patience(patience)
    while True:
        error: LuthierError | None = None
        try:
            with closing(_cancelling(open_stream(seen))) as items:
                for item in items:
                    waiting.reset()
                    if item.WhichOneof("item") == "bookmark":
                        # Also where to begin, for those who asked for what is to come.
                        seen = max(seen, item.sequence)
                    elif item.sequence > seen + 1:
                        gaps += 1
                        break
                    elif item.sequence == seen + 1:
                        seen, gaps = item.sequence, 0
                        yield item
        except LuthierError as failure:
            if not broke(failure):
                raise
            error = None if isinstance(failure, DeadlineExceeded) else failure
        if gaps > 2:
            raise Internal(f"the coordinator skips event {seen + 1} of the project")
        waiting.wait(error)


def watch_endpoint(open_stream: Callable[[], Stream[WatchEndpointResponse]], patience: float | None) -> Iterator[Endpoint]:
    """Yield an endpoint as it is and whenever it changes; end when it is gone."""
    etag, waiting = "", Patience(patience)
    while True:
        error: LuthierError | None = None
        try:
            with closing(_cancelling(open_stream())) as items:
                for item in items:
                    waiting.reset()
                    if item.endpoint.etag != etag:
                        etag = item.endpoint.etag
                        yield item.endpoint
        except NotFound:
            if etag:
                return
            raise
        except LuthierError as failure:
            if not broke(failure):
                raise
            error = None if isinstance(failure, DeadlineExceeded) else failure
        # One that ended by itself ended with its endpoint or with its server; asked again, it says which.
        waiting.wait(error)


def tail(
    open_stream: Callable[[int], Stream[TailLogsResponse]],
    after_sequence: int,
    follow: bool,
    ended: Callable[[], bool],
    patience: float | None,
) -> Iterator[LogLine]:
    """Yield log lines in order, each once. With `follow` end once the job has `ended`, else at the last line."""
    seen, waiting = after_sequence, Patience(patience)
    while True:
        error: LuthierError | None = None
        try:
            over = not follow or ended()  # asked before the stream is opened, so that no last line can slip between
            with closing(_cancelling(open_stream(seen))) as items:
                for group in items:
                    for line in group.lines:
                        if line.sequence > seen:
                            seen = line.sequence
                            yield line
                    seen = max(seen, group.seen)
                    waiting.reset()
            if over:
                return
        except LuthierError as failure:
            if not broke(failure):
                raise
            error = None if isinstance(failure, DeadlineExceeded) else failure
        waiting.wait(error)


M = TypeVar("M")


def _cancelling(stream: Stream[M]) -> Generator[M, None, None]:
    """Iterate over a call, and give it up when the iteration is."""
    try:
        yield from stream
    finally:
        stream.cancel()
