"""The autoscaler is told what runs and waits, once and again when that changes; one that is away holds nobody up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from common.errors import Unavailable
from coordinator.cluster import autoscaler, ray_cluster
from coordinator.cluster.ray_cluster import RayCluster
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.states import EndReason
from coordinator.jobs.wishes import wish_end
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import job_pb2
from tests.support.fake_ray import FakeRay

NewJob = Callable[..., tables.Job]
H100 = {"ray.io/accelerator-type": "H100"}
RUNS = [({"CPU": 0.25}, {}), *[({"CPU": 1.0}, {})] * 3]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch, ray: FakeRay) -> None:
    monkeypatch.setattr(autoscaler, "PAUSE_SECONDS", 0.0)
    ray.gcs_address = "10.0.0.1:6379"


async def rounds(loop: Reconciler, count: int = 1) -> None:
    for _ in range(count):
        await loop.round()
        task = loop.autoscaler._telling
        if task is not None:
            await task


def ordered(bundles: list[tuple[dict[str, float], dict[str, str]]]) -> list[tuple[dict[str, float], dict[str, str]]]:
    return sorted(bundles, key=repr)


async def test_it_is_told_what_runs_and_waits_once_and_again_when_that_changes(
    loop: Reconciler, store: Store, ray: FakeRay, new_job: NewJob
) -> None:
    new_job(workers=3)
    waits = new_job(workers=2, placement=job_pb2.Placement(gpu_types=["H100"]))
    await rounds(loop, 3)
    (told,) = ray.requested
    assert ordered(told) == ordered([*RUNS, ({"CPU": 0.25}, H100), *[({"CPU": 1.0}, H100)] * 2])
    assert loop.autoscaler.words == "told of 7 places for what runs and waits"
    store.write_now(lambda session: wish_end(session, waits.uid, EndReason.USER))
    await rounds(loop)
    assert ordered(ray.requested[-1]) == ordered(RUNS)


async def test_one_that_cannot_be_told_is_tried_again(
    loop: Reconciler, ray: FakeRay, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_job()

    def away(_: object) -> None:
        raise Unavailable("no GCS there")

    with monkeypatch.context() as patched:
        patched.setattr(ray, "request_resources", away)
        await rounds(loop)
    assert loop.autoscaler.words == "cannot be told what is queued: no GCS there"
    await rounds(loop)
    assert len(ray.requested) == 1
    assert loop.autoscaler.words == "told of 2 places for what runs and waits"


async def test_one_that_takes_its_time_holds_up_no_round(
    loop: Reconciler, ray: FakeRay, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_job()
    asked = []

    def slow(bundles: object) -> None:
        asked.append(bundles)
        time.sleep(0.3)

    monkeypatch.setattr(ray, "request_resources", slow)
    await loop.round()
    new_job()
    await loop.round()
    assert len(ray.jobs) == 2
    assert len(asked) == 1
    assert loop.autoscaler._telling is not None
    await asyncio.wait_for(loop.autoscaler._telling, 5)


async def test_a_cluster_without_one_is_told_nothing(loop: Reconciler, ray: FakeRay, new_job: NewJob) -> None:
    ray.gcs_address = ""
    new_job()
    await rounds(loop)
    assert ray.requested == []
    assert loop.autoscaler.words == ""


def test_a_gcs_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "TELL_SECONDS", 0.5)
    cluster = RayCluster("http://127.0.0.1:9", None, "127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"Ray's GCS at 127\.0\.0\.1:9 does not answer within 0\.5 s"):
        cluster.request_resources([({"CPU": 1.0}, {})])
