"""Watchers in a process of their own: `python -m benchmarks.watchers ADDRESS TOKEN COUNT` opens COUNT watches over a project.

Each line on stdin is a number: once every watcher has that many events, a line of JSON says when that was and how late they came.
Every event's number is looked at, so that one that is lost, doubled or out of order ends the process.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator

import grpc

from luthier.v1 import job_pb2

METHOD = "/luthier.v1.JobService/WatchJobs"
WATCHERS_A_CONNECTION = 100
SAMPLED = 50
"""Every so many-th watcher measures how late its events come."""


class Watchers:
    """Many watches, and how far the slowest of them is."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.late: list[float] = []
        self.moved = asyncio.Event()

    async def watch(self, stream: AsyncIterator[bytes], number: int) -> None:
        """Count the events of one watch, which have to follow on each other."""
        last = 0
        async for message in stream:
            item = job_pb2.WatchJobsResponse.FromString(message)
            if item.WhichOneof("item") != "event":
                continue
            if item.sequence != last + 1:
                raise AssertionError(f"watcher {number} got event {item.sequence} after {last}")
            last = item.sequence
            self.seen[number] = last
            if number % SAMPLED == 0:
                self.late.append(time.time() - item.event.time.ToNanoseconds() / 1e9)
            self.moved.set()

    async def until(self, count: int) -> None:
        """Return once every watcher has so many events."""
        while min(self.seen) < count:
            self.moved.clear()
            await self.moved.wait()


async def main(address: str, token: str, count: int) -> None:
    """Watch until stdin ends."""
    metadata = (("authorization", f"Bearer {token}"),)
    request = job_pb2.WatchJobsRequest(parent="projects/default").SerializeToString()
    watchers = Watchers()
    watchers.seen = [0] * count
    tasks = []
    for connection in range(0, count, WATCHERS_A_CONNECTION):
        channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        call = channel.unary_stream(METHOD)
        for number in range(connection, min(count, connection + WATCHERS_A_CONNECTION)):
            tasks.append(asyncio.create_task(watchers.watch(call(request, metadata=metadata), number)))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        watchers.late.clear()
        cpu, started = time.process_time(), time.perf_counter()
        wait = asyncio.create_task(watchers.until(int(line)))
        done, _ = await asyncio.wait([wait, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        assert wait in done, "a watch has ended"
        late = sorted(watchers.late) or [0.0]
        taken = time.perf_counter() - started
        answer = {
            "ended": time.time(),
            "p50_ms": late[len(late) // 2] * 1000,
            "p95_ms": late[int(len(late) * 0.95)] * 1000,
            "p99_ms": late[int(len(late) * 0.99)] * 1000,
            "client_cpu_share": (time.process_time() - cpu) / max(taken, 1e-9),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
