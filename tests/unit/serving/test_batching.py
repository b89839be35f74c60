"""The batcher: what comes joins the running batch, failures are told, and the thread ends when it is closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import pytest

from common.errors import InvalidArgument
from serving.batching import FAILURES_UNTIL_UNHEALTHY, Batcher
from serving.engines.base import Completion, Done, Engine, Lanes, Request, SamplingParams, Score


class GatedLanes(Lanes):
    """A step takes one of each that is in it once it is let go; `a` is refused, `b` breaks the model."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.steps: list[list[str]] = []
        self._inside: list[tuple[Request, Done, int]] = []

    def join(self, request: Request, done: Done) -> None:
        if request.prompt == "a":
            done(InvalidArgument("no"))
        else:
            self._inside.append((request, done, len(request.prompt)))

    @property
    def busy(self) -> bool:
        return bool(self._inside)

    def step(self) -> None:
        self.steps.append([request.prompt for request, _, _ in self._inside])
        self.began.release()
        assert self.go.acquire(timeout=10)
        inside, self._inside = self._inside, []
        if any(request.prompt == "b" for request, _, _ in inside):
            error = RuntimeError("broken")
            for _, done, _ in inside:
                done(error)
            raise error
        for request, done, left in inside:
            if left > 1:
                self._inside.append((request, done, left - 1))
            else:
                done(Completion(request.prompt.upper(), "stop", 1, len(request.prompt)))


class GatedEngine(Engine):
    """An engine with one such batch."""

    def __init__(self) -> None:
        self.inside = GatedLanes()

    def lanes(self) -> Lanes:
        return self.inside

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        raise NotImplementedError

    def check(self, prompt: str) -> int:
        raise NotImplementedError

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        raise NotImplementedError

    def score_choices(self, choices: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> list[list[Score]]:
        raise NotImplementedError


@pytest.fixture
def lanes() -> GatedLanes:
    return GatedLanes()


@pytest.fixture
def batcher(lanes: GatedLanes) -> Iterator[Batcher]:
    engine = GatedEngine()
    engine.inside = lanes
    batcher = Batcher(engine)
    yield batcher
    batcher.close()


def submit(batcher: Batcher, prompt: str) -> Future[Completion]:
    future = Future[Completion]()

    def done(result: Completion | BaseException) -> None:
        if isinstance(result, Completion):
            future.set_result(result)
        else:
            future.set_exception(result)

    batcher.submit(Request(prompt, SamplingParams()), done)
    return future


def test_what_comes_joins_what_runs_and_leaves_before_it(batcher: Batcher, lanes: GatedLanes) -> None:
    long = submit(batcher, "xxxx")
    assert lanes.began.acquire(timeout=10)
    short = submit(batcher, "p")
    lanes.go.release(2)
    assert short.result(10).text == "P"
    assert not long.done()
    lanes.go.release(2)
    assert long.result(10).text == "XXXX"
    assert lanes.steps == [["xxxx"], ["xxxx", "p"], ["xxxx"], ["xxxx"]]


def test_one_that_is_refused_does_not_disturb_the_others(batcher: Batcher, lanes: GatedLanes) -> None:
    fine = submit(batcher, "xx")
    assert lanes.began.acquire(timeout=10)
    refused = submit(batcher, "a")
    lanes.go.release(2)
    with pytest.raises(InvalidArgument):
        refused.result(10)
    assert fine.result(10).text == "XX"


def test_only_the_engines_own_failures_make_it_unhealthy(batcher: Batcher, lanes: GatedLanes) -> None:
    lanes.go.release(100)
    for _ in range(FAILURES_UNTIL_UNHEALTHY + 1):
        with pytest.raises(InvalidArgument):
            submit(batcher, "a").result(10)
    assert batcher.healthy
    for _ in range(FAILURES_UNTIL_UNHEALTHY):
        with pytest.raises(RuntimeError, match="broken"):
            submit(batcher, "b").result(10)
    assert submit(batcher, "fine").result(10).text == "FINE"
    assert batcher.healthy


def test_it_is_unhealthy_after_failures_in_a_row(batcher: Batcher, lanes: GatedLanes) -> None:
    lanes.go.release(100)
    for _ in range(FAILURES_UNTIL_UNHEALTHY):
        with pytest.raises(RuntimeError, match="broken"):
            submit(batcher, "b").result(10)
    # The last one is counted right after it was told.
    deadline = time.monotonic() + 10
    while batcher.healthy:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closed_it_ends_what_it_has_and_then_itself(batcher: Batcher, lanes: GatedLanes) -> None:
    last = submit(batcher, "xx")
    batcher.close()
    lanes.go.release(10)
    assert last.result(10).text == "XX"
    batcher._thread.join(10)
    assert not batcher._thread.is_alive()
    assert not batcher.healthy
