"""A bare grpc.aio server that streams what it is told to everyone: `python -m benchmarks.broadcast` prints its port.

Each line on stdin is a number of events, which are sent to all watchers at once. It keeps nothing but a list, checks no key, and
reads no store: what remains is gRPC itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from luthier.v1 import job_pb2, job_pb2_grpc


class Broadcast(job_pb2_grpc.JobServiceServicer):
    """Sends every event to every watcher."""

    def __init__(self) -> None:
        self.events: list[job_pb2.WatchJobsResponse] = []
        self.news = asyncio.Event()

    async def WatchJobs(self, request: Any, context: Any) -> AsyncIterator[job_pb2.WatchJobsResponse]:
        """All events from the first on."""
        sent = 0
        while True:
            while sent < len(self.events):
                sent += 1
                yield self.events[sent - 1]
            await self.news.wait()

    def add(self, count: int) -> None:
        """Make so many events, which look like those of new jobs."""
        for _ in range(count):
            number = len(self.events) + 1
            event = job_pb2.JobEvent(sequence=1, type=1, state=2, message="import_model created by admin")  # type: ignore[arg-type]
            event.time.GetCurrentTime()
            name = f"projects/default/jobs/im-{number:010d}"
            self.events.append(job_pb2.WatchJobsResponse(event=event, job=name, sequence=number))
        woken, self.news = self.news, asyncio.Event()
        woken.set()


async def main() -> None:
    """Serve until stdin ends."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    broadcast = Broadcast()
    job_pb2_grpc.add_JobServiceServicer_to_server(broadcast, server)
    await server.start()
    print(port, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        broadcast.add(int(line))


if __name__ == "__main__":
    asyncio.run(main())
