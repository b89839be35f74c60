"""Procrastinate's clients: `python -m benchmarks.defer CONNINFO CLIENTS POOL` defers on command, as benchmarks.clients calls.

Each job carries what a CreateJob of the other side carries. Defers go straight to PostgreSQL: there is no server between.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time

import procrastinate
from google.protobuf.json_format import MessageToDict

from benchmarks.clients import request_bytes
from luthier.v1 import job_pb2


def payload() -> dict[str, object]:
    """The request as JSON."""
    before, after = request_bytes()
    request = job_pb2.CreateJobRequest.FromString(before + b"x" * 32 + after)
    return MessageToDict(request, preserving_proto_field_name=True)


async def load(conninfo: str, clients: int, pool: int, seconds: float) -> dict[str, float]:
    """Defer for so long from so many clients at once, through a pool of so many connections."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=conninfo, min_size=pool, max_size=pool, timeout=60))

    @app.task(queue="bench")
    def work(**_request: object) -> None:
        """Never run."""

    request = payload()
    latencies: list[float] = []
    async with app.open_async():
        cpu, started = time.process_time(), time.perf_counter()
        end = started + seconds

        async def client() -> None:
            while (begun := time.perf_counter()) < end:
                await work.defer_async(**request)
                latencies.append(time.perf_counter() - begun)

        await asyncio.gather(*(client() for _ in range(clients)))
        taken = time.perf_counter() - started
    latencies.sort()
    return {
        "calls": len(latencies),
        "per_second": len(latencies) / taken,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1000,
        "client_cpu_share": (time.process_time() - cpu) / taken,
    }


def main() -> None:
    """Answer commands until stdin ends."""
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    conninfo, clients, pool = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for line in sys.stdin:
        print(json.dumps(asyncio.run(load(conninfo, clients, pool, float(line)))), flush=True)


if __name__ == "__main__":
    main()
