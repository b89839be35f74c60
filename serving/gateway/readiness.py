"""Whether adapters apply to the models that are to answer with them: asked of a replica before any traffic is led there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

from common.errors import LuthierError
from serving.wire import AdapterRef

Prepare = Callable[[str, AdapterRef], Awaitable[None]]
Pair = tuple[str, AdapterRef]


class Readiness:
    """Asks once for each application and adapter, and remembers the answer until nobody wants to know any more."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._asking: dict[Pair, asyncio.Task[str]] = {}

    def look(self, wanted: Iterable[Pair]) -> Mapping[str, str]:
        """What is known of each pair, by `app/adapter`: empty where it is ready, else what is wrong with it for good."""
        pairs = set(wanted)
        for pair in [pair for pair in self._asking if pair not in pairs]:
            self._asking.pop(pair).cancel()
        for pair in pairs:
            task = self._asking.get(pair)
            if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
                self._asking[pair] = asyncio.create_task(self._ask(*pair))
        known = [(pair, task) for pair, task in self._asking.items() if task.done() and not task.cancelled()]
        return {f"{app}/{adapter.name}": task.result() for (app, adapter), task in known if task.exception() is None}

    async def _ask(self, app: str, adapter: AdapterRef) -> str:
        """Raises where it cannot be told now, so that it is asked again."""
        try:
            await self._prepare(app, adapter)
        except LuthierError as error:
            if error.grpc_code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "INTERNAL"):
                return error.message or error.reason
            raise
        return ""
