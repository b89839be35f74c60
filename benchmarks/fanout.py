"""Fan-out: how fast 1,000 watchers of a project get its events, and what each of them costs, against a bare grpc.aio broadcast.

In a round a job is changed a hundred times at once, and the time is taken until every watcher has every event, each of which was
durable before it was sent; the peer sends as many events of the same size out of its memory. Watchers are two processes of 500
for each side, which check every number. Then, at a steady rate, it is measured how late the events come.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.concurrent import told
from benchmarks.report import Spread, keep, machine
from luthier.v1 import job_pb2, job_pb2_grpc
from tests.support.coordinator_process import TOKEN, CoordinatorProcess

COMMAND = "python -m benchmarks.fanout"
WATCHERS = 1000
PROCESSES = 2
ROUNDS = 8
BURST = 100
"""Events of a round."""

STEADY_SECONDS = 15.0
STEADY_RATE = 5.0
"""Events a second while it is measured how late they come."""


class Crowd:
    """All watchers of one side."""

    def __init__(self, address: str) -> None:
        command = [sys.executable, "-m", "benchmarks.watchers", address, TOKEN, str(WATCHERS // PROCESSES)]
        pipe = subprocess.PIPE
        self._processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(PROCESSES)]

    def expect(self, count: int) -> None:
        """Have every watcher wait until it has so many events."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()

    def told(self) -> list[dict[str, float]]:
        """What each process says once all its watchers have them."""
        found = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("watchers have ended, see above")
            found.append(json.loads(line))
        return found

    def close(self) -> None:
        """End the watchers."""
        for process in self._processes:
            process.kill()
            process.wait()


class Ours:
    """A coordinator on SQLite with one job; every change of its priority is an event."""

    def __init__(self, home: Path) -> None:
        self.process = CoordinatorProcess(home).start()
        assert self.process.process is not None
        self.pid, self.address = self.process.process.pid, self.process.address
        self.changes = 0
        with self.process.client() as client:
            spec: Any = {"source": "builtin:tiny", "output_model": "m"}
            self.job = client.create_job(job_pb2.Job(import_model=spec)).name
            for _ in islice(client.watch_jobs(0), 2):  # it was made, and told what it waits for
                pass

    async def emit(self, count: int, rate: float = 0.0) -> None:
        """Make so many events, all at once or so many a second."""
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = job_pb2_grpc.JobServiceStub(channel)
            calls = []
            for _ in range(count):
                self.changes += 1
                job = job_pb2.Job(name=self.job, priority=self.changes % 200 - 100)
                request = job_pb2.UpdateJobRequest(job=job, update_mask={"paths": ["priority"]})  # type: ignore[arg-type]
                calls.append(asyncio.ensure_future(stub.UpdateJob(request, metadata=metadata)))
                await asyncio.sleep(1 / rate if rate else 0)
            await asyncio.gather(*calls)

    def close(self) -> None:
        """Kill it."""
        self.process.kill()


class Peer:
    """The bare broadcast."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.broadcast"], stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout is not None
        self.pid, self.address = self.process.pid, f"127.0.0.1:{self.process.stdout.readline().strip()}"

    async def emit(self, count: int, rate: float = 0.0) -> None:
        """Send so many events, all at once or so many a second."""
        assert self.process.stdin is not None
        for _ in range(count if rate else 1):
            self.process.stdin.write(f"{1 if rate else count}\n")
            self.process.stdin.flush()
            await asyncio.sleep(1 / rate if rate else 0)

    def close(self) -> None:
        """Kill it."""
        self.process.kill()


class Side:
    """A server, its watchers, and what was found."""

    def __init__(self, server: Ours | Peer, before: int) -> None:
        self.server, self.total = server, before
        self.process = psutil.Process(server.pid)
        alone = self.process.memory_info().rss
        self.crowd = Crowd(server.address)
        self.round(1)
        self.bytes_a_watcher = (self.process.memory_info().rss - alone) / WATCHERS
        self.rates: list[float] = []
        self.cpu: list[float] = []

    def round(self, count: int, rate: float = 0.0) -> dict[str, float]:
        """Let every watcher get so many events."""
        self.total += count
        self.crowd.expect(self.total)
        cpu, started = sum(self.process.cpu_times()[:2]), time.time()
        asyncio.run(self.server.emit(count, rate))
        told = self.crowd.told()
        taken = max(each["ended"] for each in told) - started
        deliveries = count * WATCHERS
        spent = sum(self.process.cpu_times()[:2]) - cpu
        late = {name: max(each[name] for each in told) for name in ("p50_ms", "p95_ms", "p99_ms")}
        return late | {"per_second": deliveries / taken, "server_cpu_us_a_delivery": spent / deliveries * 1e6}

    def close(self) -> None:
        """End the watchers, then the server."""
        self.crowd.close()
        self.server.close()


def main() -> None:
    """Measure and keep the result."""
    before = machine()
    with tempfile.TemporaryDirectory(prefix="lt-") as home:
        ours, peer = Side(Ours(Path(home)), 2), Side(Peer(), 0)
        try:
            found: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
            pairs = [(found[0], ours), (found[1], peer)]
            for number in range(ROUNDS + 1):
                for sample, side in pairs if number % 2 else reversed(pairs):
                    result = side.round(BURST)
                    if number:
                        sample.append(result)
            steady = [side.round(int(STEADY_SECONDS * STEADY_RATE), STEADY_RATE) for side in (ours, peer)]
        finally:
            ours.close()
            peer.close()
    ratios = [one["per_second"] / other["per_second"] for one, other in zip(*found, strict=True)]
    names = ("per_second", "server_cpu_us_a_delivery")
    result = {
        "what": f"deliveries of a project's events to {WATCHERS} watchers, against a bare grpc.aio broadcast out of memory",
        "rounds": ROUNDS,
        "events_a_round": BURST,
        "none_lost": "every watcher checked that its numbers follow on each other",
        **{
            side: {name: vars(Spread.of([each[name] for each in sample])) for name in names}
            for side, sample in zip(("luthier", "broadcast"), found, strict=True)
        },
        "ratio_luthier_to_broadcast": vars(Spread.of(ratios)),
        "kilobytes_a_watcher": {"luthier": ours.bytes_a_watcher / 1000, "broadcast": peer.bytes_a_watcher / 1000},
        f"late_at_{STEADY_RATE:g}_events_a_second": {
            side: {name: each[name] for name in ("p50_ms", "p95_ms", "p99_ms")}
            for side, each in zip(("luthier", "broadcast"), steady, strict=True)
        },
        "machine": before,
    }
    path = keep("fanout", COMMAND, result)
    rates = [told(Spread.of([each["per_second"] for each in sample])) for sample in found]
    print(f"{rates[0]} deliveries/s, broadcast {rates[1]}/s, ratio {told(Spread.of(ratios), 2)}", path)


if __name__ == "__main__":
    main()
