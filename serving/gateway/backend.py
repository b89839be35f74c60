"""The backend on Ray Serve: model applications by their names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from common.errors import LuthierError, ResourceExhausted, Unavailable
from serving.engines.base import Completion
from serving.wire import AdapterRef, Ask, Event


class ServeBackend:
    """Applications by their name on the Ray Serve that this process belongs to.

    A replica that dies before it said anything is made up for by another, once: a request that itself kills replicas must not go
    through all of them. Where the first event of a stream has been passed on, the client is told instead.
    """

    def __init__(self) -> None:
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def keep(self, apps: Iterable[str]) -> None:
        """Forget the handles of applications that are gone."""
        wanted = frozenset(apps)
        self._handles = {app: handle for app, handle in self._handles.items() if app in wanted}

    async def prepare(self, app: str, adapter: AdapterRef) -> None:
        """Have a replica of the application try an adapter. Raises what is wrong with it."""
        handle = await self._handle(app)
        response: Any = handle.prepare.remote(adapter)
        try:
            await response
        except Exception as error:
            raise _translated(error) from error

    async def complete(self, app: str, ask: Ask) -> list[Completion]:
        """Return the completions of `ask` by the application `app`."""
        handle = await self._handle(app)
        try:
            try:
                return await _completed(handle, ask)
            except RayActorError:
                return await _completed(handle, ask)
        except Exception as error:
            raise _translated(error) from error

    async def stream(self, app: str, ask: Ask) -> AsyncIterator[Event]:
        """Yield Started, texts, and the Completion; closing it early ends the generation."""
        handle = await self._handle(app)
        for retry in (True, False):
            response: Any = handle.options(stream=True).stream.remote(ask)
            begun = done = False
            try:
                async for event in response:
                    begun = True
                    done = isinstance(event, Completion)
                    yield event
                return
            except Exception as error:
                if begun or not (retry and isinstance(error, RayActorError)):
                    raise _translated(error) from error
            finally:
                if not done:
                    response.cancel()

    async def _handle(self, app: str) -> DeploymentHandle[Any]:
        handle = self._handles.get(app)
        if handle is None:
            try:
                handle = await asyncio.to_thread(serve.get_app_handle, app)  # asks Serve's controller
            except (RayServeException, RayError) as error:
                raise Unavailable("The model is not ready yet.") from error
            self._handles[app] = handle
        return handle


async def _completed(handle: DeploymentHandle[Any], ask: Ask) -> list[Completion]:
    response: Any = handle.complete.remote(ask)
    try:
        completions: list[Completion] = await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    return completions


def _translated(error: BaseException) -> BaseException:
    """Return the error as the gateway knows it."""
    if isinstance(error, RayTaskError):
        cause: Any = error.cause
        return cause if isinstance(cause, LuthierError) else error
    if isinstance(error, BackPressureError):
        return ResourceExhausted("Too many requests wait for this model; try again shortly.")
    if isinstance(error, RayActorError):
        return Unavailable("The replica stopped before the answer was complete; try again.")
    if isinstance(error, RayServeException):
        return Unavailable("The model cannot answer now; try again.")
    return error
