"""What floods a coordinator is refused with its reason, and the others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable

import grpc
import pytest

from luthier.client import Client
from luthier.client.errors import ResourceExhausted
from luthier.v1 import admin_pb2, job_pb2, job_pb2_grpc, training_pb2
from tests.support.coordinator_process import TOKEN, CoordinatorProcess
from tests.support.tenants import make_key

Fresh = Callable[..., CoordinatorProcess]
METADATA = (("authorization", f"Bearer {TOKEN}"),)


def test_a_message_that_is_too_large_is_refused_and_nothing_else_is(fresh: Fresh) -> None:
    process = fresh().start()
    spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full")
    job = job_pb2.Job(finetune=spec, display_name="x" * (20 * 2**20))
    with process.client() as client:
        with pytest.raises(ResourceExhausted, match="larger than max"):
            client.create_job(job)
        assert not client.jobs.ListJobs(job_pb2.ListJobsRequest(parent="projects/default")).jobs


def test_a_project_has_so_many_streams_and_all_have_so_many(fresh: Fresh) -> None:
    process = fresh(max_streams="5", max_project_streams="3").start()
    with process.client() as client:
        other = key_of_other(client)
    with process.client() as client, Client(process.address, other) as others:
        streams = [opened(client, "default") for _ in range(3)]
        with pytest.raises(ResourceExhausted, match=r"3 streams open.*max_project_streams"):
            opened(client, "default")
        more = [opened(others, "other") for _ in range(2)]
        with pytest.raises(ResourceExhausted, match=r"5 streams are open.*max_streams"):
            opened(others, "other")
        # Those that are open go on, and a place that becomes free is given again.
        more.pop().cancel()
        streams.append(once_there_is_room(lambda: opened(others, "other")))
        for stream in streams + more:
            stream.cancel()


def test_ten_thousand_streams_leave_the_others_alone(fresh: Fresh) -> None:
    process = fresh(max_streams="2000", max_project_streams="1000").start()
    with process.client() as client:
        other = key_of_other(client)

    async def flood() -> Counter[str]:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = job_pb2_grpc.JobServiceStub(channel)
            request = job_pb2.WatchJobsRequest(parent="projects/default", after_sequence=-1)
            streams = [stub.WatchJobs(request, metadata=METADATA) for _ in range(10_000)]
            ends = [asyncio.ensure_future(stream.code()) for stream in streams]
            done: set[asyncio.Future[grpc.StatusCode]] = set()
            async with asyncio.timeout(60):
                while len(done) < 9000:
                    done, _ = await asyncio.wait(ends, timeout=0.1)
            await asyncio.to_thread(ask)
            found = Counter(each.result().name for each in done)
            for stream in streams:
                stream.cancel()
            await asyncio.wait(ends)
            return found

    def ask() -> None:
        with Client(process.address, other) as client:
            stream = opened(client, "other")
            assert not client.jobs.ListJobs(job_pb2.ListJobsRequest(parent="projects/other")).jobs
            stream.cancel()

    assert asyncio.run(flood()) == {"RESOURCE_EXHAUSTED": 9000}
    with process.client() as client:
        assert client.admin.GetStatus(admin_pb2.GetStatusRequest()).coordinator.pid == process.process.pid  # type: ignore[union-attr]


def key_of_other(client: Client) -> str:
    client.admin.CreateProject(admin_pb2.CreateProjectRequest(project_id="other"))
    return make_key(client, "other", "editor").token


def opened(client: Client, project: str) -> grpc.Call:
    """A watch of the project that has been admitted."""
    stream = client.jobs.WatchJobs(job_pb2.WatchJobsRequest(parent=f"projects/{project}"))
    next(iter(stream))
    return stream  # type: ignore[no-any-return]


def once_there_is_room(open_one: Callable[[], grpc.Call]) -> grpc.Call:
    """The place of a stream that was cancelled becomes free when the server hears of it."""
    for _ in range(100):
        with contextlib.suppress(ResourceExhausted):
            return open_one()
    return open_one()
