"""What becomes of a request whose replica dies: another one answers, unless something was said already."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from common.errors import ResourceExhausted, Unavailable
from serving.engines.base import Completion, SamplingParams
from serving.gateway.backend import ServeBackend
from serving.wire import Ask, Event, Started

ASK = Ask(SamplingParams(), prompts=("hi",))
WHOLE = Completion("Hello", "stop", 1, 2)
STREAM: list[Event] = [Started(1), "Hello", WHOLE]


class Reply:
    """What Serve's handle returns: one answer or a stream of them, which may break off with an error."""

    def __init__(self, *events: Any) -> None:
        self._events = events
        self.cancelled = False

    def __await__(self) -> Any:
        return self._whole().__await__()

    async def _whole(self) -> Any:
        return await anext(aiter(self))

    async def __aiter__(self) -> AsyncIterator[Any]:
        for event in self._events:
            if isinstance(event, BaseException):
                raise event
            yield event

    def cancel(self) -> None:
        self.cancelled = True


def backend(*replies: Reply) -> ServeBackend:
    """A backend whose application `m` gives these replies in turn, and none after them."""
    left = list(replies)
    method = SimpleNamespace(remote=lambda _: left.pop(0))
    handle = SimpleNamespace(complete=method, stream=method, options=lambda **_: handle)
    made = ServeBackend()
    made._handles["m"] = handle  # type: ignore[assignment]
    return made


async def streamed(backend: ServeBackend) -> list[Event]:
    return [event async for event in backend.stream("m", ASK)]


async def test_an_answer_that_dies_with_its_replica_is_given_by_another() -> None:
    assert await backend(Reply(RayActorError()), Reply([WHOLE])).complete("m", ASK) == [WHOLE]


async def test_a_stream_that_dies_before_its_first_event_is_begun_by_another() -> None:
    dead = Reply(RayActorError())
    assert await streamed(backend(dead, Reply(*STREAM))) == STREAM
    assert dead.cancelled


async def test_a_request_that_kills_replicas_gets_two_and_no_more() -> None:
    replies = Reply(RayActorError()), Reply(RayActorError()), Reply([WHOLE])
    with pytest.raises(Unavailable, match="replica stopped"):
        await backend(*replies).complete("m", ASK)
    with pytest.raises(Unavailable, match="replica stopped"):
        await streamed(backend(*replies))


@pytest.mark.parametrize("said", [1, 2])
async def test_a_stream_that_has_begun_is_never_begun_again(said: int) -> None:
    broken = Reply(*STREAM[:said], RayActorError())
    events = backend(broken, Reply(*STREAM)).stream("m", ASK)
    assert [await anext(events) for _ in range(said)] == STREAM[:said]
    with pytest.raises(Unavailable, match="replica stopped"):
        await anext(events)
    assert broken.cancelled


async def test_full_queues_are_not_asked_again() -> None:
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    with pytest.raises(ResourceExhausted):
        await backend(Reply(full), Reply([WHOLE])).complete("m", ASK)
    with pytest.raises(ResourceExhausted):
        await streamed(backend(Reply(full), Reply(*STREAM)))
