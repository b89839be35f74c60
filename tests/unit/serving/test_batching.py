"""The batcher: what waits runs together, who left does not run, and failures are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import pytest

from common.errors import InvalidArgument
from serving.batching import FAILURES_UNTIL_UNHEALTHY, Batcher
from serving.engines.base import Completion, Engine, Request, SamplingParams, Score


class GatedEngine(Engine):
    """Runs a batch once it is let go; `a` fails by the caller's fault and `b` by its own."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.batches: list[list[str]] = []

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        self.batches.append([request.prompt for request in requests])
        self.began.release()
        assert self.go.acquire(timeout=10)
        if requests[0].prompt == "a":
            raise InvalidArgument("no")
        if requests[0].prompt == "b":
            raise RuntimeError("broken")
        return [Completion(request.prompt.upper(), "stop", 1, 1) for request in requests]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        raise NotImplementedError

    def check(self, prompt: str) -> int:
        raise NotImplementedError

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        raise NotImplementedError

    def score_choices(self, choices: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> list[list[Score]]:
        raise NotImplementedError


@pytest.fixture
def engine() -> GatedEngine:
    return GatedEngine()


@pytest.fixture
def batcher(engine: GatedEngine) -> Iterator[Batcher]:
    batcher = Batcher(engine, max_rows=3, threads=1)
    yield batcher
    batcher.close()


def submit(batcher: Batcher, prompt: str) -> tuple[Request, Future[Completion]]:
    request, future = Request(prompt, SamplingParams()), Future[Completion]()

    def done(result: Completion | BaseException) -> None:
        if isinstance(result, Completion):
            future.set_result(result)
        else:
            future.set_exception(result)

    batcher.submit(request, done)
    return request, future


def test_what_waits_runs_together_in_order_and_bounded(batcher: Batcher, engine: GatedEngine) -> None:
    first = submit(batcher, "x")
    assert engine.began.acquire(timeout=10)
    waiting = [submit(batcher, prompt) for prompt in "pqrs"]
    engine.go.release(3)
    assert [future.result(10).text for _, future in [first, *waiting]] == ["X", "P", "Q", "R", "S"]
    assert engine.batches == [["x"], ["p", "q", "r"], ["s"]]


def test_who_left_while_waiting_does_not_run(batcher: Batcher, engine: GatedEngine) -> None:
    submit(batcher, "x")
    assert engine.began.acquire(timeout=10)
    request, left = submit(batcher, "p")
    _, stayed = submit(batcher, "q")
    request.cancel.set()
    engine.go.release(2)
    assert left.result(10).finish_reason == "cancelled"
    assert stayed.result(10).text == "Q"
    assert engine.batches == [["x"], ["q"]]


def test_only_the_engines_own_failures_make_it_unhealthy(batcher: Batcher, engine: GatedEngine) -> None:
    engine.go.release(100)
    for _ in range(FAILURES_UNTIL_UNHEALTHY + 1):
        with pytest.raises(InvalidArgument):
            submit(batcher, "a")[1].result(10)
    assert batcher.healthy
    for _ in range(FAILURES_UNTIL_UNHEALTHY):
        assert batcher.healthy
        with pytest.raises(RuntimeError, match="broken"):
            submit(batcher, "b")[1].result(10)
    assert not batcher.healthy
    assert submit(batcher, "fine")[1].result(10).text == "FINE"
    assert batcher.healthy
