"""A bare grpc.aio server that answers CreateJob with the job it was sent: `python -m benchmarks.echo` prints its port."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from luthier.v1 import job_pb2, job_pb2_grpc


class Echo(job_pb2_grpc.JobServiceServicer):
    """Does nothing but read and write the messages."""

    async def CreateJob(self, request: job_pb2.CreateJobRequest, context: Any) -> job_pb2.CreateJobResponse:
        """Answer with the request's job."""
        return job_pb2.CreateJobResponse(job=request.job)


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    job_pb2_grpc.add_JobServiceServicer_to_server(Echo(), server)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
