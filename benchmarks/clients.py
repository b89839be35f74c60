"""Concurrent clients in a process of their own: `python -m benchmarks.clients ADDRESS TOKEN CLIENTS` makes calls on command.

Each line on stdin is a number of seconds; the answer is a line of JSON. The clients cost as little as Python allows, because they
share the machine with what is measured: the request is serialised once, only its request_id changes, and answers are not parsed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import grpc

from luthier.v1 import job_pb2

METHOD = "/luthier.v1.JobService/CreateJob"


def request_bytes() -> tuple[bytes, bytes]:
    """The request before and after its 32 characters of request_id."""
    mark = "x" * 32
    spec = {"source": "builtin:tiny", "output_model": "m"}
    job = job_pb2.Job(display_name="a submission", labels={"team": "search"}, import_model=spec)  # type: ignore[arg-type]
    request = job_pb2.CreateJobRequest(parent="projects/default", job=job, request_id=mark)
    before, _, after = request.SerializeToString().partition(mark.encode())
    return before, after


async def load(address: str, token: str, clients: int, seconds: float) -> dict[str, float]:
    """Call for so long from so many clients at once."""
    before, after = request_bytes()
    metadata = (("authorization", f"Bearer {token}"),)
    latencies: list[float] = []
    failed: list[str] = []
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)
        prefix, cpu = os.urandom(8).hex(), time.process_time()
        started = time.perf_counter()
        end = started + seconds

        async def client(number: int) -> None:
            count = 0
            while (begun := time.perf_counter()) < end:
                request_id = f"{prefix}{number:06d}{count:010d}".encode()
                try:
                    await call(before + request_id + after, metadata=metadata)
                    latencies.append(time.perf_counter() - begun)
                except grpc.RpcError as error:
                    failed.append(f"{error.code()} {error.details()}")
                count += 1

        await asyncio.gather(*(client(number) for number in range(clients)))
        taken = time.perf_counter() - started
    latencies.sort()
    if failed:
        print(f"{len(failed)} calls failed, the first with {failed[0]}", file=sys.stderr, flush=True)
    return {
        "calls": len(latencies),
        "failed": len(failed),
        "per_second": len(latencies) / taken,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1000,
        "client_cpu_share": (time.process_time() - cpu) / taken,
    }


def main() -> None:
    """Answer commands until stdin ends."""
    address, token, clients = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for line in sys.stdin:
        print(json.dumps(asyncio.run(load(address, token, clients, float(line)))), flush=True)


if __name__ == "__main__":
    main()
